"""Measures the errors of fp8 products with one scale per tensor, per row, or per block, and their time on a GPU.

    %(prog)s --output results

Errors are relative to float64 with bf16 operands, by row of the result, for operands of several distributions: the
output of a layer's product (e4m3 x e4m3), the gradient of its input and that of its weight (e5m2 x e4m3). "one factor"
keeps the other factor in bf16. A scale per row serves one of the three products only: the other two sum over the rows,
so they need another quantised copy. The errors of accumulation are those of a product on a GPU, relative to float64
with the same fp8 operands.
"""

import statistics
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import output
from benchmarks.device import find_device, measure_milliseconds
from megamtp.precision.operations import (
    E4M3,
    E5M2,
    LARGEST,
    MIN_AMAX,
    quantise,
    quantise_with_transpose,
    scaled_product,
)

BLOCK = 128
SMOKE = {"positions": 128, "width": 128}
SCALINGS = ("tensor", "row", "block", "one factor")
GRADIENT_SIZE = 1e-5


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = output.parser(__doc__, "float8")
    parser.add_argument("--positions", type=output.positive, default=4096, help="rows of the input [4096]")
    parser.add_argument("--width", type=output.positive, default=4096, help="inputs and outputs of the weight [4096]")
    options = output.parse(parser, arguments, SMOKE)
    output.make_folder(options)
    results: list[dict] = []
    for name, make in DISTRIBUTIONS.items():
        x, gradient = (make(options.positions, options.width, seed) for seed in (0, 1))
        weight, gradient = 0.02 * _normal(options.width, options.width, seed=2), GRADIENT_SIZE * gradient
        for scaling in SCALINGS:
            results.append({"operands": name, "scaling": scaling} | _errors(x, weight, gradient, scaling))
            output.say(f"{name}, {scaling}: {results[-1]}")
    if torch.cuda.is_available():
        results += _times(options.positions, options.width)
    settings = {"positions": options.positions, "width": options.width}
    output.write(options, settings, results, tables(results), _draw(results))


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(find_device(), torch.bfloat16)


def _outlier_columns(rows: int, columns: int, seed: int) -> Tensor:
    """One column in 128 is 100 times as large, as some dimensions of the residual stream are in trained models."""
    x = _normal(rows, columns, seed)
    x[:, ::BLOCK] *= 100
    return x


def _heavy_tails(rows: int, columns: int, seed: int) -> Tensor:
    """Products of three normal numbers, like SwiGLU's outputs, whose largest is some 100 times their deviation."""
    x = _normal(rows, columns, seed)
    return x * x.roll(1, 0) * x.roll(1, 1)


def _one_outlier(rows: int, columns: int, seed: int) -> Tensor:
    """One number is 2^14 times as large as the others' deviation."""
    x = _normal(rows, columns, seed)
    x[0, 0] = 2.0**14
    return x


DISTRIBUTIONS: dict[str, Callable[[int, int, int], Tensor]] = {
    "normal": _normal,
    "outlier columns": _outlier_columns,
    "heavy tails": _heavy_tails,
    "one outlier": _one_outlier,
}


def _errors(x: Tensor, weight: Tensor, gradient: Tensor, scaling: str) -> dict[str, float]:
    """Returns the errors of y = x W^T, of g W, and of g^T x.

    The second factor of the last two products is quantised along the dimension that the product sums over, as a scale
    per row needs.
    """
    kept = scaling == "one factor"
    weight8, x8 = (_rounded(factor, E4M3, "tensor" if kept else scaling) for factor in (weight, x))
    weight8_t, x8_t = (_rounded(factor.T, E4M3, "tensor" if kept else scaling).T for factor in (weight, x))
    gradient8 = gradient.double() if kept else _rounded(gradient, E5M2, scaling)
    gradient8_t = gradient.double() if kept else _rounded(gradient.T, E5M2, scaling).T
    x64, weight64, gradient64 = x.double(), weight.double(), gradient.double()
    return {
        "output": _error((x64 if kept else x8) @ weight8.T, x64 @ weight64.T),
        "input_gradient": _error(gradient8 @ weight8_t, gradient64 @ weight64),
        "weight_gradient": _error(gradient8_t.T @ x8_t, gradient64.T @ x64),
    }


def _rounded(x: Tensor, dtype: torch.dtype, scaling: str) -> Tensor:
    """Returns what is left of x in fp8, in float64."""
    if scaling == "tensor":
        quantised, scale = quantise(x.contiguous(), dtype)
        return quantised.double() * scale.double()
    groups = x.double().unflatten(1, (-1, BLOCK if scaling == "block" else x.shape[1]))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=MIN_AMAX) / LARGEST[dtype]
    return ((groups / scale).float().to(dtype).double() * scale).flatten(1)


def _error(actual: Tensor, exact: Tensor) -> float:
    """Returns the root mean square of the rows' relative errors, so that a large row does not hide the others."""
    return float(((actual - exact).norm(dim=1) / exact.norm(dim=1)).square().mean().sqrt())


def _times(positions: int, width: int) -> list[dict]:
    """Returns the milliseconds of a product in bf16 and in fp8, the errors of accumulation, and quantisation's time."""
    x, weight = _normal(positions, width, seed=0), _normal(width, width, seed=1)
    x8, scale = quantise(x)
    weight8, weight_scale = quantise(weight)
    exact = (x8.double() * scale) @ (weight8.double() * weight_scale).T
    rows, columns = (torch.ones(shape, device=x.device) for shape in ((positions, 1), (1, width)))

    def by_row() -> Tensor:
        return torch._scaled_mm(
            x8, weight8.T, scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    runs: dict[str, Callable[[], object]] = {
        "bf16": lambda: x @ weight.T,
        "fp8, scale per tensor": lambda: scaled_product(x8, scale, weight8, weight_scale, torch.bfloat16, True),
        "fp8, scale per tensor, exact accumulation": lambda: scaled_product(
            x8, scale, weight8, weight_scale, torch.bfloat16, False
        ),
        "fp8, scale per row": by_row,
        "quantisation with transpose": lambda: quantise_with_transpose([x], E4M3),
    }
    results: list[dict] = [{"run": name, "milliseconds": measure_milliseconds(run)} for name, run in runs.items()]
    for result, fast in ((results[1], True), (results[2], False)):
        product = scaled_product(x8, scale, weight8, weight_scale, torch.float32, fast)
        result["accumulation_error"] = _error(product, exact)
    return results


def tables(results: list[dict]) -> str:
    header = ["operands", "scale per", "output", "gradient of the input", "gradient of the weight"]
    names = ("output", "input_gradient", "weight_gradient")
    errors = output.table(
        header,
        [[r["operands"], r["scaling"], *(f"{r[name]:.2%}" for name in names)] for r in results if "scaling" in r],
    )
    times = [
        [r["run"], output.spread(r["milliseconds"], 3), _percent(r.get("accumulation_error"))]
        for r in results
        if "run" in r
    ]
    return errors + ("\n\n" + output.table(["product", "ms", "error of accumulation"], times) if times else "")


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:.3%}"


def _draw(results: list[dict]) -> Figure:
    errors = [result for result in results if "scaling" in result]
    groups = list(dict.fromkeys(result["operands"] for result in errors))
    heights = {
        scaling: {
            r["operands"]: 100 * statistics.mean((r["output"], r["input_gradient"], r["weight_gradient"]))
            for r in errors
            if r["scaling"] == scaling
        }
        for scaling in SCALINGS
    }
    figure, (axes,) = output.figure(2 + 1.6 * len(groups), 4.5)
    output.bars(axes, groups, heights)
    axes.set_ylabel("relative error, mean of the three products, %")
    figure.legend(frameon=False, ncols=4, loc="outside upper center")
    return figure

"""Measures time and memory of one head's loss, forward and backward, and of other implementations of this loss.

    %(prog)s --output results

The floor is the time of the loss's three matrix products at the card's measured rate. Extra memory is the peak memory
without the inputs, dH and one sum of dW. "One of 4 heads" is a quarter of the time of four losses that share dW and, in
fp8, the quantised weight. liger-kernel and cut-cross-entropy are measured if installed. Every round measures each loss
once, with random weights. cut-cross-entropy skips small probabilities; it is also measured with a peaked softmax.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import output
from benchmarks.device import find_device, measure_milliseconds
from megamtp.losses.float8 import Float8Weight
from megamtp.losses.linear_cross_entropy import SharedGradient, default_chunk_rows, linear_cross_entropy
from megamtp.training.preflight import FLOAT8_CAPABILITY

HEADS = 4
SHAPES = [(2048, 32000), (4096, 32000), (4096, 128256)]
PRODUCT_WIDTH = 8192  # of the square matrices whose product measures the card's rate
SMOKE = {"rows": 128, "rounds": 1, "shapes": [(128, 512)], "product_width": 128}
CHUNK_ROWS = (2048, 4096, 8192)  # measured in addition to the default
DEVIATION = 0.02  # of random weights
TARGET_LOGIT = 14.0  # of the peaked softmax
PRODUCTS = "the three products alone"


@dataclass(frozen=True)
class Implementation:
    """Forward and backward of `num_losses` losses, and the dtype in which they sum dW over chunks of rows."""

    run: Callable[[], object]
    sum_dtype: torch.dtype = torch.bfloat16
    num_losses: int = 1


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = output.parser(__doc__, "loss")
    parser.add_argument("--rows", type=output.positive, default=8192, help="number of positions [8192]")
    parser.add_argument(
        "--rounds", type=output.positive, default=3, help="measurements of each loss, at least 0.1 s each [3]"
    )
    parser.set_defaults(shapes=SHAPES, product_width=PRODUCT_WIDTH)
    options = output.parse(parser, arguments, SMOKE)
    output.require_gpu(options)
    output.make_folder(options)
    rate, results = _rate(options.product_width), []
    for dim, vocabulary in options.shapes:
        results += _measure_shape(options.rows, dim, vocabulary, rate, options.rounds)
    settings = {"positions": options.rows, "floor": f"three products at {rate / 1e12:.0f} TFLOP/s, measured"}
    output.write(options, settings, results, tables(results), _draw(results))


def _rate(width: int) -> float:
    """Returns the FLOP/s of a large bf16 matrix product on this card."""
    left, right = torch.randn(2, width, width, device=find_device(), dtype=torch.bfloat16)
    return 2 * width**3 / (statistics.median(measure_milliseconds(lambda: left @ right, warmup=100, rep=500)) / 1e3)


def _measure_shape(rows: int, dim: int, vocabulary: int, rate: float, rounds: int) -> list[dict]:
    device = find_device()
    hidden = torch.randn(rows, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, dim, device=device) * DEVIATION).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)
    # the logit of a target is about TARGET_LOGIT, because a row of the weight has a squared norm of DEVIATION^2 * dim
    peaked = (0.3 * hidden + weight[targets] * TARGET_LOGIT / (DEVIATION**2 * dim)).detach().requires_grad_()
    inputs, floor = [hidden, peaked, weight], 6 * rows * dim * vocabulary / rate * 1e3
    implementations = _implementations(hidden, peaked, weight, targets)
    milliseconds: dict[str, list[float]] = {name: [] for name in implementations}
    names = list(implementations)
    for index in range(rounds):
        # rotate the order: the previous loss leaves the card hot or cold
        first = index * len(names) // rounds
        for name in names[first:] + names[:first]:
            milliseconds[name] += measure_milliseconds(implementations[name].run, rep=100, grad_to_none=inputs)
    results = []
    for name, implementation in implementations.items():
        times = [time / implementation.num_losses for time in milliseconds[name]]
        median = statistics.median(times)
        results.append(
            {
                "dim": dim,
                "vocabulary": vocabulary,
                "name": name,
                "sum_dtype": str(implementation.sum_dtype).removeprefix("torch."),
                "milliseconds": times,
                "over_floor": median / floor,
                "extra_bytes": None if name == PRODUCTS or not hidden.is_cuda else _extra_bytes(implementation, inputs),
            }
        )
        print(f"d={dim} V={vocabulary} {name}: {output.spread(times, 2)} ms, {median / floor:.2f} x floor", flush=True)
    return results


def _extra_bytes(implementation: Implementation, inputs: list[Tensor]) -> int:
    hidden, _, weight = inputs
    for tensor in inputs:
        tensor.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    implementation.run()
    return (
        torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.numel() * implementation.sum_dtype.itemsize
    )


def _implementations(hidden: Tensor, peaked: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Implementation]:
    def forward_and_backward(loss: Callable[[], Tensor], sum_dtype: torch.dtype = torch.bfloat16) -> Implementation:
        return Implementation(lambda: loss().backward(), sum_dtype)

    def ours(chunk_rows: int | None) -> Implementation:
        return forward_and_backward(
            lambda: linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows)[0], torch.float32
        )

    def all_heads(float8: bool) -> Implementation:
        def run() -> None:
            shared, float8_weight = SharedGradient(HEADS), Float8Weight() if float8 else None
            for _ in range(HEADS):
                hidden.grad = None
                loss, _ = linear_cross_entropy(
                    hidden, weight, targets, shared_gradient=shared, float8_weight=float8_weight
                )
                loss.backward()

        return Implementation(run, torch.float32, HEADS)

    detached = hidden.detach()
    gradient = torch.randn(len(hidden), len(weight), device=hidden.device, dtype=torch.bfloat16)
    implementations = {
        "ours": ours(None),
        **{f"ours, {rows} rows": ours(rows) for rows in CHUNK_ROWS if rows != default_chunk_rows(len(weight), 2)},
        f"ours, one of {HEADS} heads": all_heads(float8=False),
        "logits in memory, fp32": forward_and_backward(
            lambda: F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
        ),
        PRODUCTS: Implementation(
            lambda: (detached @ weight.detach().T, gradient @ weight.detach(), gradient.T @ detached)
        ),
    }
    if not hidden.is_cuda or torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY:
        implementations["ours, fp8"] = forward_and_backward(
            lambda: linear_cross_entropy(hidden, weight, targets, float8_weight=Float8Weight())[0], torch.float32
        )
        implementations[f"ours, fp8, one of {HEADS} heads"] = all_heads(float8=True)
    if hidden.is_cuda and find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        for name, dtype in (("liger-kernel", None), ("liger-kernel, accum_dtype fp32", torch.float32)):
            loss = partial(liger, hidden, weight, targets, reduction="sum", accum_dtype=dtype)
            implementations[name] = forward_and_backward(loss, dtype or weight.dtype)
    if hidden.is_cuda and find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        implementations["cut-cross-entropy"] = forward_and_backward(
            lambda: cut(hidden, weight, targets, reduction="sum")
        )
        implementations["cut-cross-entropy, peaked"] = forward_and_backward(
            lambda: cut(peaked, weight, targets, reduction="sum")
        )
    return implementations


def tables(results: list[dict]) -> str:
    header = ["d", "V", "loss", "dW summed in", "ms", "time / floor", "extra memory, GiB"]
    rows = [
        [
            str(r["dim"]),
            str(r["vocabulary"]),
            r["name"],
            r["sum_dtype"],
            output.spread(r["milliseconds"], 2),
            f"{r['over_floor']:.2f}",
            "-" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 2**30:.2f}",
        ]
        for r in results
    ]
    note = (
        "The floor is the time of the three matrix products at the card's measured rate. dW is summed over chunks of "
        "rows, and over heads, in the given dtype. A sum in bfloat16 is rounded after every chunk; this is the default "
        "of liger-kernel and of cut-cross-entropy. Whole logits and the products alone have one chunk."
    )
    return f"{output.table(header, rows)}\n\n{note}"


def _draw(results: list[dict]) -> Figure:
    """Draws time above memory, with a group of bars for each shape."""
    groups = list(dict.fromkeys(_group(result) for result in results))
    names = list(dict.fromkeys(result["name"] for result in results))
    figure, (time_axes, memory_axes) = output.figure(13, 7, rows=2, sharex=True)
    for axes, key, unit in ((time_axes, "over_floor", 1), (memory_axes, "extra_bytes", 2**30)):
        known = [result for result in results if result[key] is not None]
        output.bars(
            axes, groups, {name: {_group(r): r[key] / unit for r in known if r["name"] == name} for name in names}
        )
    time_axes.axhline(1.0, color="0.5", linewidth=0.8)
    time_axes.set_ylabel("time / three products at the card's rate")
    memory_axes.set_ylabel("extra memory, GiB")
    figure.legend(*time_axes.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure


def _group(result: dict) -> str:
    return f"d={result['dim']}, V={result['vocabulary']}"

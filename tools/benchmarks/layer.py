"""Measures one transformer layer, in bf16 and in fp8, beside the time of its parts.

    %(prog)s --sizes 0.3b 1.3b 6.7b --output results

The parts are its matrix products alone, its attention alone, and the memory traffic of everything else, if each kernel
reads its inputs and writes its outputs once at the speed of a large copy. The layer runs as in training: compiled, with
weights that were quantised before. With --torchao, the benchmark also measures the same layer with torchao's fp8
products (convert_to_float8_training with its defaults), compiled; it quantises its weights in each forward pass. The
parts beside it are those of megamtp's layer in fp8.
"""

import dataclasses
import functools
import importlib
import statistics
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import emulation, output
from benchmarks.device import find_device, measure_milliseconds
from megamtp.config import Config
from megamtp.engines.base import layer_options
from megamtp.errors import InputError
from megamtp.model.attention import attention
from megamtp.model.initial import STANDARD_DEVIATION
from megamtp.model.layers import TransformerLayer, rms_norm
from megamtp.model.rotary import rotary_tables
from megamtp.precision import float8
from megamtp.precision.operations import E4M3, E5M2, scaled_product
from megamtp.precision.weights import quantiser_of

PRECISIONS, TORCHAO = ("bf16", "fp8"), "fp8, torchao"
COPY_BYTES = 2**30
SMOKE = emulation.SMOKE | {"sizes": ["0.3b"]}


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = emulation.parser(__doc__, "layer")
    parser.add_argument("--sizes", nargs="+", default=emulation.SIZES, choices=emulation.SIZES, help="models [all]")
    parser.add_argument("--torchao", action="store_true", help="also measure torchao's fp8 products")
    options = output.parse(parser, arguments, SMOKE)
    output.require_gpu(options)
    if options.torchao:
        _import_torchao()
    output.make_folder(options)
    configs = {size: emulation.config(size, 1, 1, options) for size in options.sizes}
    bytes_per_ms, results = _copy_speed(options.smoke), []
    for size, config in configs.items():
        for precision in PRECISIONS + (TORCHAO,) * options.torchao:
            results.append(_measure(size, config, precision, bytes_per_ms))
            median = statistics.median(results[-1]["milliseconds"])
            output.say(f"{size} {precision}: {median:.3f} ms, {results[-1]['floor']:.3f} ms in parts")
    settings = {"T": options.sequence_length, "copy": f"{bytes_per_ms / 1e6:.0f} GB/s"}
    output.write(options, settings, results, tables(results), _draw(results))


def _copy_speed(smoke: bool) -> float:
    """Returns the bytes that a large copy reads and writes in a millisecond."""
    source = torch.empty(2**20 if smoke else COPY_BYTES, dtype=torch.uint8, device=find_device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(measure_milliseconds(lambda: target.copy_(source)))


def _measure(size: str, config: Config, precision: str, bytes_per_ms: float) -> dict:
    model, train, device = config.model, config.train, find_device()
    batch, length, in_float8 = train.micro_batch_size, train.sequence_length, precision != "bf16"
    positions, key_value_dim = batch * length, model.key_value_heads * model.head_dim
    products = sum(
        _product(in_float8, positions, rows, columns)
        for rows, columns in _weights(model.dim, key_value_dim, model.hidden_dim)
    )
    attention_milliseconds = _attention(batch, length, model.num_attention_heads, model.key_value_heads, model.head_dim)
    num_bytes = positions * _traffic(in_float8, model.dim, key_value_dim, model.hidden_dim)
    if in_float8:
        num_bytes += 2 * sum(rows * columns for rows, columns in _weights(model.dim, key_value_dim, model.hidden_dim))
    traffic = num_bytes / bytes_per_ms
    make = _torchao_layer if precision == TORCHAO else functools.partial(_own_layer, in_float8=in_float8)
    forward, both = _layer(config, *make(config, device))
    return {
        "size": size,
        "precision": precision,
        "dim": model.dim,
        "positions": positions,
        "forward_milliseconds": forward,
        "milliseconds": both,
        "products": products,
        "attention": attention_milliseconds,
        "traffic": traffic,
        "floor": products + attention_milliseconds + traffic,
    }


def _weights(dim: int, key_value_dim: int, hidden_dim: int) -> list[tuple[int, int]]:
    """Returns (outputs, inputs) of the layer's products, where weights that read one input are one product."""
    return [(dim + 2 * key_value_dim, dim), (dim, dim), (2 * hidden_dim, dim), (dim, hidden_dim)]


def _product(in_float8: bool, positions: int, rows: int, columns: int) -> float:
    """Returns the milliseconds of one weight's product and of its two gradients."""
    return sum(
        statistics.median(measure_milliseconds(run))
        for run in (_float8_products if in_float8 else _bf16_products)(positions, rows, columns)
    )


def _bf16_products(positions: int, rows: int, columns: int) -> Iterator[Callable[[], Tensor]]:
    x, gradient, weight = (_random(*shape) for shape in ((positions, columns), (positions, rows), (rows, columns)))
    yield lambda: x @ weight.T
    yield lambda: gradient @ weight
    yield lambda: gradient.T @ x


def _float8_products(positions: int, rows: int, columns: int) -> Iterator[Callable[[], Tensor]]:
    scale = torch.ones(1, 1, device=find_device())

    def product(
        left: tuple[int, int], left_dtype: torch.dtype, right: tuple[int, int], fast: bool
    ) -> Callable[[], Tensor]:
        left8, right8 = _random(*left).to(left_dtype), _random(*right).to(E4M3)
        return lambda: scaled_product(left8, scale, right8, scale, torch.bfloat16, fast)

    yield product((positions, columns), E4M3, (rows, columns), float8.FAST_FORWARD)
    yield product((positions, rows), E5M2, (columns, rows), float8.FAST_BACKWARD)
    yield product((rows, positions), E5M2, (columns, positions), float8.FAST_BACKWARD)


def _attention(batch: int, length: int, num_heads: int, num_key_value_heads: int, head_dim: int) -> float:
    """Returns the milliseconds of forward and backward."""
    queries = _random(batch, length, num_heads, head_dim).transpose(1, 2).requires_grad_()
    keys, values = (
        _random(batch, length, num_key_value_heads, head_dim).transpose(1, 2).requires_grad_() for _ in range(2)
    )
    gradient = torch.randn_like(queries)

    def run() -> None:
        F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=num_heads != num_key_value_heads
        ).backward(gradient)

    return statistics.median(measure_milliseconds(run, grad_to_none=[queries, keys, values]))


def _traffic(in_float8: bool, dim: int, key_value_dim: int, hidden_dim: int) -> int:
    """Returns the bytes that forward and backward read and write per position, outside of products and attention.

    Each bf16 number counts 2 bytes, each fp8 number 1. In this order: norms, rotation, sums with the residual stream,
    SwiGLU; in fp8 also quantisation, with its pass for the largest magnitude, and transposes.
    """
    rotation = 2 * 4 * (dim + key_value_dim)
    if not in_float8:
        norms, sums, swiglu = 2 * (4 + 10) * dim, 2 * 6 * dim, (6 + 12) * hidden_dim
        return norms + rotation + sums + swiglu
    # The second norm's kernel also computes a sum. SwiGLU's kernels also write transposes.
    norms, sums, swiglu = (3 + 7 + 2 * 8) * dim, 6 * dim, (10 + 16) * hidden_dim
    quantisation = 3 * 6 * dim + 6 * (dim + 2 * key_value_dim)
    transposes = 2 * 2 * dim
    return norms + rotation + sums + swiglu + quantisation + transposes


def _layer(config: Config, layer: nn.Module, run: Callable[[Tensor], Tensor]) -> tuple[list[float], list[float]]:
    """Returns the milliseconds of forward, and those of forward and backward."""
    x = _random(config.train.micro_batch_size, config.train.sequence_length, config.model.dim).requires_grad_()
    gradient = torch.randn_like(x) * 1e-4
    gradients = [x, *layer.parameters()]
    forward = measure_milliseconds(lambda: run(x))
    return forward, measure_milliseconds(lambda: run(x).backward(gradient), grad_to_none=gradients)


def _own_layer(config: Config, device: torch.device, in_float8: bool) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Returns (layer, its forward function)."""
    options = layer_options(dataclasses.replace(config.train, precision="fp8" if in_float8 else "bf16"), device)
    layer = _initialized(TransformerLayer(config.model, options), device)
    if layer.weight_groups:
        groups = [(group, [layer.get_parameter(name) for name in group.names]) for group in layer.weight_groups]
        quantiser_of(groups).update()
    return layer, layer


def _torchao_layer(config: Config, device: torch.device) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Returns (layer with torchao's linear modules, its compiled forward function)."""
    model = config.model
    layer = _initialized(TransformerLayer(model), device)
    _import_torchao().convert_to_float8_training(layer)
    rotary = rotary_tables(config.train.sequence_length, model.head_dim, model.rope_theta, device, torch.bfloat16)
    projections, mlp = layer.attention, layer.mlp

    def run(x_BTD: Tensor) -> Tensor:
        normed_BTD = rms_norm(x_BTD, layer.attention_norm.weight, model.norm_eps)
        queries, keys, values = (projections[name](normed_BTD) for name in ("query", "key", "value"))
        x_BTD = x_BTD + projections["output"](attention(queries, keys, values, rotary, model.head_dim)[0])
        normed_BTD = rms_norm(x_BTD, layer.mlp_norm.weight, model.norm_eps)
        return x_BTD + mlp["down"](F.silu(mlp["gate"](normed_BTD)) * mlp["up"](normed_BTD))

    return layer, torch.compile(run, dynamic=False, fullgraph=True)


def _import_torchao() -> ModuleType:
    """Raises InputError."""
    try:
        return importlib.import_module("torchao.float8")
    except ImportError as error:
        raise InputError(f"--torchao: {error}; expected torchao: pip install torchao") from None


def _initialized(layer: TransformerLayer, device: torch.device) -> TransformerLayer:
    """Returns the layer in bf16 on the device with the weights that a training starts from."""
    layer.to(device, torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, STANDARD_DEVIATION)
    return layer


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=find_device(), dtype=torch.bfloat16)


def tables(results: list[dict]) -> str:
    header = ["size", "precision", "D", "positions", "forward, ms", "forward and backward, ms"]
    header += ["products, ms", "attention, ms", "memory traffic, ms", "sum of parts, ms", "measured / sum"]
    rows = [
        [
            r["size"],
            r["precision"],
            str(r["dim"]),
            str(r["positions"]),
            output.spread(r["forward_milliseconds"], 2),
            output.spread(r["milliseconds"], 2),
            *(f"{r[part]:.2f}" for part in ("products", "attention", "traffic", "floor")),
            f"{statistics.median(r['milliseconds']) / r['floor']:.3f}",
        ]
        for r in results
    ]
    return output.table(header, rows)


def _draw(results: list[dict]) -> Figure:
    groups = list(dict.fromkeys(result["size"] for result in results))
    base = {r["size"]: statistics.median(r["milliseconds"]) for r in results if r["precision"] == "bf16"}
    heights: dict[str, dict[str, float]] = {}
    for result in results:
        size, precision = result["size"], result["precision"]
        heights.setdefault(precision, {})[size] = statistics.median(result["milliseconds"]) / base[size]
        heights.setdefault(f"{precision}, sum of parts", {})[size] = result["floor"] / base[size]
    figure, (axes,) = output.figure(2 + 1.6 * len(groups), 4.5)
    output.bars(axes, groups, heights)
    axes.set_ylabel("time / time of the layer in bf16")
    figure.legend(frameon=False, ncols=2, loc="outside upper center")
    return figure

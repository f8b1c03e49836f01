"""Compares the gradients of a step in fp8 with those in bf16 and fp32, by the cosine of the angle between them.

    %(prog)s --size 0.3b --output results

All three steps have the same initial weights, rounded to bf16, and the same random tokens. Layers are not compiled.
The table has one row for each kind of parameter, such as the query weights of all trunk layers.
"""

import re

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import emulation, output
from benchmarks.device import find_device
from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import DTYPES, layer_options
from megamtp.model.initial import initial_value
from megamtp.model.mtp import MTPModel

SMOKE = emulation.SMOKE | {"size": "0.3b", "heads": 2}
PRECISIONS = ("fp32", "bf16", "fp8")
PAIRS = (("fp8", "bf16"), ("fp8", "fp32"), ("bf16", "fp32"))


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = emulation.parser(__doc__, "gradients")
    parser.add_argument("--size", default="0.3b", choices=emulation.SIZES, help="model [0.3b]")
    parser.add_argument("--heads", type=output.positive, default=4, help="number of heads [4]")
    options = output.parse(parser, arguments, SMOKE)
    output.make_folder(options)
    configs = {
        precision: emulation.config(
            options.size, options.heads, 1, options, f"train.precision={precision}", "train.compile=false"
        )
        for precision in PRECISIONS
    }
    weights = _initial_weights(configs["bf16"])
    gradients = {precision: _gradients(config, weights) for precision, config in configs.items()}
    train = configs["bf16"].train
    settings = {"model": options.size, "n": options.heads, "T": train.sequence_length}
    settings |= {"windows": train.micro_batch_size}
    settings |= {"set": " ".join(options.set)} if options.set else {}
    results = compare(gradients)
    output.write(options, settings, results, tables(results), _draw(results))


def _initial_weights(config: Config) -> dict[str, Tensor]:
    with torch.device("meta"):
        parameters = dict(MTPModel(config.model).named_parameters())
    return {
        name: initial_value(name, tuple(parameter.shape), config.model, seed=0).to(find_device(), torch.bfloat16)
        for name, parameter in parameters.items()
    }


def _gradients(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradient of each parameter in a step's precision."""
    model, train, device = config.model, config.train, find_device()
    with torch.device("meta"):
        part = MTPModel(model, config.resolved_head_loss, options=layer_options(train, device))
    part = part.to(DTYPES[train.dtype]).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(weights[name])
    part.quantise_weights()
    n, batch, length = model.num_future_tokens, train.micro_batch_size, train.sequence_length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (batch, length + n), generator=generator).to(device)
    micro_batch = Batch.from_tokens(tokens, length)
    scales = [1 / (batch * length)] * n
    loss, _ = part(micro_batch.inputs, micro_batch.targets, scales, None, micro_batch.following)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in part.named_parameters()}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def compare(gradients: dict[str, dict[str, Tensor]]) -> list[dict]:
    """Returns a result for each kind of parameter: the cosine of each pair of precisions, of each parameter.

    Args:
        gradients: by precision and name.
    """
    kinds: dict[str, list[str]] = {}
    for name in gradients["bf16"]:
        kinds.setdefault(re.sub(r"\.\d+\.", " ", name), []).append(name)
    return [
        {
            "parameter": kind,
            **{f"{a} {b}": [_cosine(gradients[a][name], gradients[b][name]) for name in names] for a, b in PAIRS},
        }
        for kind, names in kinds.items()
    ]


def _cosine(left: Tensor, right: Tensor) -> float:
    return F.cosine_similarity(left.double().flatten(), right.double().flatten(), 0).item()


def tables(results: list[dict]) -> str:
    header = ["parameter", "number", *(f"cosine of {a} and {b}, mean [minimum]" for a, b in PAIRS)]
    rows = [
        [r["parameter"], str(len(r["fp8 bf16"])), *(_mean_and_minimum(r[f"{a} {b}"]) for a, b in PAIRS)]
        for r in results
    ]
    return output.table(header, rows)


def _mean_and_minimum(values: list[float]) -> str:
    return f"{sum(values) / len(values):.5f} [{min(values):.5f}]"


def _draw(results: list[dict]) -> Figure:
    figure, (axes,) = output.figure(9, 0.8 + 0.35 * len(results))
    for row, result in enumerate(results):
        for (a, b), marker, color in zip(PAIRS[1:], "ox", ("tab:orange", "tab:blue"), strict=True):
            values = [1 - value for value in result[f"{a} {b}"]]
            axes.plot(values, [row] * len(values), marker, color=color, label=f"{a} and {b}" if row == 0 else None)
    axes.set_yticks(range(len(results)), [result["parameter"] for result in results])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("1 - cosine of the gradients")
    axes.grid(alpha=0.25, axis="x")
    axes.legend(frameon=False)
    return figure

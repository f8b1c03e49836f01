"""The loss of one head, forward and backward: time over that of its three matrix products at the card's rate, and memory.

    python tools/benchmark.py loss --output results

Extra memory is what is alive besides inputs, dH and one fp32 dW. "One of 4 heads": a quarter of the time of four losses that share
dW and, in fp8, the quantised weight. liger-kernel and cut-cross-entropy take part where installed.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from benchmarks import output
from megamtp.commands.command_line import Parser
from megamtp.losses.float8 import Float8Weight
from megamtp.losses.linear_cross_entropy import SharedGradient, linear_cross_entropy
from megamtp.pretrain import FLOAT8_CAPABILITY

HEADS, OF_HEADS = 4, ", one of 4 heads"
SHAPES = [(2048, 32000), (4096, 32000), (4096, 128256)]


def main(arguments: list[str]) -> None:
    """Raises InputError."""
    parser = Parser(__doc__)
    parser.add_argument("--rows", type=int, default=8192, help="positions [8192]")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    rate, results = _rate(), []
    for dim, vocabulary in SHAPES:
        results += _measure_shape(options.rows, dim, vocabulary, rate)
    rows = [
        [
            str(r["dim"]),
            str(r["vocabulary"]),
            r["name"],
            f"{r['milliseconds']:.2f}",
            f"{r['over_floor']:.2f}",
            _gib(r["extra_bytes"]),
        ]
        for r in results
    ]
    header = ["d", "V", "loss", "ms", "over floor", "extra memory, GiB"]
    settings = {"positions": options.rows, "floor": f"three products at {rate / 1e12:.0f} TFLOP/s, measured"}
    output.write(options.output, "loss", settings, results, output.table(header, rows))


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


def _rate() -> float:
    """FLOP/s of a large bf16 product on this card."""
    left, right = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / (do_bench(lambda: left @ right, warmup=100, rep=500, return_mode="median") / 1e3)


def _measure_shape(rows: int, dim: int, vocabulary: int, rate: float) -> list[dict]:
    hidden = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, dim, device="cuda") * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    floor = 6 * rows * dim * vocabulary / rate * 1e3
    results = []
    for name, run in _contestants(hidden, weight, targets).items():
        milliseconds = do_bench(run, warmup=50, rep=300, return_mode="median", grad_to_none=[hidden, weight])
        milliseconds /= HEADS if name.endswith(OF_HEADS) else 1
        result = {
            "dim": dim,
            "vocabulary": vocabulary,
            "name": name,
            "milliseconds": milliseconds,
            "over_floor": milliseconds / floor,
        }
        result["extra_bytes"] = _extra_bytes(run, hidden, weight) if "products" not in name else None
        results.append(result)
        print(f"d={dim} V={vocabulary} {name}: {milliseconds:.2f} ms, {milliseconds / floor:.2f} x floor", flush=True)
    return results


def _extra_bytes(run: Callable[[], object], hidden: Tensor, weight: Tensor) -> int:
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - 2 * weight.nbytes
    hidden.grad = weight.grad = None
    return extra


def _contestants(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], object]]:
    def learn(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: loss().backward()

    def learn_heads(float8: bool) -> Callable[[], object]:
        def run() -> None:
            shared, float8_weight = SharedGradient(HEADS), Float8Weight() if float8 else None
            for _ in range(HEADS):
                hidden.grad = None
                linear_cross_entropy(hidden, weight, targets, shared_gradient=shared, float8_weight=float8_weight)[0].backward()

        return run

    bare, gradient = hidden.detach(), torch.randn(len(hidden), len(weight), device="cuda", dtype=torch.bfloat16)
    found = {
        "ours": learn(lambda: linear_cross_entropy(hidden, weight, targets)[0]),
        "ours, 2048 rows": learn(lambda: linear_cross_entropy(hidden, weight, targets, chunk_rows=2048)[0]),
        "ours, 8192 rows": learn(lambda: linear_cross_entropy(hidden, weight, targets, chunk_rows=8192)[0]),
        f"ours{OF_HEADS}": learn_heads(float8=False),
        "logits in memory, fp32": learn(lambda: F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")),
        "the three products alone": lambda: (bare @ weight.detach().T, gradient @ weight.detach(), gradient.T @ bare),
    }
    if torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY:
        found["ours, fp8"] = learn(lambda: linear_cross_entropy(hidden, weight, targets, float8_weight=Float8Weight())[0])
        found[f"ours, fp8{OF_HEADS}"] = learn_heads(float8=True)
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["liger-kernel"] = learn(lambda: liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum"))
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut-cross-entropy"] = learn(lambda: cut(hidden, weight, targets, reduction="sum"))
    return found

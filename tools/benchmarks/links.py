"""Latency and bandwidth of the collectives among real GPUs, and how well the emulated cluster tells their times from these two.

    torchrun --nproc-per-node 2 tools/benchmark.py links --output results

Latency is the time of the smallest collective, bandwidth what the largest reaches beyond it, of gathers and reductions alike: the
settings with which `overhead` emulates this machine.
"""

import dataclasses
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from benchmarks import output
from megamtp.cluster.emulated import Network
from megamtp.cluster.environment import find_place, join_peers
from megamtp.config import ClusterConfig
from megamtp.errors import InputError

KINDS = ("all_gather", "reduce_scatter", "all_reduce")
SIZES = [2**power for power in range(12, 31, 2)]  # bytes of the whole tensor
REPEATS = 10  # in a row, of which one's time is a tenth


def main(arguments: list[str]) -> None:
    """Raises InputError."""
    parser = output.parser(__doc__, "links")
    parser.add_argument("--rounds", type=output.positive, default=5, help=f"times of {REPEATS} collectives in a row [5]")
    options = parser.parse_args(arguments)
    place = find_place()
    if place.world_size == 1:
        raise InputError("one process; expected several ranks: start it with torchrun --nproc-per-node GPUS")
    output.start(options)
    join_peers(place, ClusterConfig())
    found = {kind: {size: _seconds(kind, size, options.rounds) for size in SIZES} for kind in KINDS}
    network = fit(found, place.world_size)
    results = [
        {"kind": kind, "bytes": size, "seconds": seconds, "predicted": network.seconds(kind, size)}
        for kind, by_size in found.items()
        for size, seconds in by_size.items()
    ]
    cluster = network.cluster
    settings = {"ranks": place.world_size, "latency": f"{cluster.latency:.3g}", "bandwidth": f"{cluster.flat_bandwidth:.4g}"}
    output.write(options, settings, results, _table(results), _draw(results))


def fit(found: dict[str, dict[int, float]], world_size: int) -> Network:
    """The flat network whose times of gathers and reductions are, in the mean, as found at both ends of the sizes."""
    kinds = KINDS[:2]
    latency = statistics.mean(found[kind][SIZES[0]] for kind in kinds)
    moved = SIZES[-1] * (world_size - 1) / world_size
    bandwidth = statistics.mean(moved / (found[kind][SIZES[-1]] - latency) for kind in kinds)
    return Network(dataclasses.replace(ClusterConfig(), emulate=world_size, latency=latency, flat_bandwidth=bandwidth))


def _seconds(kind: str, num_bytes: int, rounds: int) -> float:
    """Of one collective over a whole tensor of so many bytes, the median."""
    call = _collective(kind, num_bytes)
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        dist.barrier()
        start.record()
        for _ in range(REPEATS):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / REPEATS)
    return statistics.median(times)


def _collective(kind: str, num_bytes: int) -> Callable[[], object]:
    whole = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device="cuda")
    own = torch.zeros(len(whole) // dist.get_world_size(), dtype=whole.dtype, device="cuda")
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole[: len(own) * dist.get_world_size()], own)
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(own, whole[: len(own) * dist.get_world_size()])
    return lambda: dist.all_reduce(whole)


def _table(results: list[dict]) -> str:
    rows = [
        [
            result["kind"], f"{result['bytes']:,}", f"{1e6 * result['seconds']:.1f}", f"{1e6 * result['predicted']:.1f}",
            f"{result['predicted'] / result['seconds']:.2f}",
        ]
        for result in results
    ]  # fmt: skip
    return output.table(["collective", "bytes", "µs", "emulated, µs", "emulated / measured"], rows)


def _draw(results: list[dict]) -> Figure:
    picture, (axes,) = output.figure(7, 4.5)
    for place, kind in enumerate(KINDS):
        own = [result for result in results if result["kind"] == kind]
        sizes = [result["bytes"] for result in own]
        axes.plot(sizes, [1e6 * result["seconds"] for result in own], "o-", color=f"C{place}", label=kind)
        axes.plot(sizes, [1e6 * result["predicted"] for result in own], "--", color=f"C{place}", label=f"{kind}, emulated")
    axes.set(xscale="log", yscale="log", xlabel="bytes of the whole tensor", ylabel="µs")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return picture

"""Latency and bandwidth of the collectives among real GPUs, and how well the emulated cluster tells their times from
these two.

    torchrun --nproc-per-node 2 tools/benchmark.py links --output results

Latency is the time of the smallest gather or reduction, bandwidth what the largest gather reaches beyond it, efficiency
what other kinds reach of that: the settings with which `overhead` emulates this machine. Collectives wait in the
communication stream before the first of them starts, so that their times are the card's, and not those of the host that
starts them.
"""

import dataclasses
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from benchmarks import output
from benchmarks.device import find_device, record_time, seconds_between, synchronize
from megamtp.cluster.collectives import all_gather_single, reduce_scatter_single
from megamtp.cluster.emulated import hold, mark
from megamtp.cluster.environment import find_place
from megamtp.cluster.network import PASSES, Network
from megamtp.config import ClusterConfig, EfficiencyConfig
from megamtp.engines.deepspeed.join import join_peers
from megamtp.errors import InputError

KINDS = ("all_gather", "reduce_scatter", "all_reduce")
SIZES = [2**power for power in range(12, 31, 2)]  # bytes of the whole tensor
REPEATS = 10  # in a row, of which one's time is a tenth
SMOKE = {"sizes": [2**12, 2**18, 2**24], "rounds": 1}
HEAD_START = 5e-3  # seconds in which the host has started them all


def main(arguments: list[str]) -> None:
    """Raises InputError."""
    parser = output.parser(__doc__, "links")
    parser.add_argument(
        "--rounds", type=output.positive, default=5, help=f"times of {REPEATS} collectives in a row [5]"
    )
    parser.set_defaults(sizes=SIZES)
    options = output.parse(parser, arguments, SMOKE)
    place = find_place()
    if place.world_size == 1:
        raise InputError("one process; expected several ranks: start it with torchrun --nproc-per-node GPUS")
    output.start(options)
    join_peers(place, ClusterConfig())
    found = {kind: {size: _seconds(kind, size, options.rounds) for size in options.sizes} for kind in KINDS}
    network = fit(found, place.world_size)
    results = [
        {"kind": kind, "bytes": size, "seconds": seconds, "predicted": network.seconds(kind, size)}
        for kind, by_size in found.items()
        for size, seconds in by_size.items()
    ]
    cluster = network.cluster
    settings = {
        "ranks": place.world_size,
        "latency": f"{cluster.latency:.3g}",
        "bandwidth": f"{cluster.flat_bandwidth:.4g}",
        **{
            f"efficiency of {kind}": f"{share:.3f}"
            for kind, share in dataclasses.asdict(cluster.efficiency).items()
            if kind in found
        },
    }
    output.write(options, settings, results, tables(results), _draw(results))


def fit(found: dict[str, dict[int, float]], world_size: int) -> Network:
    """The flat network whose times are those found for the largest tensors, and in the mean for the smallest two."""
    smallest, *_, largest = found[KINDS[0]]
    latency = statistics.mean(found[kind][smallest] for kind in KINDS[:2])
    reached = {
        kind: PASSES[kind] * largest * (world_size - 1) / world_size / (times[largest] - latency)
        for kind, times in found.items()
    }
    bandwidth = reached[KINDS[0]]
    efficiency = EfficiencyConfig(**{kind: reached[kind] / bandwidth for kind in KINDS[1:]})
    cluster = dataclasses.replace(
        ClusterConfig(), emulate=world_size, latency=latency, flat_bandwidth=bandwidth, efficiency=efficiency
    )
    return Network(cluster)


def _seconds(kind: str, num_bytes: int, rounds: int) -> float:
    """Of one collective over a whole tensor of so many bytes, the median."""
    device = find_device()
    call = _collective(kind, num_bytes, device)
    for _ in range(3):
        call()
    times, barrier_end = [], torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(rounds):
        dist.barrier()
        if device.type == "cuda":
            hold(mark(barrier_end), HEAD_START, num_sms=1)
        start = record_time(device)
        for _ in range(REPEATS):
            call()
        end = record_time(device)
        synchronize(device)
        times.append(seconds_between(start, end) / REPEATS)
    return statistics.median(times)


def _collective(kind: str, num_bytes: int, device: torch.device) -> Callable[[], object]:
    whole = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device)
    own = torch.zeros(len(whole) // dist.get_world_size(), dtype=whole.dtype, device=device)
    if kind == "all_gather":
        return lambda: all_gather_single(whole[: len(own) * dist.get_world_size()], own)
    if kind == "reduce_scatter":
        return lambda: reduce_scatter_single(own, whole[: len(own) * dist.get_world_size()])
    return lambda: dist.all_reduce(whole)


def tables(results: list[dict]) -> str:
    rows = [
        [
            result["kind"],
            f"{result['bytes']:,}",
            f"{1e6 * result['seconds']:.1f}",
            f"{1e6 * result['predicted']:.1f}",
            f"{result['predicted'] / result['seconds']:.2f}",
        ]
        for result in results
    ]
    return output.table(["collective", "bytes", "µs", "emulated, µs", "emulated / measured"], rows)


def _draw(results: list[dict]) -> Figure:
    picture, (axes,) = output.figure(7, 4.5)
    for place, kind in enumerate(KINDS):
        own = [result for result in results if result["kind"] == kind]
        sizes = [result["bytes"] for result in own]
        axes.plot(sizes, [1e6 * result["seconds"] for result in own], "o-", color=f"C{place}", label=kind)
        axes.plot(
            sizes, [1e6 * result["predicted"] for result in own], "--", color=f"C{place}", label=f"{kind}, emulated"
        )
    axes.set(xscale="log", yscale="log", xlabel="bytes of the whole tensor", ylabel="µs")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return picture

"""Measures latency and bandwidth of collectives on real GPUs, and compares their times with the emulated cluster.

    torchrun --nproc-per-node 2 tools/benchmark.py links --output results

Latency is the mean time of the smallest all-gather and reduce-scatter. Bandwidth is that of the largest all-gather
after subtracting the latency. The efficiency of another collective is its bandwidth divided by that of the all-gather.
With these settings, `overhead` emulates this machine. All collectives of a round are queued before the first of them
starts, so the times do not include the launches on the host.
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
REPEATS = 10  # collectives in a row; the time of one is their time divided by REPEATS
SMOKE = {"sizes": [2**12, 2**18, 2**24], "rounds": 1}
QUEUE_SECONDS = 5e-3  # the device waits this long, in which time the host queues all collectives


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = output.parser(__doc__, "links")
    parser.add_argument(
        "--rounds", type=output.positive, default=5, help=f"measurements of {REPEATS} collectives in a row [5]"
    )
    parser.set_defaults(sizes=SIZES)
    options = output.parse(parser, arguments, SMOKE)
    place = find_place()
    if place.world_size == 1:
        raise InputError("one process; expected several ranks: start it with torchrun --nproc-per-node GPUS")
    output.require_gpu(options)
    output.make_folder(options)
    join_peers(place, ClusterConfig())
    seconds_of = {kind: {size: _seconds(kind, size, options.rounds) for size in options.sizes} for kind in KINDS}
    network = fit(seconds_of, place.world_size)
    results = [
        {"kind": kind, "bytes": size, "seconds": seconds, "predicted": network.seconds(kind, size)}
        for kind, by_size in seconds_of.items()
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
            if kind in seconds_of
        },
    }
    output.write(options, settings, results, tables(results), _draw(results))


def fit(seconds_of: dict[str, dict[int, float]], world_size: int) -> Network:
    """Returns a flat network that is fitted to the measured seconds.

    It reproduces the times of the largest tensors, and the mean time of the smallest all-gather and reduce-scatter.
    """
    smallest, *_, largest = seconds_of["all_gather"]
    latency = statistics.mean(seconds_of[kind][smallest] for kind in ("all_gather", "reduce_scatter"))
    bandwidths = {
        kind: PASSES[kind] * largest * (world_size - 1) / world_size / (times[largest] - latency)
        for kind, times in seconds_of.items()
    }
    bandwidth = bandwidths["all_gather"]
    efficiency = EfficiencyConfig(**{kind: bandwidths[kind] / bandwidth for kind in ("reduce_scatter", "all_reduce")})
    cluster = dataclasses.replace(
        ClusterConfig(), emulate=world_size, latency=latency, flat_bandwidth=bandwidth, efficiency=efficiency
    )
    return Network(cluster)


def _seconds(kind: str, num_bytes: int, rounds: int) -> float:
    """Returns the median seconds of one collective; the whole (unsharded) tensor has `num_bytes` bytes."""
    device = find_device()
    call = _collective(kind, num_bytes, device)
    for _ in range(3):
        call()
    times, hold_start = [], torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(rounds):
        dist.barrier()
        if device.type == "cuda":
            hold(mark(hold_start), QUEUE_SECONDS, num_sms=1)
        start = record_time(device)
        for _ in range(REPEATS):
            call()
        end = record_time(device)
        synchronize(device)
        times.append(seconds_between(start, end) / REPEATS)
    return statistics.median(times)


def _collective(kind: str, num_bytes: int, device: torch.device) -> Callable[[], object]:
    whole = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device)
    shard = torch.zeros(len(whole) // dist.get_world_size(), dtype=whole.dtype, device=device)
    if kind == "all_gather":
        return lambda: all_gather_single(whole[: len(shard) * dist.get_world_size()], shard)
    if kind == "reduce_scatter":
        return lambda: reduce_scatter_single(shard, whole[: len(shard) * dist.get_world_size()])
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
    return output.table(["collective", "bytes", "measured, µs", "emulated, µs", "emulated / measured"], rows)


def _draw(results: list[dict]) -> Figure:
    figure, (axes,) = output.figure(7, 4.5)
    for index, kind in enumerate(KINDS):
        kind_results = [result for result in results if result["kind"] == kind]
        sizes = [result["bytes"] for result in kind_results]
        axes.plot(sizes, [1e6 * result["seconds"] for result in kind_results], "o-", color=f"C{index}", label=kind)
        axes.plot(
            sizes,
            [1e6 * result["predicted"] for result in kind_results],
            "--",
            color=f"C{index}",
            label=f"{kind}, emulated",
        )
    axes.set(xscale="log", yscale="log", xlabel="bytes of the whole tensor", ylabel="µs")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure

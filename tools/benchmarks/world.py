"""Step time, forward and backward, against the number of ranks of the emulated cluster: what sharding costs the host.

    %(prog)s --output results

A process is a rank of one cluster only, so each number of ranks has a process of its own, in which the variants take
turns; rounds go through the numbers upwards and downwards by turns. DeepSpeed as shipped takes part at few numbers: it
needs seconds a step.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks import emulation, output, variants
from benchmarks.processes import Fresh
from megamtp.config import Config
from megamtp.errors import InputError

SHIPPED = "deepspeed as shipped"
SMOKE = emulation.SMOKE | {"size": "0.3b", "world_sizes": [2, 4], "shipped_at": [2], "rounds": 1}
WorldJob = tuple[Config, list[str]]  # of one number of ranks, and the variants to measure there


def main(arguments: list[str]) -> None:
    """Raises InputError."""
    parser = emulation.parser(__doc__, "world")
    parser.add_argument("--size", default="1.3b", choices=emulation.MICRO_BATCHES)
    parser.add_argument("--heads", type=output.positive, default=1, help="number of heads [1]")
    parser.add_argument(
        "--world-sizes",
        nargs="+",
        type=output.positive,
        default=[8, 16, 32, 64, 128, 256, 512, 1024],
        metavar="RANKS",
        help="ranks emulated, the first being what the others are divided by [8 16 32 64 128 256 512 1024]",
    )
    parser.add_argument(
        "--variants", nargs="+", default=["ours", "fsdp2 one backward", SHIPPED], choices=variants.NAMES
    )
    parser.add_argument(
        "--shipped-at", nargs="*", type=int, default=[8, 512], metavar="RANKS", help=f"where {SHIPPED} runs [8 512]"
    )
    parser.add_argument("--rounds", type=output.positive, default=2, help="turns of each number of ranks [2]")
    options = output.parse(parser, arguments, SMOKE)
    if (launched := emulation.num_ranks(1)) > 1:
        raise InputError(
            f"under a launcher of {launched} ranks; expected one process: the numbers of ranks are emulated"
        )
    jobs = []
    for world_size in options.world_sizes:
        names = [name for name in options.variants if name != SHIPPED or world_size in options.shipped_at]
        if not names:
            raise InputError(
                f"nothing to measure at {world_size} ranks; expected other --variants, or --shipped-at {world_size}"
            )
        jobs.append((emulation.config(options.size, options.heads, world_size, options), names))
    output.start(options)
    results = _measure(jobs, options)
    settings = {
        "size": options.size,
        "n": options.heads,
        **emulation.settings(jobs[0][0], options),
        "steps": options.rounds * options.steps,
    }
    output.write(options, settings, results, tables(results), _draw(results, options.size))


def _measure(jobs: list[WorldJob], options: argparse.Namespace) -> list[dict]:
    """The milliseconds of each variant's steps at each number of ranks, all rounds together."""
    found: dict[tuple[int | None, str], list[float]] = {
        (config.cluster.emulate, name): [] for config, names in jobs for name in names
    }
    upwards_and_downwards = [job for turn in range(options.rounds) for job in jobs[:: -1 if turn % 2 else 1]]
    for config, steps in _in_turn(upwards_and_downwards, options.steps):
        for name, milliseconds in steps.items():
            found[config.cluster.emulate, name] += milliseconds
    return [{"ranks": ranks, "variant": name, "milliseconds": steps} for (ranks, name), steps in found.items()]


def _in_turn(jobs: list[WorldJob], num_steps: int) -> Iterator[tuple[Config, dict[str, list[float]]]]:
    """Each job in a process of its own, which gets ready while the one before it measures."""
    waiting = Fresh(_steps, *jobs[0], num_steps)
    for place, (config, _) in enumerate(jobs, start=1):
        running = waiting
        if place < len(jobs):
            waiting = Fresh(_steps, *jobs[place], num_steps)
        start = time.perf_counter()
        yield config, running.result()
        print(f"{config.cluster.emulate} ranks: {time.perf_counter() - start:.0f} s in all", flush=True)


def _steps(config: Config, names: list[str], num_steps: int) -> dict[str, list[float]]:
    """Milliseconds of each variant's steps, as a rank of the configuration's cluster."""
    emulation.join(config)
    makers = {name: partial(variants.CLASSES[name], config) for name in names}
    found = variants.measure(makers, rounds=1, steps=num_steps)
    return {name: measured.milliseconds for name, measured in found.items()}


def _by_variant(results: list[dict]) -> dict[str, dict[int, list[float]]]:
    """{variant: {ranks: milliseconds}}."""
    return {
        name: {result["ranks"]: result["milliseconds"] for result in results if result["variant"] == name}
        for name in dict.fromkeys(result["variant"] for result in results)
    }


def _over_first(steps: dict[int, list[float]]) -> dict[int, float]:
    """Each median over that of the first number of ranks that was measured."""
    medians = {ranks: statistics.median(milliseconds) for ranks, milliseconds in steps.items()}
    first = next(iter(medians.values()))
    return {ranks: median / first for ranks, median in medians.items()}


def tables(results: list[dict]) -> str:
    columns = [(name, steps, _over_first(steps)) for name, steps in _by_variant(results).items()]
    header = ["ranks"] + [
        cell for name, steps, _ in columns for cell in (f"{name}, ms", f"over {next(iter(steps))} ranks")
    ]
    rows = []
    for ranks in dict.fromkeys(result["ranks"] for result in results):
        cells = [
            (output.spread(steps[ranks]), f"{ratios[ranks]:.3f}") if ranks in steps else ("-", "-")
            for _, steps, ratios in columns
        ]
        rows.append([str(ranks), *(part for cell in cells for part in cell)])
    return output.table(header, rows)


def _draw(results: list[dict], size: str) -> Figure:
    picture, (axes,) = output.figure(8, 4.5)
    for place, (name, steps) in enumerate(_by_variant(results).items()):
        ratios = _over_first(steps)
        last, ratio = list(ratios.items())[-1]
        label = f"{name}: {ratio:.3f} at {last} ranks"
        axes.plot(
            list(ratios.keys()), list(ratios.values()), marker="o", markersize=4, label=label, zorder=3 - 0.1 * place
        )
    ranks = sorted({result["ranks"] for result in results})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(
        xlabel="ranks", ylabel=f"step / step at {results[0]['ranks']} ranks", title=f"{size}, forward and backward"
    )
    axes.set_ylim(0.0, 1.1 * axes.dataLim.y1)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return picture

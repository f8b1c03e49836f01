"""Measures the step time for several numbers of emulated ranks, to show how the host's work for sharding grows.

    %(prog)s --output results

A process can be a rank of only one cluster, so each number of ranks is measured in a new process, which measures every
variant. Rounds go through the numbers of ranks in rising and falling order alternately. "deepspeed as shipped" is
megamtp with DeepSpeed's own gathers and reductions (engine.communication=deepspeed). It is measured for only a few
numbers of ranks, because its steps take seconds.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks import emulation, output, variants
from benchmarks.processes import ProcessCall
from benchmarks.variants import SHIPPED
from megamtp.config import Config
from megamtp.errors import InputError

SMOKE = emulation.SMOKE | {"size": "0.3b", "world_sizes": [2, 4], "shipped_at": [2], "rounds": 1}
Case = tuple[Config, list[str]]  # the configuration for a number of ranks, and the variants to measure


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = emulation.parser(__doc__, "world")
    parser.add_argument("--size", default="1.3b", choices=emulation.SIZES, help="model [1.3b]")
    parser.add_argument("--heads", type=output.positive, default=1, help="number of heads [1]")
    parser.add_argument(
        "--world-sizes",
        nargs="+",
        type=output.positive,
        default=[8, 16, 32, 64, 128, 256, 512, 1024],
        metavar="RANKS",
        help="numbers of emulated ranks; step times are divided by that of the first [8 16 ... 1024]",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["ours", "fsdp2 one backward", SHIPPED],
        choices=variants.CLASSES,
        help=f"what to measure [ours, fsdp2 one backward, {SHIPPED}]",
    )
    parser.add_argument(
        "--shipped-at",
        nargs="*",
        type=int,
        default=[8, 512],
        metavar="RANKS",
        help=f"numbers of ranks at which {SHIPPED} is measured [8 512]",
    )
    parser.add_argument("--rounds", type=output.positive, default=2, help="rounds over all numbers of ranks [2]")
    options = output.parse(parser, arguments, SMOKE)
    if (num_launched_ranks := emulation.num_ranks(1)) > 1:
        raise InputError(
            f"under a launcher of {num_launched_ranks} ranks; expected one process: the numbers of ranks are emulated"
        )
    cases = []
    for world_size in options.world_sizes:
        names = [name for name in options.variants if name != SHIPPED or world_size in options.shipped_at]
        if not names:
            raise InputError(
                f"nothing to measure at {world_size} ranks; expected other --variants, or --shipped-at {world_size}"
            )
        cases.append((emulation.config(options.size, options.heads, world_size, options), names))
    output.require_gpu(options)
    output.make_folder(options)
    results = _measure(cases, options)
    settings = {
        "size": options.size,
        "n": options.heads,
        **emulation.settings(cases[0][0], options),
        "steps": options.rounds * options.steps,
    }
    output.write(options, settings, results, tables(results), _draw(results, options.size))


def _measure(cases: list[Case], options: argparse.Namespace) -> list[dict]:
    """Returns the milliseconds of the steps of each variant at each number of ranks, over all rounds."""
    milliseconds_of: dict[tuple[int | None, str], list[float]] = {
        (config.cluster.emulate, name): [] for config, names in cases for name in names
    }
    cases_of_all_rounds = [case for index in range(options.rounds) for case in cases[:: -1 if index % 2 else 1]]
    for config, steps in _run_cases(cases_of_all_rounds, options.steps):
        for name, milliseconds in steps.items():
            milliseconds_of[config.cluster.emulate, name] += milliseconds
    return [
        {"ranks": ranks, "variant": name, "milliseconds": steps} for (ranks, name), steps in milliseconds_of.items()
    ]


def _run_cases(cases: list[Case], num_steps: int) -> Iterator[tuple[Config, dict[str, list[float]]]]:
    """Measures each case in a new process, which starts while the previous process measures."""
    next_process = ProcessCall(_measure_steps, *cases[0], num_steps)
    for index, (config, _) in enumerate(cases, start=1):
        process = next_process
        if index < len(cases):
            next_process = ProcessCall(_measure_steps, *cases[index], num_steps)
        start = time.perf_counter()
        yield config, process.run()
        print(f"{config.cluster.emulate} ranks: {time.perf_counter() - start:.0f} s in all", flush=True)


def _measure_steps(config: Config, names: list[str], num_steps: int) -> dict[str, list[float]]:
    """Returns the milliseconds of the steps of each variant, measured as a rank of the configured cluster."""
    emulation.join(config)
    makers = {name: partial(variants.CLASSES[name], config) for name in names}
    measurements = variants.measure(makers, rounds=1, steps=num_steps)
    return {name: measurement.milliseconds for name, measurement in measurements.items()}


def _by_variant(results: list[dict]) -> dict[str, dict[int, list[float]]]:
    """Returns {variant: {ranks: milliseconds}}."""
    return {
        name: {result["ranks"]: result["milliseconds"] for result in results if result["variant"] == name}
        for name in dict.fromkeys(result["variant"] for result in results)
    }


def _relative_to_first(steps: dict[int, list[float]]) -> dict[int, float]:
    """Returns each median divided by the median at the first measured number of ranks."""
    medians = {ranks: statistics.median(milliseconds) for ranks, milliseconds in steps.items()}
    first = next(iter(medians.values()))
    return {ranks: median / first for ranks, median in medians.items()}


def tables(results: list[dict]) -> str:
    columns = [(name, steps, _relative_to_first(steps)) for name, steps in _by_variant(results).items()]
    header = ["ranks"] + [
        cell for name, steps, _ in columns for cell in (f"{name}, ms", f"step / step at {next(iter(steps))} ranks")
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
    figure, (axes,) = output.figure(8, 4.5)
    for index, (name, steps) in enumerate(_by_variant(results).items()):
        ratios = _relative_to_first(steps)
        last, ratio = list(ratios.items())[-1]
        label = f"{name}: {ratio:.3f} at {last} ranks"
        axes.plot(
            list(ratios.keys()), list(ratios.values()), marker="o", markersize=4, label=label, zorder=3 - 0.1 * index
        )
    ranks = sorted({result["ranks"] for result in results})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(
        xlabel="ranks",
        ylabel=f"step time / step time at {results[0]['ranks']} ranks",
        title=f"{size}, forward and backward",
    )
    axes.set_ylim(0.0, 1.1 * axes.dataLim.y1)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure

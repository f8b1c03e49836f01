"""Exposed communication of one step, read from a profiler's trace: with prefetch as configured, and with none; and a
plain step.

    %(prog)s --size 6.7b --heads 4 --output results

Exposed is the time in which a transfer is under way and nothing computes. The exit status is 1 if its share of the head
phase is above the limit. Without prefetch it should be: a check that cannot fail shows nothing. "plain" has neither
engine nor communication: what a hosted step takes longer is exposed, or idle, or its kernels take longer for what runs
beside them.
"""

import sys
from functools import partial

from matplotlib.figure import Figure

from benchmarks import emulation, output, variants
from benchmarks.exposure import LONG, Trace, union

CONFIGURED, NONE, PLAIN = "prefetch as configured", "no prefetch", "plain"
UNSEEN = 0.1  # milliseconds between kernels that no picture can show, but that would make it paler
SMOKE = emulation.SMOKE | {"size": "0.3b", "heads": 2, "world_size": 2, "limit": 100.0}
COLORS = {"head phase": "0.9", "computing": "tab:blue", "communicating": "tab:green", "exposed": "tab:red"}


def main(arguments: list[str]) -> None:
    """Raises InputError."""
    parser = emulation.parser(__doc__, "trace")
    parser.add_argument("--size", default="6.7b", choices=emulation.MICRO_BATCHES)
    parser.add_argument("--heads", type=output.positive, default=4, help="number of heads [4]")
    parser.add_argument("--world-size", type=output.positive, default=64, help="ranks emulated [64]")
    parser.add_argument(
        "--limit", type=float, default=3.0, metavar="PERCENT", help="largest exposed share of the head phase [3]"
    )
    options = output.parse(parser, arguments, SMOKE)
    settings_of = {CONFIGURED: [], NONE: ["engine.prefetch_modules=0"], PLAIN: []}
    configs = {
        name: emulation.config(options.size, options.heads, emulation.num_ranks(options.world_size), options, *settings)
        for name, settings in settings_of.items()
    }
    output.start(options, smoke_on_cpu=False)  # a CPU has no streams to trace
    emulation.join(configs[CONFIGURED])
    makers = {
        name: partial(variants.Plain if name == PLAIN else variants.Ours, config) for name, config in configs.items()
    }
    found, traces = variants.measure(makers, rounds=1, steps=options.steps), variants.traces(makers)
    results = [
        {
            "variant": name,
            "prefetch_modules": None if name == PLAIN else configs[name].engine.prefetch_modules,
            "milliseconds": found[name].milliseconds,
            "exposure": trace.exposures(),
            **({} if name == PLAIN else {"limit_percent": options.limit}),
        }
        for name, trace in traces.items()
    ]
    settings = {
        "size": options.size,
        "n": options.heads,
        "ranks": emulation.num_ranks(options.world_size),
        **emulation.settings(configs[CONFIGURED], options),
        "prefetch_modules": configs[CONFIGURED].engine.prefetch_modules,
    }
    hosted = {name: trace for name, trace in traces.items() if name != PLAIN}
    output.write(options, settings, results, tables(results), _draw(hosted))
    if 100 * hosted[CONFIGURED].exposure("heads").share > options.limit:
        sys.exit(1)


def tables(results: list[dict]) -> str:
    return "\n\n".join([_table(results), *(_verdict(result) for result in results if "limit_percent" in result)])


def _verdict(result: dict) -> str:
    heads, limit = result["exposure"]["heads"], result["limit_percent"]
    percent = 100 * heads["exposed"] / heads["total"]
    holds = "holds" if percent <= limit else "FAILS"
    return f"{result['variant']}: head phase: exposed {percent:.2f} % <= {limit:g} %: {holds}"


def _table(results: list[dict]) -> str:
    header = [
        "variant",
        "part",
        "total, ms",
        "computing, ms",
        "transferring, ms",
        "exposed, ms",
        f"in pieces >= {LONG} ms",
    ]
    header += ["while copying, ms", "exposed share", "idle, ms", "unprofiled, ms"]
    rows = []
    for result in results:
        for part, found in result["exposure"].items():
            rows.append(
                [
                    result["variant"],
                    {"heads": "head phase"}.get(part, part),
                    f"{found['total']:.1f}",
                    f"{found['computing']:.1f}",
                    f"{found['transferring']:.1f}",
                    f"{found['exposed']:.2f}",
                    f"{found['exposed_long']:.2f}",
                    f"{found['exposed_moving']:.2f}",
                    f"{found['exposed'] / found['total']:.2%}",
                    f"{found['idle']:.2f}",
                    output.spread(result["milliseconds"]) if part == "step" else "-",
                ]
            )
    return output.table(header, rows)


def _draw(traces: dict[str, Trace]) -> Figure:
    """One step a panel: when it computed, and when it communicated."""
    picture, panels = output.figure(12, 4.5, rows=len(traces), sharex=True)
    for axes, (name, trace) in zip(panels, traces.items(), strict=True):
        computing = union([(start, end + UNSEEN) for start, end in trace.computing])
        shown = {
            "head phase": (trace.parts["heads"], (-0.1, 2.0)),
            "computing": (computing, (1, 0.8)),
            "communicating": (trace.transfers, (0, 0.8)),
            "exposed": (trace.exposed, (0, 0.8)),
        }
        [(beginning, _)] = trace.parts["step"]
        for label, (intervals, lane) in shown.items():
            bars = [(start - beginning, end - start) for start, end in intervals]
            axes.broken_barh(bars, lane, facecolor=COLORS[label], linewidth=0, snap=False, label=label)
        axes.set_yticks([0.4, 1.4], ["communication", "compute"])
        axes.set_title(
            f"{name}: {trace.exposure('heads').share:.1%} of the head phase exposed", loc="left", fontsize="medium"
        )
        axes.margins(x=0.01, y=0)
    panels[-1].set_xlabel("milliseconds of one step, forward and backward")
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(COLORS), frameon=False)
    return picture

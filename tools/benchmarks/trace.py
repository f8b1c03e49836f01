"""Measures the exposed communication of a step from a profiler's trace, with and without prefetch.

    %(prog)s --size 6.7b --heads 4 --output results

Communication is exposed while a transfer is in flight and nothing computes. The exit status is 1 if its share of the
head phase is above the limit. The step without prefetch should exceed the limit, which shows that the check can fail.
"plain" is a bare single-GPU step, without engine and communication. A hosted step is longer than "plain" because of
exposed or idle time, or because its kernels are slowed by kernels that run at the same time.
"""

import sys
from functools import partial

from matplotlib.figure import Figure

from benchmarks import emulation, output, variants
from benchmarks.exposure import LONG_MILLISECONDS, Trace, union

CONFIGURED, NO_PREFETCH, PLAIN = "prefetch as configured", "no prefetch", "plain"
MIN_GAP_MILLISECONDS = 0.1  # shorter gaps between kernels are not drawn: they would only make the bars paler
SMOKE = emulation.SMOKE | {"size": "0.3b", "heads": 2, "world_size": 2, "limit": 100.0}
COLORS = {"head phase": "0.9", "computing": "tab:blue", "communicating": "tab:green", "exposed": "tab:red"}


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = emulation.parser(__doc__, "trace")
    parser.add_argument("--size", default="6.7b", choices=emulation.SIZES, help="model [6.7b]")
    parser.add_argument("--heads", type=output.positive, default=4, help="number of heads [4]")
    parser.add_argument("--world-size", type=output.positive, default=64, help="emulated ranks [64]")
    parser.add_argument(
        "--limit",
        type=float,
        default=3.0,
        metavar="PERCENT",
        help="largest allowed exposed share of the head phase [3]",
    )
    options = output.parse(parser, arguments, SMOKE)
    overrides_of = {CONFIGURED: [], NO_PREFETCH: ["engine.prefetch_modules=0"], PLAIN: []}
    configs = {
        name: emulation.config(
            options.size, options.heads, emulation.num_ranks(options.world_size), options, *overrides
        )
        for name, overrides in overrides_of.items()
    }
    output.require_gpu(options, smoke_on_cpu=False)  # a CPU has no streams to trace
    output.make_folder(options)
    emulation.join(configs[CONFIGURED])
    makers = {
        name: partial(variants.Plain if name == PLAIN else variants.Ours, config) for name, config in configs.items()
    }
    measurements, traces = variants.measure(makers, rounds=1, steps=options.steps), variants.traces(makers)
    results = [
        {
            "variant": name,
            "prefetch_modules": None if name == PLAIN else configs[name].engine.prefetch_modules,
            "milliseconds": measurements[name].milliseconds,
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
    if 100 * hosted[CONFIGURED].exposure("heads").exposed_share > options.limit:
        sys.exit(1)


def tables(results: list[dict]) -> str:
    return "\n\n".join([_table(results), *(_verdict(result) for result in results if "limit_percent" in result)])


def _verdict(result: dict) -> str:
    heads, limit = result["exposure"]["heads"], result["limit_percent"]
    percent = 100 * heads["exposed"] / heads["total"]
    is_within = percent <= limit
    if result["variant"] == NO_PREFETCH:  # the control, which shows that the check can fail
        sign, word = ("<=", "the limit is too high to detect missing prefetch") if is_within else (">", "as expected")
        return f"{NO_PREFETCH} (control): head phase: exposed {percent:.2f} % {sign} {limit:g} %: {word}"
    word = output.holds_or_fails(is_within)
    return f"{result['variant']}: head phase: exposed {percent:.2f} % <= {limit:g} %: {word}"


def _table(results: list[dict]) -> str:
    header = [
        "variant",
        "part",
        "total, ms",
        "computing, ms",
        "transferring, ms",
        "exposed, ms",
        f"exposed in pieces >= {LONG_MILLISECONDS} ms",
    ]
    header += ["exposed while copying, ms", "exposed share", "idle, ms", "unprofiled, ms"]
    rows = []
    for result in results:
        for part, exposure in result["exposure"].items():
            rows.append(
                [
                    result["variant"],
                    "head phase" if part == "heads" else part,
                    f"{exposure['total']:.1f}",
                    f"{exposure['computing']:.1f}",
                    f"{exposure['transferring']:.1f}",
                    f"{exposure['exposed']:.2f}",
                    f"{exposure['exposed_long']:.2f}",
                    f"{exposure['exposed_moving']:.2f}",
                    f"{exposure['exposed'] / exposure['total']:.2%}",
                    f"{exposure['idle']:.2f}",
                    output.spread(result["milliseconds"]) if part == "step" else "-",
                ]
            )
    return output.table(header, rows)


def _draw(traces: dict[str, Trace]) -> Figure:
    """Draws one panel for each step, with the intervals of computation and communication."""
    figure, panels = output.figure(12, 4.5, rows=len(traces), sharex=True)
    for axes, (name, trace) in zip(panels, traces.items(), strict=True):
        computing = union([(start, end + MIN_GAP_MILLISECONDS) for start, end in trace.computing])
        shown = {
            "head phase": (trace.parts["heads"], (-0.1, 2.0)),
            "computing": (computing, (1, 0.8)),
            "communicating": (trace.transfers, (0, 0.8)),
            "exposed": (trace.exposed, (0, 0.8)),
        }
        [(step_start, _)] = trace.parts["step"]
        for label, (intervals, row) in shown.items():
            bars = [(start - step_start, end - start) for start, end in intervals]
            axes.broken_barh(bars, row, facecolor=COLORS[label], linewidth=0, snap=False, label=label)
        axes.set_yticks([0.4, 1.4], ["communication", "compute"])
        axes.set_title(
            f"{name}: {trace.exposure('heads').exposed_share:.1%} of the head phase exposed",
            loc="left",
            fontsize="medium",
        )
        axes.margins(x=0.01, y=0)
    panels[-1].set_xlabel("milliseconds in one step, forward and backward")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(COLORS), frameon=False)
    return figure

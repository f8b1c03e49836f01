"""Compares step times of the emulated cluster with those of real ranks. Both were measured with `overhead`.

    torchrun --nproc-per-node 2 tools/benchmark.py overhead --sizes 1.3b --rebuild --name overhead_nccl --output results
    python tools/benchmark.py overhead --sizes 1.3b --world-size 2 ... --name overhead_nccl_emulated --output results
    %(prog)s --measured results/overhead_nccl.json --emulated results/overhead_nccl_emulated.json

For the emulated run, set what `links` measured: --bandwidth, --set cluster.latency=... cluster.efficiency={...}. This
benchmark needs no GPU.
"""

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import output
from megamtp.errors import InputError

MAX_ERROR = 0.1
RESULTS = Path(__file__).parents[1] / "results"
SMOKE = {"measured": RESULTS / "overhead_nccl.json", "emulated": RESULTS / "overhead_nccl_emulated.json"}
Cells = dict[tuple[str, int, str], list[float]]  # milliseconds by (size, heads, variant)


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = output.parser(__doc__, "prediction")
    parser.add_argument(
        "--measured", type=Path, required=True, metavar="JSON", help="result file of `overhead` on real ranks"
    )
    parser.add_argument(
        "--emulated", type=Path, required=True, metavar="JSON", help="result file of `overhead` on one GPU"
    )
    options = output.parse(parser, arguments, SMOKE)
    (real_settings, real), (emulated_settings, emulated) = read(options.measured), read(options.emulated)
    if real_settings["ranks"] != emulated_settings["ranks"] or real.keys() != emulated.keys():
        raise InputError(
            f"{options.emulated} has other sizes, heads, variants or ranks than {options.measured}; expected the same"
        )
    output.make_folder(options)
    results = [
        {
            "size": size,
            "heads": heads,
            "variant": variant,
            "measured": milliseconds,
            "emulated": emulated[size, heads, variant],
        }
        for (size, heads, variant), milliseconds in real.items()
    ]
    settings = {
        "ranks": real_settings["ranks"],
        "card": real_settings["card"],
        "measured": real_settings["date"],
        "emulated": emulated_settings["date"],
    }
    output.write(options, settings, results, tables(results), _draw(results))


def read(path: Path) -> tuple[dict, Cells]:
    """Returns (settings and circumstances, milliseconds of each cell). Raises InputError."""
    try:
        content = json.loads(path.read_text())
        cells = {
            (result["size"], result["heads"], result["variant"]): result["milliseconds"]
            for result in content["results"]
        }
        return content["settings"] | content["circumstances"], cells
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}); expected the JSON file of `overhead`") from None


def ratio(result: dict) -> float:
    """Returns the emulated divided by the measured step time."""
    return statistics.median(result["emulated"]) / statistics.median(result["measured"])


def tables(results: list[dict]) -> str:
    return f"{_table(results)}\n\n{_verdict(results)}"


def _table(results: list[dict]) -> str:
    rows = [
        [
            result["size"],
            str(result["heads"]),
            result["variant"],
            output.spread(result["measured"]),
            output.spread(result["emulated"]),
            f"{ratio(result):.3f}",
        ]
        for result in results
    ]
    return output.table(["size", "n", "variant", "real ranks, ms", "emulated, ms", "emulated / real"], rows)


def _verdict(results: list[dict]) -> str:
    errors = [abs(ratio(result) - 1) for result in results]
    within = sum(error <= MAX_ERROR for error in errors)
    word = output.holds_or_fails(within == len(errors))
    return (
        f"error of the emulated step <= {MAX_ERROR:.0%}: in {within} of {len(errors)} rows; largest error "
        f"{max(errors):.1%}: {word}"
    )


def _draw(results: list[dict]) -> Figure:
    groups = [f"{result['size']}, n={result['heads']}\n{result['variant']}" for result in results]
    figure, (axes,) = output.figure(2 + 1.2 * len(groups), 4.5)
    heights = {
        name: {group: statistics.median(result[key]) for group, result in zip(groups, results, strict=True)}
        for name, key in (("real ranks", "measured"), ("emulated", "emulated"))
    }
    output.bars(axes, groups, heights)
    axes.tick_params("x", labelsize=6)
    axes.set_ylabel("ms per step, forward and backward")
    axes.legend(frameon=False)
    return figure

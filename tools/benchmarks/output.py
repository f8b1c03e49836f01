"""Options and output that all benchmarks share: a printed Markdown table, all numbers in NAME.json, a plot in NAME.png.

A benchmark's module has a function `tables(results)`, which makes its Markdown from the results in NAME.json:
`write` prints it, and benchmarks/results.py writes it to tools/results/README.md.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megamtp.cluster.environment import find_place
from megamtp.commands.command_line import Parser
from megamtp.errors import InputError


def positive(text: str) -> int:
    """Returns the value of an option that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number, 1 or more")
    return int(text)


def parser(description: str, name: str) -> Parser:
    """Returns a parser with the options that all benchmarks share."""
    new_parser = Parser(description)
    new_parser.prog += f" {name}"
    new_parser.add_argument("--output", type=Path, help="folder for the files [results; with --smoke: a new folder]")
    new_parser.add_argument("--name", default=name, help=f"name of the files, with .json and .png [{name}]")
    new_parser.add_argument(
        "--smoke",
        action="store_true",
        help="run at a tiny size, to check that the benchmark works: its measurements mean nothing",
    )
    return new_parser


def parse(parser: Parser, arguments: list[str], smoke: dict[str, Any]) -> argparse.Namespace:
    """Reads the options of a benchmark; --smoke replaces their defaults with the values in `smoke`.

    With --smoke, an option in `smoke` is not required. A relative path in it is relative to the folder of --output,
    which is a new temporary folder by default, so that a smoke run does not write next to real results.
    """
    # The first pass only reads --smoke and --output, which decide the defaults and which options are required.
    required = [action for action in parser._actions if action.required]
    for action in required:
        action.required = False
    options = parser.parse_args(arguments)
    output = options.output or (_temporary_folder() if options.smoke else Path("results"))
    parser.set_defaults(output=output)
    if options.smoke:
        parser.set_defaults(
            **{name: output / value if isinstance(value, Path) else value for name, value in smoke.items()}
        )
    for action in required:
        action.required = not (options.smoke and action.dest in smoke)
    return parser.parse_args(arguments)


def _temporary_folder() -> Path:
    """Returns a new folder on the first rank; the other ranks write nothing."""
    return Path(tempfile.mkdtemp(prefix="megamtp_smoke_") if find_place().rank == 0 else tempfile.gettempdir())


def require_gpu(options: argparse.Namespace, smoke_on_cpu: bool = True) -> None:
    """Raises InputError if there is no GPU. With `smoke_on_cpu`, a smoke run needs no GPU."""
    if not torch.cuda.is_available() and not (options.smoke and smoke_on_cpu):
        raise InputError("no GPU; expected one: benchmarks measure a GPU's time")


def make_folder(options: argparse.Namespace) -> None:
    """Makes the output folder. Call it before the first measurement. Raises InputError if it fails."""
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {options.output}: {error.strerror}; expected a folder to write to") from None


def find_circumstances() -> dict[str, str]:
    """Returns the card, the version of torch, the date and the command."""
    cpu = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    ranks = find_place().world_size
    launcher = ["python"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks)]
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join([*launcher, "tools/benchmark.py", *sys.argv[1:]]),
    }


def say(line: str) -> None:
    """Prints a line at once, on the first rank only."""
    if find_place().rank == 0:
        print(line, flush=True)


def spread(values: list[float], digits: int = 1) -> str:
    """Formats the median, the minimum and the maximum."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def holds_or_fails(holds: bool) -> str:
    """Returns the last word of a verdict."""
    return "holds" if holds else "FAILS"


def heading(circumstances: dict[str, str], settings: dict) -> str:
    """Returns one line with the card, the date and the settings of a measurement."""
    shown = (f"{name} {_with_unit(name, value)}" for name, value in settings.items())
    card, torch_version, date = (circumstances[name] for name in ("card", "torch", "date"))
    return f"{card}, torch {torch_version}, {date}; {', '.join(shown)}"


def _with_unit(name: str, value: object) -> object:
    """Converts bandwidths from bytes/s to GB/s and the latency from s to µs; leaves other settings unchanged."""
    if value == "null":  # the bandwidth inside nodes differs from that between nodes
        return value
    if name in ("bandwidth", "in nodes", "between nodes"):
        return f"{float(str(value)) / 1e9:g} GB/s"
    return f"{float(str(value)) * 1e6:g} µs" if name == "latency" else value


def write(options: argparse.Namespace, settings: dict, results: list[dict], markdown: str, figure: Figure) -> None:
    """Prints `markdown` with its circumstances, and writes the JSON file and the plot, on the first rank only."""
    if find_place().rank > 0:
        return
    circumstances = find_circumstances()
    content: dict[str, object] = {"circumstances": circumstances, "settings": settings, "results": results}
    if options.smoke:
        content["smoke"] = True
        print(f"A smoke run: these numbers mean nothing. Its files are in {options.output}.\n")
    stem = options.output / options.name
    Path(f"{stem}.json").write_text(json.dumps(content, indent=1))
    figure.savefig(f"{stem}.png")
    print(f"{heading(circumstances, settings)}\n\n{markdown}\n\n`{circumstances['command']}`\n", flush=True)


def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its axes, which have no top and right spines."""
    new_figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    all_axes = new_figure.subplots(rows, columns, squeeze=False, sharex=sharex).flatten().tolist()
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    return new_figure, all_axes


def bars(axes: Axes, groups: list[str], heights: dict[str, dict[str, float]]) -> None:
    """Draws a group of bars for each of `groups`.

    Args:
        heights: {label: {group: height}}; a label may lack some groups.
    """
    width = 0.8 / len(heights)
    axes.set_prop_cycle(color=matplotlib.color_sequences["tab20"])  # as many colours as there may be labels
    for index, (label, by_group) in enumerate(heights.items()):
        indices = [i for i, group in enumerate(groups) if group in by_group]
        centers = [i + (index - (len(heights) - 1) / 2) * width for i in indices]
        drawn = axes.bar(centers, [by_group[groups[i]] for i in indices], width * 0.95, label=label)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    axes.set_xticks(range(len(groups)), groups)

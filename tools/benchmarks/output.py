"""Every benchmark prints a Markdown table and writes every number to NAME.json and a picture to NAME.png.

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
    """An option's whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number, 1 or more")
    return int(text)


def parser(description: str, name: str) -> Parser:
    """With the options of every benchmark."""
    parser = Parser(description)
    parser.prog += f" {name}"
    parser.add_argument("--output", type=Path, help="folder for the files [results; with --smoke: a new one]")
    parser.add_argument("--name", default=name, help=f"name of the files, with .json and .png [{name}]")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="run at a tiny size, to see that the benchmark works: what is measured means nothing",
    )
    return parser


def parse(parser: Parser, arguments: list[str], smoke: dict[str, Any]) -> argparse.Namespace:
    """Reads the options of a benchmark; --smoke replaces their defaults by the values in `smoke`.

    An option in `smoke` is not required then. A relative path in it becomes one below the folder of --output, which is
    a new temporary folder by default: nothing of a smoke run is written beside real results.
    """
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
    """A new folder on the first rank; the other ranks write nothing."""
    return Path(tempfile.mkdtemp(prefix="megamtp_smoke_") if find_place().rank == 0 else tempfile.gettempdir())


def start(options: argparse.Namespace, on_gpu: bool = True, smoke_on_cpu: bool = True) -> None:
    """Before the first measurement. Raises InputError: no GPU, though it is measured, or nowhere to write.

    Args:
        smoke_on_cpu: a smoke run may take the CPU where there is no GPU.
    """
    if on_gpu and not torch.cuda.is_available() and not (options.smoke and smoke_on_cpu):
        raise InputError("no GPU; expected one: benchmarks measure a GPU's time")
    make_folder(options)


def make_folder(options: argparse.Namespace) -> None:
    """Raises InputError: nowhere to write."""
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {options.output}: {error.strerror}; expected a folder to write to") from None


def circumstances() -> dict[str, str]:
    """Where, when and how: card, versions, date, command."""
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
    """Prints what is measured as it comes, on the first rank."""
    if find_place().rank == 0:
        print(line, flush=True)


def spread(values: list[float], digits: int = 1) -> str:
    """Median, least and largest."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def heading(where: dict[str, str], settings: dict) -> str:
    """One line that says on what, when and with which settings something was measured."""
    shown = (f"{name} {_with_unit(name, value)}" for name, value in settings.items())
    return f"{where['card']}, torch {where['torch']}, {where['date']}; {', '.join(shown)}"


def _with_unit(name: str, value: object) -> object:
    """A network's speed in GB/s and its latency in µs; they are kept in bytes/s and s."""
    if value == "null":  # a bandwidth that differs inside and between nodes
        return value
    if name in ("bandwidth", "in nodes", "between nodes"):
        return f"{float(str(value)) / 1e9:g} GB/s"
    return f"{float(str(value)) * 1e6:g} µs" if name == "latency" else value


def write(options: argparse.Namespace, settings: dict, results: list[dict], shown: str, picture: Figure) -> None:
    """Prints `shown` under its circumstances and settings, and writes both files; of several ranks, the first does."""
    if find_place().rank > 0:
        return
    where = circumstances()
    content: dict[str, object] = {"circumstances": where, "settings": settings, "results": results}
    if options.smoke:
        content["smoke"] = True
        print(f"A smoke run: these numbers mean nothing. Its files are in {options.output}.\n")
    stem = options.output / options.name
    Path(f"{stem}.json").write_text(json.dumps(content, indent=1))
    picture.savefig(f"{stem}.png")
    print(f"{heading(where, settings)}\n\n{shown}\n\n`{where['command']}`\n", flush=True)


def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A picture of some diagrams without lines above and to the right of them."""
    picture = Figure(figsize=(width, height), dpi=130, layout="constrained")
    diagrams = picture.subplots(rows, columns, squeeze=False, sharex=sharex).flatten().tolist()
    for axes in diagrams:
        axes.spines[["top", "right"]].set_visible(False)
    return picture, diagrams


def bars(axes: Axes, groups: list[str], heights: dict[str, dict[str, float]]) -> None:
    """A group of bars for each of `groups`; `heights[label]` has those of one label, which may be absent from some
    groups.
    """
    width = 0.8 / len(heights)
    axes.set_prop_cycle(color=matplotlib.color_sequences["tab20"])  # as many colours as there may be labels
    for index, (label, found) in enumerate(heights.items()):
        places = [place for place, group in enumerate(groups) if group in found]
        left = [place + (index - (len(heights) - 1) / 2) * width for place in places]
        drawn = axes.bar(left, [found[groups[place]] for place in places], width * 0.95, label=label)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    axes.set_xticks(range(len(groups)), groups)

"""Writes tools/results/README.md from the JSON files in its folder, so that no measured number is typed by hand.

    %(prog)s

Each file becomes a section with machine, settings, command, tables and plot. A file may have a "note" for readers,
added by hand after the measurement. paper.json has the numbers of the paper.
"""

import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

from benchmarks import output, summary
from benchmarks.command import BENCHMARKS
from megamtp.commands.command_line import Parser
from megamtp.errors import InputError

FOLDER = Path(__file__).parents[1] / "results"
PAPER = "paper"
SUMMARY = "What four heads cost"
# card: result files of `overhead` that together have all sizes
SUMMARIES = {"H100": ("overhead", "overhead_13b"), "H200": ("overhead_h200", "overhead_h200_13b")}
INTRODUCTION = """\
# Measurements

<!-- Written by `python tools/benchmark.py results` from the JSON files in this folder: change those, not this file. -->

Each section names the machine, the versions, the date, the settings and the command that repeats the measurement.
Times such as 100.0 [98.0, 103.0] are median, minimum and maximum. "ours" is megamtp. "plain" is a bare single-GPU step
of the same model, without engine and communication. The hosting overhead of a variant is its n = 1 step time divided by
that of "plain". n is the number of heads, T the number of positions of a window, V the size of the vocabulary, d the
width of the model.
"""


def main(arguments: list[str]) -> None:
    """Writes the page and prints its path. Raises InputError."""
    parser = Parser(__doc__)
    parser.prog += " results"
    parser.parse_args(arguments)
    path = FOLDER / "README.md"
    path.write_text(page(FOLDER))
    print(path)


def page(folder: Path) -> str:
    """Returns the Markdown page of a folder's results.

    Raises:
        InputError: a file was written by a smoke run, or not by a benchmark.
    """
    contents = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for stem, content in contents.items():
        if content.get("smoke"):
            raise InputError(f"{stem}.json was written by a smoke run; expected measurements: remove it")
    paper = contents.pop(PAPER)
    stems = {name: [stem for stem in contents if _benchmark(stem, contents[stem]) == name] for name in BENCHMARKS}
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in BENCHMARKS if stems[name]}
    table_of_contents = [f"- {_link(SUMMARY)}"]
    sections = [_summary(contents, paper)]
    for name, module in modules.items():
        files = [f"{stem}.json" for stem in stems[name]]
        table_of_contents.append(f"- {_link(name)}: {_first_paragraph(module)} {', '.join(map(_link, files))}")
        sections += [
            f"## {name}",
            _first_paragraph(module),
            *(_section(folder, s, contents[s], module) for s in stems[name]),
        ]
    return "\n\n".join([INTRODUCTION + "\n" + "\n".join(table_of_contents), *sections]) + "\n"


def _benchmark(stem: str, content: dict) -> str:
    """Returns the name of the benchmark that wrote a file. Raises InputError if no benchmark did."""
    words = shlex.split(content["circumstances"]["command"])
    name = words[words.index("tools/benchmark.py") + 1] if "tools/benchmark.py" in words else ""
    if name not in BENCHMARKS:
        raise InputError(f"{stem}.json: its command is {shlex.join(words)}; expected one of tools/benchmark.py")
    return name


def _summary(contents: dict[str, dict], paper: dict) -> str:
    """Returns the section with the step time of four heads divided by that of one head, for each card."""
    parts = [f"## {SUMMARY}", f"Step time, forward and backward. The numbers of the paper are from {paper['source']}."]
    for card, stems in SUMMARIES.items():
        parts.append(f"### {SUMMARY}: {card}")
        parts += [f"{_link(f'{s}.json')}: {_heading(contents[s])}" for s in stems]
        parts.append(summary.table([r for stem in stems for r in contents[stem]["results"]], paper["results"]))
    return "\n\n".join(parts)


def _section(folder: Path, stem: str, content: dict, module: ModuleType) -> str:
    parts = [f"### {stem}.json", _heading(content), f"`{content['circumstances']['command']}`"]
    parts += [content["note"]] if "note" in content else []
    parts.append(module.tables(content["results"]))
    plot = folder / f"{stem}.png"
    parts += [f"![{stem}]({plot.name})"] if plot.exists() else []
    return "\n\n".join(parts)


def _heading(content: dict) -> str:
    return output.heading(content["circumstances"], content["settings"])


def _first_paragraph(module: ModuleType) -> str:
    """Returns the first paragraph of a benchmark module's docstring."""
    return " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())


def _link(title: str) -> str:
    """Returns a link to a heading of the same page."""
    return f"[{title}](#{anchor(title)})"


def anchor(title: str) -> str:
    """Returns the anchor that GitHub gives a heading."""
    return re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-")

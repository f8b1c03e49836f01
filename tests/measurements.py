"""Options, table cells and an invented trace for the tests of benchmarks."""

import argparse
from pathlib import Path

from benchmarks import emulation, exposure


def options(folder: Path, *arguments: str) -> argparse.Namespace:
    return emulation.parser("", "invented").parse_args(["--output", str(folder), *arguments])


def rows(table: str) -> list[list[str]]:
    """Returns the cells of a Markdown table, with the header first and without the line below it."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return [cells[0], *cells[2:]]


def invented_trace(exposed: float) -> exposure.Trace:
    """Returns a step of 600 ms. Its head phase is 400 to 500 and begins with `exposed` ms of exposed transfer."""
    computing, transfers = [], []
    for start in range(0, 600, 10):
        compute_delay = exposed if start == 400 else 0.5
        computing.append((start + compute_delay, start + 10.0))
        transfers.append((float(start), start + max(compute_delay, 5.0)))
    parts = {"step": [(0.0, 600.0)], "heads": [(400.0, 500.0)], "trunk": [(0.0, 400.0), (500.0, 600.0)]}
    return exposure.Trace(computing, transfers, [(400.0, 400.25)], parts)

"""What tests of the benchmarks share: their options, the cells of their tables, and an invented trace."""

import argparse
from pathlib import Path

from benchmarks import emulation, exposure


def options(folder: Path, *arguments: str) -> argparse.Namespace:
    return emulation.parser("", "invented").parse_args(["--output", str(folder), *arguments])


def rows(table: str) -> list[list[str]]:
    """A Markdown table's cells, header first, without the line below it."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return [cells[0], *cells[2:]]


def invented_trace(exposed: float) -> exposure.Trace:
    """A step of 600 ms, of which 400 to 500 are the head phase, with `exposed` ms of transfers at its beginning."""
    computing, transfers = [], []
    for start in range(0, 600, 10):
        late = exposed if start == 400 else 0.5
        computing.append((start + late, start + 10.0))
        transfers.append((float(start), start + max(late, 5.0)))
    parts = {"step": [(0.0, 600.0)], "heads": [(400.0, 500.0)], "trunk": [(0.0, 400.0), (500.0, 600.0)]}
    return exposure.Trace(computing, transfers, [(400.0, 400.25)], parts)

"""Measurements, most on one GPU: python tools/benchmark.py overhead --help. Prints a Markdown table, writes JSON and
a picture.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from benchmarks.command import entry

if __name__ == "__main__":  # processes that a benchmark starts import this file, too
    entry()

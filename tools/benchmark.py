"""Runs a benchmark: python tools/benchmark.py --help.

Most benchmarks need one GPU. Each prints a Markdown table and writes a JSON file and a plot. The code is in
tools/benchmarks/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from benchmarks.command import entry

if __name__ == "__main__":  # processes that a benchmark starts import this file
    entry()

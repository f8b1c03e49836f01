"""Runs timed_training on several ranks of this machine: python -m benchmarks.launched_training RANKS ARGUMENTS ...

Tests: tests/unit/tools/benchmarks/test_train_step.py.
"""

import sys

from megamtp.commands.local import Launch

if __name__ == "__main__":
    _, num_ranks, *arguments = sys.argv
    sys.exit(Launch("benchmarks.timed_training", arguments, int(num_ranks)).wait())

"""Converts text to a corpus: python tools/prepare_data.py --help.

The code is in megamtp/commands/prepare_data.py.
"""

from megamtp.commands.prepare_data import entry

if __name__ == "__main__":  # MPI's workers import this file
    entry()

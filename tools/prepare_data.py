"""Text to a corpus: python tools/prepare_data.py --help. The code is megamtp/commands/prepare_data.py."""

from megamtp.commands.prepare_data import entry

if __name__ == "__main__":  # MPI's workers import this file, too
    entry()

"""Text to a corpus: python tools/prepare_data.py --help. The code is megamtp/commands/prepare_data.py."""

from megamtp.commands.prepare_data import entry

entry()

"""Converts a checkpoint to another format: python tools/convert_checkpoint.py --help.

The code is in megamtp/commands/convert_checkpoint.py.
"""

from megamtp.commands.convert_checkpoint import entry

entry()

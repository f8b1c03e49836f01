"""Checkpoints to other formats: python tools/convert_checkpoint.py --help. The code is
megamtp/commands/convert_checkpoint.py.
"""

from megamtp.commands.convert_checkpoint import entry

entry()

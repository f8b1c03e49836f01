"""Generates text with a trained model: python tools/generate.py --help.

The code is in megamtp/commands/generate.py.
"""

from megamtp.commands.generate import entry

entry()

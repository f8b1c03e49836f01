"""Text from a model: python tools/generate.py --help. The code is megamtp/commands/generate.py."""

from megamtp.commands.generate import entry

entry()

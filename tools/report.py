"""Loss curves of a run: python tools/report.py --help. The code is megamtp/commands/report.py."""

from megamtp.commands.report import entry

entry()

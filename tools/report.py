"""Plots the losses of a run: python tools/report.py --help.

The code is in megamtp/commands/report.py.
"""

from megamtp.commands.report import entry

entry()

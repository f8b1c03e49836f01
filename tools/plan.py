"""Predicts memory and step time of a configuration: python tools/plan.py --help.

The code is in megamtp/commands/plan.py.
"""

from megamtp.commands.plan import entry

entry()

"""Memory and time of a configuration: python tools/plan.py --help. The code is megamtp/commands/plan.py."""

from megamtp.commands.plan import entry

entry()

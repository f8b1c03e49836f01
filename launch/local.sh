#!/usr/bin/env bash
# Trains on this machine: bash launch/local.sh configs/NAME.yaml key=value ...
# Relative paths refer to the current folder. MEGAMTP_RANKS sets the number of ranks (default: one per GPU, or two without a
# GPU). After SIGTERM, SIGUSR1 or Ctrl-C the job saves a checkpoint and exits.
set -euo pipefail
here="$PWD"
. "$(dirname "$0")/environment.sh"
# Python would import a folder named "megamtp" in the current folder before this repository's package.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
cd "$here"
MEGAMTP_COMMAND="bash $0" exec python -m megamtp.commands.local "$@"  # --help shows this script's name

#!/usr/bin/env bash
# Trains on this machine: bash launch/local.sh configs/NAME.yaml key=value ...
# Paths are taken from the folder it is called in.
# MEGAMTP_RANKS: number of ranks (all GPUs, or two where there is none). SIGTERM, SIGUSR1 and Ctrl-C save first.
set -euo pipefail
here="$PWD"
. "$(dirname "$0")/environment.sh"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # or a folder "megamtp" in that one would be taken for the package
cd "$here"
exec python -m megamtp.commands.local "$@"

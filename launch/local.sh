#!/usr/bin/env bash
# Trains on this machine: bash launch/local.sh configs/NAME.yaml key=value ...
# MEGAMTP_RANKS: number of ranks (all GPUs, or two where there is none). SIGTERM, SIGUSR1 and Ctrl-C save first.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
exec python -m megamtp.commands.local "$@"

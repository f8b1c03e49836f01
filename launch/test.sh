#!/usr/bin/env bash
# Runs all tests, a file at a time on each core, the long ones (distributed, end_to_end) first; arguments go to pytest (--full adds
# the whole product of gradient cases).
set -euo pipefail
. "$(dirname "$0")/environment.sh"
exec python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Runs all tests: bash launch/test.sh [pytest arguments]
# Each core runs one test file at a time, slow files (distributed, end_to_end) first. --full adds more cases (long).
set -euo pipefail
. "$(dirname "$0")/environment.sh"
exec python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"

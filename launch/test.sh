#!/usr/bin/env bash
# Runs all tests; arguments go to pytest (--full adds the whole product of gradient cases).
set -euo pipefail
. "$(dirname "$0")/environment.sh"
exec python -m pytest "$@"

#!/usr/bin/env bash
# Set up and run the tests: all but the slow ones, or every one with --all. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
export OMP_NUM_THREADS=1 # two test processes share the cores
if [ "${1:-}" = --all ]; then
    shift
    exec python -m pytest -n 2 "$@"
fi
exec python -m pytest -n 2 -m "not slow" "$@"

#!/usr/bin/env bash
# Set up and run the tests: all but the slow ones, or every one with --all. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
if [ "${1:-}" = --all ]; then
    shift
    exec python -m pytest "$@"
fi
exec python -m pytest -m "not slow" "$@"

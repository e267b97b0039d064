#!/usr/bin/env bash
# Set up and run the tests: all but the slow ones. Other arguments go to pytest.
#
#     bash scripts/test.sh
#     bash scripts/test.sh --oldest   the same with the least versions that requirements.txt allows, in .venv-oldest
#     bash scripts/test.sh --all      every test, and then --oldest
#
# PYTHON=python3.12 bash scripts/test.sh --oldest takes that Python instead of python3.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # two test processes share the cores
case "${1:-}" in
--oldest)
    shift
    versions=oldest
    . scripts/environment.sh requirements-dev.txt
    exec python -m pytest -n 2 --dist worksteal -m "not slow" "$@"
    ;;
--all)
    shift
    . scripts/environment.sh requirements-tools.txt
    python -m pytest -n 2 --dist worksteal "$@"
    bash scripts/test.sh --oldest "$@" || [ $? -eq 5 ] # which says that all tests that were asked for are slow ones
    ;;
*)
    . scripts/environment.sh requirements-dev.txt
    exec python -m pytest -n 2 --dist worksteal -m "not slow" "$@"
    ;;
esac

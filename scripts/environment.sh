# Sourced by the other scripts: makes a Python with everything installed the current one.
# An active virtual environment is used as it is, and only what it lacks is installed; else .venv is made here.
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $(python3 --version) is too old; put Python 3.11 or newer on PATH as python3" >&2
    exit 2
fi
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
    [ -x .venv/bin/pip ] && [ -f .venv/bin/activate ] || python3 -m venv --clear .venv
    . .venv/bin/activate
    python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
else
    python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
fi

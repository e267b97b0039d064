# Sourced by the other scripts: makes a Python with everything installed the current one.
# An active virtual environment is used as it is, and only what it lacks is installed; else .venv is made here.
# With versions=oldest it is always an environment of its own, with the least versions that requirements.txt allows and
# the Python that PYTHON names.
python=python3 folder='' constraints=constraints.txt
[ "${versions:-}" = oldest ] && python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $("$python" --version) is too old; put Python 3.11 or newer on PATH as python3" >&2
    exit 2
fi
if [ "${versions:-}" = oldest ]; then
    folder=.venv-oldest/$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    constraints=constraints-oldest.txt
elif [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
    folder=.venv
fi
if [ -n "$folder" ]; then
    [ -x "$folder/bin/pip" ] && [ -f "$folder/bin/activate" ] || "$python" -m venv --clear "$folder"
    . "$folder/bin/activate"
    python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c "$constraints"
else
    python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
fi

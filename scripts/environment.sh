# Sourced by the other scripts with the requirement files to install:
#
#     . scripts/environment.sh requirements-quickstart.txt
#
# Makes a Python that has them the current one. An active virtual environment is used as it is, and only what it lacks
# is installed; else .venv is made here. With versions=oldest it is always an environment of its own, with the least
# versions that requirements.txt allows and the Python that PYTHON names.
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
wanted=()
for file; do wanted+=(-r "$file"); done
if [ -n "$folder" ]; then
    if ! [ -x "$folder/bin/pip" ] || ! [ -f "$folder/bin/activate" ]; then
        echo "Making a virtual environment in $folder"
        "$python" -m venv --clear "$folder"
    fi
    . "$folder/bin/activate"
    wanted+=(-c "$constraints")
fi
# Without an index pip needs no network to find that everything is there
plan=$(python -m pip install --dry-run --no-index "${wanted[@]}" 2>/dev/null) || plan='Would install'
if [[ $plan == *'Would install'* ]]; then
    echo "Installing $* into ${VIRTUAL_ENV:-${CONDA_PREFIX:-the active environment}}"
    if ! python -m pip show --quiet torch 2>/dev/null; then
        echo "On Linux that is about 3 GB to download and 6 GB on disk, nearly all of it PyTorch and its CUDA libraries"
        echo "(an environment that is active and has PyTorch, as its build for CPUs, is used instead)."
        echo "Unpacking comes last; pip says nothing for a minute or more while it is at it."
    fi
    python -m pip install --disable-pip-version-check "${wanted[@]}"
fi

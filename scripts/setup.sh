#!/usr/bin/env bash
# Create a virtual environment with everything this project needs: scripts/setup.sh DIRECTORY
#
# Requires Python 3.12 or newer: $PYTHON if set, else the first that runs of python3.12, python3.13, python3, and pyenv's own.

set -euo pipefail

venv="${1:?usage: scripts/setup.sh DIRECTORY}"
cd "$(dirname "$0")/.."

suits() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    # A pyenv shim can be on the PATH and still not run, hence the trial and pyenv's own folders.
    for candidate in ${PYTHON:+"${PYTHON}"} python3.12 python3.13 python3 "${PYENV_ROOT:-${HOME}/.pyenv}"/versions/3.1[23]*/bin/python3; do
        if suits "${candidate}"; then
            echo "${candidate}"
            return
        fi
    done
    echo "setup: no Python 3.12 or newer found; install it, or name it: make setup PYTHON=/path/to/python3.12" >&2
    exit 78
}

python="$(find_python)"
echo "setup: $("${python}" --version), into ${venv}/ (about 3 GB to download, 5.5 GB on disk; two to ten minutes)"
rm -rf "${venv}"
"${python}" -m venv "${venv}"
"${venv}/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r constraints.txt
"${venv}/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .

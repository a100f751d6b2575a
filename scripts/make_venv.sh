#!/bin/sh
# Makes a virtual environment with the first Python >= 3.11 it finds: make_venv.sh FOLDER
# PYTHON=/path/to/python chooses another one.
set -eu

folder=$1
if "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi

for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13 python3.14 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        if ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            echo "$candidate cannot make virtual environments." >&2
            echo "hint: on Debian and Ubuntu: apt install python3-venv" >&2
            exit 1
        fi
        exec "$candidate" -m venv --clear "$folder"
    fi
done

echo "No Python 3.11 or newer was found (tried \$PYTHON, python3, python3.11 to python3.14)." >&2
echo "hint: install one, or say where it is: make PYTHON=/path/to/python3.11" >&2
exit 1

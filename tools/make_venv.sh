#!/bin/sh
# Usage: make_venv.sh EXTRAS
# Makes .venv in the current directory, if need be, and installs the project there, editable, with EXTRAS.
# $PYTHON chooses the interpreter; otherwise the first of the usual names that fits is taken.
set -eu

fits='import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c "$fits" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    cat >&2 <<END
error: no Python that fits: looked for ${PYTHON:-python3, python3.13, python3.12, python3.11 and python}.
Python 3.11 or newer is needed, with its venv module (on Debian and Ubuntu: apt install python3-venv).
If yours has another name, say which: make demo PYTHON=/path/to/python
END
    return 1
}

# A .venv that does not run (it was copied, or its Python is gone) is made anew.
if ! .venv/bin/python -c "$fits" >/dev/null 2>&1; then
    python=$(find_python)
    echo "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

echo "installing the project with [$1] in .venv: a minute or so, and only when pyproject.toml changes"
.venv/bin/python -m pip install -qq --disable-pip-version-check --editable ".[$1]"

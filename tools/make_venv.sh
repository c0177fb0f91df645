#!/bin/sh
# Usage: make_venv.sh DIRECTORY LOCK [EXTRAS]
# Makes a virtual environment in DIRECTORY, if need be, and installs there what locks/LOCK.txt says, torch where that
# needs it, and the project, editable, with EXTRAS (LOCK when not given). $PYTHON chooses the interpreter; otherwise the
# first of the usual names that fits is taken.
set -eu

directory=$1 lock=$2 extras=${3:-$2}
python=$directory/bin/python
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

# pip would compile one file after another.
install() {
    "$python" -m pip install -qq --no-compile --disable-pip-version-check "$@"
}

# One that does not run (it was copied, or its Python is gone) is made anew.
if ! "$python" -c "$fits" >/dev/null 2>&1; then
    found=$(find_python)
    echo "making $directory with $("$found" --version)"
    "$found" -m venv --clear "$directory"
fi

echo "installing locks/$lock.txt in $directory: a minute or so, and only when it changes"
# The lock is complete but for torch, which must not be looked for here: which build is right is not the lock's to say.
install --no-deps --require-hashes --requirement "locks/$lock.txt"
if [ "$lock" != test ] && [ "$lock" != ray ]; then
    install --requirement locks/torch.txt
fi
# Without an index: what the locks do not have is an error here, and not whatever is the newest today.
if ! install --no-index --no-build-isolation --editable ".[$extras]"; then
    echo "error: pyproject.toml asks for more than the locks have; run make lock" >&2
    exit 1
fi
# On all cores. Files for other versions of Python are left as they are, so errors mean nothing here.
libraries=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m compileall -qq -j 0 -x '/tests/' "$libraries" || true

#!/bin/sh
# Runs the training loops of tinker-cookbook on loops_tinker and the embedded service, in an environment of their own:
# `tinker` itself, which the cookbook asks for, is left out, and loops_tinker stands in its place.
#     tools/cookbook.sh                        all loops
#     tools/cookbook.sh --picture curves.png   and a picture of what they learned
set -eu

directory=.venv-cookbook
export PYTHONPATH="$PWD"

if ! [ -e "$directory/installed" ] || [ locks/cookbook.txt -nt "$directory/installed" ]; then
    if ! tools/make_venv.sh "$directory" cookbook demo,tinker; then
        echo "ERROR: the environment for the cookbook could not be made, so NOTHING OF tinker-cookbook WAS TESTED" >&2
        exit 3
    fi
    touch "$directory/installed"
fi
exec "$directory/bin/python" -m tests.cookbook "$@"

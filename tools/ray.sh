#!/bin/sh
# Runs the tests on Ray, or with arguments that command, in an environment of their own: Ray needs 590 MB, so .venv is
# without it. Ray 2.60 has no wheels for the newest Pythons, so this one is of 3.11 to 3.13; $PYTHON says which.
#     tools/ray.sh                                 the tests
#     tools/ray.sh -m benchmarks.batch --on-ray    a Python command
set -eu

directory=.venv-ray
export RAY_USAGE_STATS_ENABLED=0 PYTHONPATH="$PWD"

if ! [ -e "$directory/installed" ] || [ locks/ray.txt -nt "$directory/installed" ]; then
    if ! tools/make_venv.sh "$directory" ray ray,test; then
        echo "ERROR: the environment for Ray could not be made, so NOTHING ON RAY WAS TESTED" >&2
        exit 3
    fi
    touch "$directory/installed"
fi
if [ $# -gt 0 ]; then
    exec "$directory/bin/python" "$@"
fi
# Ray itself warns of much, so warnings are no errors here.
exec "$directory/bin/python" -m pytest -q -s -p no:randomly -W default -o faulthandler_timeout=900 tests/on_ray

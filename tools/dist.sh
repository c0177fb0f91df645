#!/bin/sh
# Builds the wheel and the sdist into dist/, checks them, and uses each in a clean environment, away from the source.
set -eu

python=$PWD/.venv/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

rm -rf dist
"$python" -m build --no-isolation --outdir dist . >"$scratch/build.log" || { cat "$scratch/build.log"; exit 1; }
"$python" -m twine check --strict dist/*
tar -tzf dist/*.tar.gz >"$scratch/names"
for part in LICENSE CHANGELOG.md README.md docs/demo.png loops_async/py.typed loops_local/_dashboard/page.html; do
    grep -q "/$part$" "$scratch/names" || { echo "error: the sdist lacks $part" >&2; exit 1; }
done
for package in dist/*.whl dist/*.tar.gz; do
    echo "using $package"
    "$python" -m venv --clear "$scratch/venv"
    "$scratch/venv/bin/python" -m pip install -qq --disable-pip-version-check "$package"
    "$scratch/venv/bin/python" -m pip list --disable-pip-version-check
    (cd "$scratch" && venv/bin/python "$OLDPWD/tools/smoke.py")
done

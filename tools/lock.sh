#!/bin/sh
# Writes locks/: the newest versions that pyproject.toml admits, with hashes, for every Python that we support.
set -eu

uv=.venv-lock/bin/uv
python3 -m venv .venv-lock
.venv-lock/bin/python -m pip install -qq --disable-pip-version-check 'uv==0.13.9'

# lock NAME PYTHON ARGUMENTS...
lock() {
    name=$1 python=$2
    shift 2
    rm -f "locks/$name.txt" # else its versions are kept
    $uv pip compile --quiet --config-file locks/uv.toml --universal --python-version "$python" --generate-hashes \
        --no-annotate --custom-compile-command 'make lock' --no-emit-package torch --output-file "locks/$name.txt" "$@"
    echo "locks/$name.txt: $(grep -c == "locks/$name.txt") versions"
}

lock dev 3.11 pyproject.toml --group build --extra dev
# These two agree with it.
lock demo 3.11 pyproject.toml --group build --extra demo --constraints locks/dev.txt
lock test 3.11 pyproject.toml --group build --extra test --constraints locks/dev.txt
lock ray 3.11 pyproject.toml --group build --extra ray --extra test --constraints locks/dev.txt
lock cookbook 3.11 pyproject.toml locks/cookbook.in --group build --extra demo --extra tinker --constraints locks/dev.txt
lock lowest 3.11 pyproject.toml --group build --extra dev --resolution lowest-direct
lock published 3.12 locks/published.in
# Two, since frameworks want one or the other major version of openai.
lock agents-openai2 3.12 locks/agents-openai2.in
lock agents-openai3 3.12 locks/agents-openai3.in

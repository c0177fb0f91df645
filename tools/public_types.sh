#!/bin/sh
# Every type that a user's type checker sees must be known, and the same for all type checkers.
#     tools/public_types.sh PYTHON PACKAGE...     the packages as PYTHON imports them
set -eu

root=$PWD
bin=$(cd "$(dirname "$1")" && pwd)
shift
# pyright finds a typed package by the import path only, and not from the project's root.
cd "$bin"
for package in "$@"; do
    report=$(PATH="$bin:$PATH" "$root/.venv/bin/python" -m pyright --verifytypes "$package" --ignoreexternal) || {
        echo "$report"
        exit 1
    }
    echo "$report" | sed -n "s/^Type completeness score/$package: &/p"
done

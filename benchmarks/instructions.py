"""Fail when a hot path executes more instructions than before; unlike time, they do not depend on the machine's load.

Each path runs under callgrind, once for the library and once for the limit; only the measured part is counted. Their
ratio, which hardly depends on the versions of Python and aiohttp, is compared with ``instructions.json``. ``--write``
saves the ratios of this run as the new baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .harness import ROOT, peer_command, serving

BASELINE = Path(__file__).with_name("instructions.json")
MOST_GROWTH = 1.15

NAMES = "--token-names"

PATHS = {
    "sample": ["sample", "--count", "60", "--in-flight", "10"],
    "sample, names of tokens": ["sample", "--count", "60", "--in-flight", "10", NAMES],
    "batch": ["train", "--count", "3", "--cold"],
    "batch from lists": ["train", "--count", "3", "--cold", "--make", "lists"],
    "batch from numpy": ["train", "--count", "3", "--cold", "--make", "numpy"],
}


def main() -> int:
    """Measure, compare, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if shutil.which("valgrind") is None:
        print("instructions: LEFT OUT, since valgrind is not installed")
        return 0
    ratios = {name: round(counted("ours", path) / counted("limit", path), 3) for name, path in PATHS.items()}
    if given.write:
        BASELINE.write_text(json.dumps(ratios, indent=1) + "\n")
    lines, has_grown = verdict(ratios, json.loads(BASELINE.read_text()))
    print(*lines, sep="\n")
    return 1 if has_grown else 0


def verdict(ratios: dict[str, float], baseline: dict[str, float]) -> tuple[list[str], bool]:
    """Return a line for each path, and whether one of them has grown too much."""
    grown = [name for name, ratio in ratios.items() if ratio > baseline[name] * MOST_GROWTH]
    lines = [
        f"{name}: {ratio:.3f} x the limit's instructions, where the baseline is {baseline[name]:.3f}"
        + (f": GROWN by over {MOST_GROWTH - 1:.0%}" if name in grown else "")
        for name, ratio in ratios.items()
    ]
    return lines, bool(grown)


def counted(peer: str, path: list[str]) -> int:
    """Return the number of instructions of the measured part."""
    with serving([NAMES] if NAMES in path else []) as url, tempfile.TemporaryDirectory() as directory:
        callgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={directory}/out"]
        command = [*callgrind, *peer_command(peer), *path, "--url", url, "--blind", "--callgrind"]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())

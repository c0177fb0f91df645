"""Fail when a hot path has become dearer, counted in instructions: the same on a busy machine as on an idle one.

Each path is run under callgrind, for the library and for the limit beside it; counting begins and ends with the
measured stretch. What is compared with ``instructions.json`` is their ratio, which hardly depends on the versions of
Python and aiohttp. ``--write`` makes the numbers of this run the new baseline.
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

PATHS = {
    "sample": ["sample", "--count", "60", "--in-flight", "10"],
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
    lines, is_dearer = verdict(ratios, json.loads(BASELINE.read_text()))
    print(*lines, sep="\n")
    return 1 if is_dearer else 0


def verdict(ratios: dict[str, float], baseline: dict[str, float]) -> tuple[list[str], bool]:
    """A line for each path, and whether one of them has become too dear."""
    dearer = [name for name, ratio in ratios.items() if ratio > baseline[name] * MOST_GROWTH]
    lines = [
        f"{name}: {ratio:.3f} x the limit's instructions, where the baseline is {baseline[name]:.3f}"
        + (f": over {MOST_GROWTH - 1:.0%} DEARER" if name in dearer else "")
        for name, ratio in ratios.items()
    ]
    return lines, bool(dearer)


def counted(peer: str, path: list[str]) -> int:
    """Instructions of the measured stretch."""
    with serving() as url, tempfile.TemporaryDirectory() as directory:
        callgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={directory}/out"]
        command = [*callgrind, *peer_command(peer), *path, "--url", url, "--blind", "--callgrind"]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())

"""Fail when a hot path has become dearer, counted in instructions: the same on a busy machine as on an idle one.

Each path is run under callgrind with two sizes, so that what start-up costs cancels out, for the library and for the
limit beside it. What is compared with ``instructions.json`` is their ratio, which hardly depends on the versions of
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
from dataclasses import dataclass
from pathlib import Path

from benchmarks.__main__ import ROOT, serving

BASELINE = Path(__file__).with_name("instructions.json")
MOST_GROWTH = 1.15


@dataclass(frozen=True)
class HotPath:
    """A hot path, and two sizes at which it is run."""

    workload: str
    few: int
    many: int


PATHS = (HotPath("sample", 40, 140), HotPath("train", 1, 3))


def main() -> int:
    """Measure, compare, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if shutil.which("valgrind") is None:
        print("instructions: LEFT OUT, since valgrind is not installed")
        return 0
    ratios = {path.workload: per_call("ours", path) / per_call("limit", path) for path in PATHS}
    if given.write:
        BASELINE.write_text(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}, indent=1) + "\n")
    baseline: dict[str, float] = json.loads(BASELINE.read_text())
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} x the limit's instructions; the baseline is {baseline[name]:.3f}")
    dearer = [name for name, ratio in ratios.items() if ratio > baseline[name] * MOST_GROWTH]
    if dearer:
        print(f"dearer by more than {MOST_GROWTH - 1:.0%}: {', '.join(dearer)}")
    return 1 if dearer else 0


def per_call(peer: str, path: HotPath) -> float:
    """Instructions for one unit of work."""
    return (counted(peer, path.workload, path.many) - counted(peer, path.workload, path.few)) / (path.many - path.few)


def counted(peer: str, workload: str, count: int) -> int:
    """Instructions of a whole process."""
    with serving(()) as url, tempfile.TemporaryDirectory() as directory:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={directory}/out", sys.executable]
        command += ["-m", f"benchmarks.peers.{peer}", workload, "--url", url, "--blind"]
        command += ["--count", str(count), "--in-flight", "10"]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())

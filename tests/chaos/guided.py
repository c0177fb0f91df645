"""Fuzz the decoding of answers guided by coverage, with atheris in an environment of its own.

atheris changes bytes so that new lines of `loops_async` run. The answers do not pass a socket, so it makes thousands a
second. Exits with 1 when a call raises anything but a `LoopsError`.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Final

from .environments import ROOT, installed

TOOL: Final = "atheris==3.0.0"
TARGET: Final = Path(__file__).with_name("guided_target.py")


def main() -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.guided", description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(1, 2**31), help="default: a new one")
    asked = parser.parse_args()
    environment = installed(TOOL)
    if environment is None:
        return 0
    print(f"guided: seed {asked.seed}; again with: python -m tests.chaos.guided --seed {asked.seed}", flush=True)
    # The same Python, so what is installed here can be used there.
    paths = os.pathsep.join((str(ROOT), sysconfig.get_path("purelib")))
    with tempfile.TemporaryDirectory() as corpus:
        ended = subprocess.run(
            [environment / "bin" / "python", TARGET, f"-max_total_time={asked.seconds}", f"-seed={asked.seed}", corpus],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    print(ended.stdout, end="")
    last = [line for line in ended.stderr.splitlines() if line.startswith("Done ")]
    print("\n".join(last) or ended.stderr[-2000:], flush=True)
    return int(ended.returncode != 0 or not last or "UNTYPED" in ended.stdout)


if __name__ == "__main__":
    sys.exit(main())

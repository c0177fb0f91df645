"""Tools that need an environment of their own, since what they depend on is none of the library's business."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]


def installed(tool: str) -> Path | None:
    """Return the environment of ``NAME==VERSION``, made once; None, said loudly, where it cannot be installed."""
    environment = ROOT / f".venv-{tool.split('==')[0]}"
    stamp = environment / tool
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        tried = subprocess.run([*pip, tool], capture_output=True, text=True, check=False)
        if tried.returncode:
            print(f"{tool.upper()} LEFT OUT, it cannot be installed: {tried.stderr.strip()[-300:]}", flush=True)
            return None
        stamp.touch()
    return environment

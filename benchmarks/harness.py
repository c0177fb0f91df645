"""Running one peer on one workload: a fresh process on one core, against the benchmark's server on another."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parent.parent

Numbers: TypeAlias = dict[str, float]
"""The measurements that a peer prints: see `peers.measure.Clock`."""


class MeasurementError(Exception):
    """A peer could not be measured; the text says why."""


@contextmanager
def serving(options: Sequence[str] = (), *, pin: bool = True) -> Iterator[str]:
    """Run the benchmark's server, on the last core if it is pinned, and yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*_pinned(-1, pin), sys.executable, "-m", "benchmarks.server", "--port", str(port), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def run_peer(peer: str, arguments: Sequence[str], *, timeout: float, pin: bool = True) -> Numbers:
    """Run a peer in a fresh process, on the first core if it is pinned; raises `MeasurementError`."""
    command = [*_pinned(0, pin), *peer_command(peer), *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"over {timeout:g} s") from None
    if done.returncode:
        raise MeasurementError(" ".join(["failed:", *done.stderr.strip().splitlines()[-1:]]))
    numbers: Numbers = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers


def peer_command(peer: str) -> list[str]:
    """Return the command that starts a peer; raises `MeasurementError` when it is not installed."""
    python = published_python() if peer == "published" else sys.executable
    if python is None:
        raise MeasurementError("not available")
    return [python, "-W", "ignore", "-m", f"benchmarks.peers.{peer}"]


def published_python() -> str | None:
    """Return the interpreter that has the published client, which ``tests/compat`` installs; None without it."""
    return next((str(stamp.parent / "bin" / "python") for stamp in ROOT.glob(".venv-compat/*/baseten-loops==*")), None)


def _pinned(core: int, pin: bool) -> list[str]:
    """Return the prefix of a command that pins it to one of this process's cores; empty where that is not possible."""
    if not pin or shutil.which("taskset") is None:
        return []
    return ["taskset", "-c", str(sorted(os.sched_getaffinity(0))[core])]

"""Batches on Ray, as tests run them; and the processes of a cluster, which tests kill."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loops_async import BatchReport, BatchSettings, SamplingClient, SamplingParams, ServiceClient
from loops_local import LocalService

PATIENCE_SECONDS = 120.0

SETTINGS = BatchSettings(base_model="counting", sampling_params=SamplingParams(max_tokens=200))
"""As of a sampler of a run, which has the same weights and another id when it is started again."""

SMALL = {"workers": 2, "limit": 24, "rows_per_block": 16, "blocks_per_worker": 2, "rows_per_file": 64, "num_cpus": 0.5}


async def run(sampler: SamplingClient, source: Path, target: Path, **options: Any) -> BatchReport:
    """Run a batch in this process."""
    from loops_async.ray import sample_files

    return await sample_files(source, target, sampler, **{"settings": SETTINGS, **SMALL, **options})


class Driver:
    """A batch in a process of its own, which can be killed."""

    def __init__(self, address: str, service: LocalService, source: Path, target: Path) -> None:
        command = [sys.executable, "-m", "tests.on_ray.programs", address, str(source), str(target)]
        environment = {**os.environ, "BASETEN_API_KEY": service.api_key, "LOOPS_BASE_URL": service.base_url}
        self._process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def check_runs(self) -> None:
        assert self._process.poll() is None, self._process.communicate()


async def eventually(condition: Callable[[], object], check: Callable[[], object] = lambda: None) -> None:
    """Return when the condition holds; fail if it never does, or `check` fails before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        check()
        await asyncio.sleep(0.02)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def processes(name: str, under: int | None = None) -> set[int]:
    """Return the processes of this machine, or of a raylet, that run what has this name in Ray."""
    return {pid for pid in _descendants(os.getpid() if under is None else under) if name in _command(pid)}


def _descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process has started, and those that these have."""
    children = _children()
    open_ = [pid]
    while open_:
        found = children.get(open_.pop(), [])
        yield from found
        open_ += found


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            found.setdefault(parent, []).append(int(folder.name))
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


async def main(address: str, source: str, target: str) -> None:
    import ray

    ray.init(address=address, logging_level="error")
    async with ServiceClient(on_exit="leave") as service:
        await run(await service.create_sampling_client("counting"), Path(source), Path(target))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

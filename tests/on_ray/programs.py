"""Drivers of Ray, which tests start in processes of their own and kill; and what a cluster runs at the moment."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from loops_local import LocalService

PATIENCE_SECONDS = 240.0

SMALL = {"workers": 3, "limit": 24, "rows_per_block": 16, "blocks_per_worker": 2, "rows_per_file": 64, "num_cpus": 0.5}


class Program:
    """A driver, in a process of its own."""

    def __init__(self, address: str, service: LocalService, source: Path, target: Path, **options: Any) -> None:
        arguments = {"address": address, "source": str(source), "target": str(target), **SMALL, **options}
        environment = {
            **os.environ,
            "BASETEN_API_KEY": service.api_key,
            "LOOPS_BASE_URL": service.base_url,
            "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        }
        command = [sys.executable, "-m", "tests.on_ray.programs", json.dumps(arguments)]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def report(self) -> Any:
        """Wait for the end, and return the report or the error."""
        out, said = self._process.communicate(timeout=PATIENCE_SECONDS)
        lines = [line for line in out.decode().splitlines() if line.startswith("REPORT ")]
        assert lines, said.decode()[-6000:]
        return json.loads(lines[-1].removeprefix("REPORT "))

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Return when the condition holds; fail if the program ends before, or it never does."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "the condition never held"
            assert self._process.poll() is None, self._process.communicate()
            time.sleep(0.02)


def workers(under: int) -> list[int]:
    """Return the processes that sample, of a machine or of all."""
    return [pid for pid in descendants(under) if "MapWorker" in command_of(pid)]


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process has started, and those that these have."""
    for child in children().get(pid, []):
        yield child
        yield from descendants(child)


def children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            found.setdefault(parent, []).append(int(folder.name))
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


async def sampled(arguments: dict[str, Any]) -> Any:
    import ray

    import loops_async as loops
    import loops_async.ray as loops_ray

    ray.init(address=arguments.pop("address"), logging_level="error")
    params = loops.SamplingParams(max_tokens=arguments.pop("max_tokens", 200))
    async with loops.ServiceClient() as service:
        sampler = await service.create_sampling_client("counting")
        # A sampler of a run that is started again has the same weights, and another id.
        settings = loops.BatchSettings(base_model="counting", sampling_params=params)
        return await loops_ray.sample_files(client=sampler, settings=settings, **arguments)


def main() -> None:
    from loops_async import LoopsError

    try:
        report = msgspec.to_builtins({**asyncio.run(sampled(json.loads(sys.argv[1]))).to_dict()})
    except LoopsError as error:
        report = {"raised": type(error).__name__, "message": str(error)}
    print("REPORT", json.dumps(report), flush=True)


if __name__ == "__main__":
    main()

"""Executors: one law for all of them, and what only those with processes on this machine have."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import loops_sync
from loops_async import ClosedError, InLoopExecutor, InputError, ProcessExecutor, WorkerDiedError
from loops_async._executors import processes
from tests.support import graders
from tests.support.executor_law import ExecutorLaw, ProcessLaw, is_written, result
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import eventually

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared() -> Iterator[ProcessExecutor]:
    """One for all tests: to start a process takes a while."""
    executor = ProcessExecutor(1, per_worker=4)
    yield executor
    asyncio.run(executor.close())


class TestInLoopExecutor(ExecutorLaw):
    @pytest.fixture
    async def executor(self) -> AsyncIterator[InLoopExecutor]:
        async with InLoopExecutor() as executor:
            assert executor.capacity is None
            yield executor


class TestProcessExecutor(ProcessLaw):
    @pytest.fixture
    def executor(self, shared: ProcessExecutor) -> ProcessExecutor:
        return shared

    async def test_a_rollout_that_holds_its_loop_is_killed(
        self, executor: ProcessExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(processes, "KILL_SECONDS", 0.05)
        file = tmp_path / "pid"
        holding = asyncio.create_task(executor.run(graders.hold_the_loop, None, file))
        await eventually(lambda: is_written(file))
        neighbour = asyncio.create_task(executor.run(graders.give_back, 1, 2))
        await asyncio.sleep(0)  # it is given to the same process
        holding.cancel()
        with pytest.raises(WorkerDiedError, match="did not end in"):
            await neighbour
        assert not graders.is_alive(int(file.read_text()))

    async def test_what_cannot_be_pickled_is_told(self, executor: ProcessExecutor) -> None:
        with pytest.raises(Exception, match="lambda"):
            await result(executor, lambda: 1)
        with pytest.raises(Exception, match="pickle"):
            await executor.run(graders.give_back, threading.Lock(), 1)
        assert await result(executor, graders.double, 4) == 8
        assert executor.capacity == 4

    async def test_a_forked_process_does_not_hide_the_end_of_its_worker(
        self, executor: ProcessExecutor, tmp_path: Path
    ) -> None:
        file = tmp_path / "forked"
        dying = asyncio.create_task(result(executor, graders.end_after_a_fork, file))
        await eventually(lambda: is_written(file))
        forked = int(file.read_text())
        try:
            done, _ = await asyncio.wait([dying], timeout=PATIENCE_SECONDS)
        finally:
            os.kill(forked, signal.SIGKILL)
        assert done
        with pytest.raises(WorkerDiedError, match="exit code 3"):
            await dying

    async def test_a_grader_may_start_processes(self, executor: ProcessExecutor) -> None:
        assert await result(executor, graders.grade_in_a_process) == 42

    async def test_interrupting_a_worker_ends_nothing(self, executor: ProcessExecutor) -> None:
        assert await result(executor, graders.interrupt) == "went on"
        assert await executor.run(graders.interrupt_rolling_out, None, None) == "went on"

    def test_the_blocking_form_takes_plain_functions(self) -> None:
        with loops_sync.ProcessExecutor(1) as executor:
            assert executor.run(graders.give_back_plainly, "policy", 2) == ("policy", 2)
            with pytest.raises(InputError, match="plain function"):
                executor.run(graders.give_back, "policy", 2)


async def test_closing_ends_everything(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    async with ProcessExecutor(1) as executor:
        running, waiting = executor.submit(graders.hang, tmp_path / "pid"), executor.submit(graders.double, 1)
        rollout = asyncio.create_task(executor.run(graders.wait_forever, None, tmp_path / "state"))
        await eventually(lambda: is_written(tmp_path / "pid") and is_written(tmp_path / "state"))
        ended = int((tmp_path / "pid").read_text()), int((tmp_path / "state").read_text())
    assert waiting.cancelled()
    assert isinstance(running.exception(), WorkerDiedError)
    with pytest.raises(WorkerDiedError):
        await rollout
    assert not any(map(graders.is_alive, ended))
    await eventually(lambda: not [each for each in set(threading.enumerate()) - threads if "loops_async" in each.name])
    with pytest.raises(ClosedError):
        executor.submit(graders.double, 1)
    with pytest.raises(ClosedError):
        await executor.run(graders.give_back, 1, 2)


def test_a_program_that_closes_nothing_ends_with_its_workers(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    program = """
import pathlib, sys, time
from loops_async import ProcessExecutor
from tests.support import graders

if __name__ == "__main__":
    file = pathlib.Path(sys.argv[1])
    executor = ProcessExecutor(1)
    executor.submit(graders.hang, file)
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    command = [sys.executable, str(script), str(file)]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not graders.is_alive(int(file.read_text()))


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"workers": -1}, {"per_worker": 0}, {"workers": 1.5}])
def test_bad_numbers_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        ProcessExecutor(**arguments)

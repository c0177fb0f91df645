"""What holds for every executor: the tests of each kind inherit these, and have a fixture `executor`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from loops_async import WorkerDiedError, WorkerError, WorkerTimeoutError
from tests.support import graders
from tests.support.work import eventually


async def result(executor: Any, function: Any, *args: Any) -> Any:
    return await asyncio.wrap_future(executor.submit(function, *args))


def is_written(file: Path) -> bool:
    return file.exists() and bool(file.read_text())


class ExecutorLaw:
    """Holds wherever the code runs, also where that is no other process."""

    async def test_results_are_those_of_the_function(self, executor: Any) -> None:
        assert await asyncio.gather(*(result(executor, graders.double, each) for each in range(5))) == [0, 2, 4, 6, 8]

    async def test_results_are_those_of_the_rollout(self, executor: Any) -> None:
        rolled_out = await asyncio.gather(*(executor.run(graders.give_back, "policy", each) for each in range(20)))
        assert rolled_out == [("policy", each) for each in range(20)]

    async def test_errors_are_the_original_ones(self, executor: Any) -> None:
        with pytest.raises(KeyError, match="no such key") as caught:
            await result(executor, graders.fail, "no such key")
        assert "in fail" in caught.value.__notes__[0]
        with pytest.raises(KeyError, match="no such key") as caught:
            await executor.run(graders.fail_rolling_out, None, "no such key")
        assert "in fail_rolling_out" in caught.value.__notes__[0]

    async def test_errors_that_cannot_be_pickled_are_described(self, executor: Any) -> None:
        for failing in (
            result(executor, graders.fail_unreadably),
            executor.run(graders.fail_rolling_out_unreadably, None, 1),
        ):
            with pytest.raises(WorkerError, match="UnreadableError") as caught:
                await failing
            assert caught.value.error_type == "UnreadableError"
            assert "UnreadableError(1, 2)" in (caught.value.traceback or "")
            assert "process" in (caught.value.worker or "")

    async def test_a_rollout_ends_at_its_time_limit(self, executor: Any, tmp_path: Path) -> None:
        file = tmp_path / "state"
        with pytest.raises(WorkerTimeoutError, match=r"wait_forever .* 0\.01 s") as caught:
            await executor.run(graders.wait_forever, None, file, timeout=0.01)
        assert caught.value.timeout == 0.01
        assert isinstance(caught.value, TimeoutError)
        await eventually(lambda: not file.exists() or file.read_text() == "cancelled")
        assert await executor.run(graders.give_back, 1, 2) == (1, 2)

    async def test_a_rollout_is_cancelled_with_its_caller(self, executor: Any, tmp_path: Path) -> None:
        file = tmp_path / "state"
        caller = asyncio.create_task(executor.run(graders.wait_forever, None, file))
        await eventually(lambda: is_written(file))
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await eventually(lambda: file.read_text() == "cancelled")


class ProcessLaw(ExecutorLaw):
    """Holds in other processes; the executor of the fixture has one for functions, and one for rollouts."""

    async def test_a_program_is_not_ended_by_a_grader(self, executor: Any) -> None:
        with pytest.raises(WorkerError, match="SystemExit"):
            await result(executor, graders.exit_quietly)

    async def test_a_process_that_ends_is_replaced(self, executor: Any) -> None:
        with pytest.raises(WorkerDiedError, match="end_badly") as caught:
            await result(executor, graders.end_badly)
        assert caught.value.retryable
        assert await result(executor, graders.double, 4) == 8

    async def test_a_function_that_hangs_can_be_ended(self, executor: Any, tmp_path: Path) -> None:
        file = tmp_path / "pid"
        hanging = asyncio.ensure_future(result(executor, graders.hang, file))
        waiting = asyncio.ensure_future(result(executor, graders.double, 1))
        following = asyncio.ensure_future(result(executor, graders.double, 4))
        await eventually(lambda: is_written(file))
        waiting.cancel()
        hanging.cancel()
        assert await following == 8
        assert waiting.cancelled()
        assert hanging.cancelled()
        await eventually(lambda: not graders.is_alive(int(file.read_text())))

    async def test_a_death_fails_what_ran_there_and_nothing_else(self, executor: Any, tmp_path: Path) -> None:
        file = tmp_path / "pid"
        neighbour = asyncio.create_task(executor.run(graders.wait_forever, None, file))
        grader = asyncio.create_task(result(executor, graders.wait_and_double, tmp_path / "go", 4))
        await eventually(lambda: is_written(file))
        with pytest.raises(WorkerDiedError, match="die"):
            await executor.run(graders.die, None, 1)
        with pytest.raises(WorkerDiedError, match="wait_forever"):
            await neighbour
        (tmp_path / "go").touch()
        assert await grader == 8
        assert await executor.run(graders.give_back, 1, 2) == (1, 2)

    async def test_rollouts_run_beside_one_another(self, executor: Any, tmp_path: Path) -> None:
        waiting = asyncio.create_task(executor.run(graders.wait_for, None, tmp_path / "file"))
        assert await executor.run(graders.write, "text", tmp_path / "file") is None
        assert await waiting == "text"

    async def test_what_is_logged_arrives(self, executor: Any, caplog: pytest.LogCaptureFixture) -> None:
        await result(executor, graders.warn, "hello")
        await eventually(lambda: "a grader says hello" in caplog.messages)

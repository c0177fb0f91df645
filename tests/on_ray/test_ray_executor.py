"""`RayExecutor` follows the law of all executors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import loops_sync
import loops_sync.ray as blocking_ray
from loops_async import ClosedError, FailurePolicy, WorkerDiedError
from loops_async._executors import processes
from loops_async.ray import RayExecutor
from loops_local import LocalService
from tests.support import graders
from tests.support.colours import Colour
from tests.support.executor_law import ProcessLaw, is_written, result
from tests.support.rollouts import check_whole_rollouts_elsewhere
from tests.support.work import eventually


@pytest.fixture(scope="module")
def shared(connected: None) -> Iterator[RayExecutor]:
    executor = RayExecutor(1, per_worker=4, num_cpus=0.5)
    yield executor
    asyncio.run(executor.close())


class TestRayExecutor(ProcessLaw):
    @pytest.fixture
    def executor(self, shared: RayExecutor) -> RayExecutor:
        return shared

    async def test_functions_need_no_name(self, executor: RayExecutor) -> None:
        assert await result(executor, lambda number: 3 * number, 2) == 6
        assert executor.capacity == 4

    async def test_a_rollout_that_holds_its_loop_is_killed(
        self, executor: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(processes, "KILL_SECONDS", 0.1)
        file = tmp_path / "pid"
        holding = asyncio.create_task(executor.run(graders.hold_the_loop, None, file))
        await eventually(lambda: is_written(file))
        neighbour = asyncio.create_task(executor.run(graders.give_back, 1, 2))
        await asyncio.sleep(0)
        holding.cancel()
        with pytest.raises(WorkerDiedError, match="did not end in"):
            await neighbour
        await eventually(lambda: not graders.is_alive(int(file.read_text())))


@pytest.fixture
async def coloured(colour: Colour, connected: None) -> AsyncIterator[Any]:
    """One executor of each colour."""
    if colour.module is loops_sync:
        blocking = blocking_ray.RayExecutor(1, num_cpus=0.5)
        yield blocking
        await asyncio.to_thread(blocking.close)
        return
    async with RayExecutor(1, num_cpus=0.5) as executor:
        yield executor


async def test_whole_rollouts_run_in_actors(
    coloured: Any, service: LocalService, colour: Colour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FailurePolicy, "pause_before", lambda *_: 0.01)
    async with colour.connected(base_url=service.base_url, api_key=service.api_key) as client:
        trainer = await client.create_lora_training_client("counting", rank=8)
        await check_whole_rollouts_elsewhere(trainer, coloured, tmp_path)


async def test_closing_ends_everything(connected: None, tmp_path: Path) -> None:
    async with RayExecutor(1, num_cpus=0.5) as executor:
        running = executor.submit(graders.hang, tmp_path / "pid")
        await eventually(lambda: is_written(tmp_path / "pid"))
    assert isinstance(running.exception(), WorkerDiedError)
    await eventually(lambda: not graders.is_alive(int((tmp_path / "pid").read_text())))
    with pytest.raises(ClosedError):
        executor.submit(graders.double, 1)

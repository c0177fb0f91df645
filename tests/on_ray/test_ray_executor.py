"""`RayExecutor` follows the law of all executors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from loops_async import ClosedError, WorkerDiedError
from loops_async._executors import processes
from loops_async.ray import RayExecutor
from tests.support import graders
from tests.support.executor_law import ProcessLaw, is_written, result
from tests.support.work import eventually


@pytest.fixture(scope="module")
def connected(cluster: Cluster) -> Iterator[None]:
    ray.init(address=cluster.address, logging_level="error")
    yield
    ray.shutdown()


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


async def test_closing_ends_everything(connected: None, tmp_path: Path) -> None:
    async with RayExecutor(1, num_cpus=0.5) as executor:
        running = executor.submit(graders.hang, tmp_path / "pid")
        await eventually(lambda: is_written(tmp_path / "pid"))
    assert isinstance(running.exception(), WorkerDiedError)
    await eventually(lambda: not graders.is_alive(int((tmp_path / "pid").read_text())))
    with pytest.raises(ClosedError):
        executor.submit(graders.double, 1)

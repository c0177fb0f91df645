"""Futures: many waiters, none of which harms another, and outcomes that stay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from loops_async import (
    ClosedError,
    ConnectError,
    OperationFuture,
    OperationTimeoutError,
    ProtocolError,
    RemoteOpError,
)
from loops_async._tasks import TaskOwner

FAILED = RemoteOpError("no", operation_id="op", operation="optim_step", run_id="run", error_class="ValueError")


@pytest.fixture
async def owner() -> AsyncIterator[TaskOwner]:
    owner = TaskOwner()
    yield owner
    await owner.close()


class Service:
    """Stands in for the service: what it answers is set by the test, and how often it was asked is counted."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def collect(self) -> int:
        self.asked += 1
        return await asyncio.shield(self.answer)

    def renew(self) -> None:
        self.answer = asyncio.get_running_loop().create_future()


@pytest.fixture
async def service() -> Service:
    return Service()


def future_of(collect: Callable[[], Awaitable[int]], owner: TaskOwner) -> OperationFuture[int]:
    return OperationFuture(collect, tasks=owner, operation="optim_step", operation_id="op", run_id="run")


@pytest.fixture
async def future(service: Service, owner: TaskOwner) -> OperationFuture[int]:
    return future_of(service.collect, owner)


async def turns_of_the_loop(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_one_answer_for_many_waiters(service: Service, future: OperationFuture[int]) -> None:
    waiters = [asyncio.create_task(future.result()) for _ in range(10)]
    await turns_of_the_loop()
    assert not future.done()
    service.answer.set_result(7)
    assert await asyncio.gather(*waiters) == [7] * 10
    assert future.done()
    assert await future == 7
    assert service.asked == 1


async def test_the_outcome_comes_without_a_waiter(service: Service, future: OperationFuture[int]) -> None:
    service.answer.set_result(7)
    await turns_of_the_loop()
    assert future.done()


async def test_the_time_out_of_one_waiter_harms_no_other(service: Service, future: OperationFuture[int]) -> None:
    patient = asyncio.create_task(future.result())
    for timeout in (0.001, 0):
        with pytest.raises(OperationTimeoutError, match="can be waited for again") as late:
            await future.result(timeout=timeout)
        assert isinstance(late.value, TimeoutError)
        assert (late.value.operation_id, late.value.operation, late.value.run_id) == ("op", "optim_step", "run")
        assert late.value.retryable
    assert not patient.done()
    service.answer.set_result(7)
    assert await patient == 7
    assert await future.result(timeout=0) == 7
    assert service.asked == 1


async def test_the_cancellation_of_one_waiter_harms_no_other(service: Service, future: OperationFuture[int]) -> None:
    leaving, staying = (asyncio.create_task(future.result()) for _ in range(2))
    await turns_of_the_loop()
    leaving.cancel()
    await asyncio.wait([leaving])
    assert leaving.cancelled()
    assert not staying.done()
    service.answer.set_result(7)
    assert await staying == 7
    assert await future == 7


async def test_a_failure_is_an_outcome_and_stays(service: Service, future: OperationFuture[int]) -> None:
    service.answer.set_exception(FAILED)
    for _ in range(3):
        with pytest.raises(RemoteOpError, match="ValueError: no"):
            await future
    assert future.done()
    assert service.asked == 1


async def test_a_failures_traceback_does_not_grow_with_each_waiter(
    service: Service, future: OperationFuture[int]
) -> None:
    service.answer.set_exception(FAILED)
    depths = []
    for _ in range(3):
        with pytest.raises(RemoteOpError) as failed:
            await future
        depths.append(len(failed.traceback))
    assert depths[0] == depths[-1]


@pytest.mark.parametrize("unreachable", [ConnectError("gone"), ProtocolError("a proxy's page")], ids=repr)
async def test_not_reaching_the_service_is_no_outcome(
    service: Service, future: OperationFuture[int], unreachable: Exception
) -> None:
    service.answer.set_exception(unreachable)
    with pytest.raises(type(unreachable)):
        await future
    assert not future.done()
    service.renew()
    again = [asyncio.create_task(future.result()) for _ in range(3)]
    await turns_of_the_loop()
    service.answer.set_result(7)
    assert await asyncio.gather(*again) == [7] * 3
    assert service.asked == 2, "those who wait again share one question"


async def test_closing_says_so_to_who_waits_and_who_comes_later(
    owner: TaskOwner, service: Service, future: OperationFuture[int]
) -> None:
    waiting = asyncio.create_task(future.result())
    await turns_of_the_loop()
    await owner.close()
    for late in (waiting, future):
        with pytest.raises(ClosedError, match="optim_step op"):
            await late


async def test_what_is_known_survives_closing(owner: TaskOwner, service: Service, future: OperationFuture[int]) -> None:
    service.answer.set_result(7)
    assert await future == 7
    await owner.close()
    assert await future == 7


@pytest.mark.parametrize("is_dropped_first", [False, True])
async def test_a_failure_that_is_never_waited_for_is_logged_when_its_future_is_dropped(
    owner: TaskOwner, service: Service, caplog: pytest.LogCaptureFixture, is_dropped_first: bool
) -> None:
    futures = [future_of(service.collect, owner)]
    await turns_of_the_loop()
    if is_dropped_first:
        futures.clear()
    service.answer.set_exception(FAILED)
    await turns_of_the_loop()
    assert len(caplog.records) == is_dropped_first
    futures.clear()
    [record] = caplog.records
    assert record.getMessage().startswith("optim_step failed, and its result was never waited for: ValueError: no")


async def test_a_failure_that_is_waited_for_later_is_not_logged(
    owner: TaskOwner, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    step, optim = future_of(service.collect, owner), future_of(service.collect, owner)
    service.answer.set_exception(FAILED)
    await turns_of_the_loop()
    for future in (step, optim):
        with pytest.raises(RemoteOpError):
            await future
    del future, step, optim
    assert not caplog.records


async def test_a_failure_that_is_waited_for_is_not_logged(
    service: Service, future: OperationFuture[int], caplog: pytest.LogCaptureFixture
) -> None:
    waiting = asyncio.create_task(future.result())
    await turns_of_the_loop()
    service.answer.set_exception(FAILED)
    with pytest.raises(RemoteOpError):
        await waiting
    assert not caplog.records


async def test_repr_tells_the_state(service: Service, future: OperationFuture[int]) -> None:
    assert repr(future) == "<OperationFuture optim_step op pending>"
    service.answer.set_result(7)
    await future
    assert repr(future) == "<OperationFuture optim_step op done>"
    assert future.operation_id == "op"

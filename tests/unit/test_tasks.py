"""The owner of background tasks leaves none behind; values that many ask for are made once."""

from __future__ import annotations

import asyncio
import gc

import anyio
import pytest

from loops_async._tasks import SingleFlight, TaskOwner, run_to_completion
from loops_async.errors import ClosedError, ConnectError


async def forever(cleaned: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        cleaned.append("up")


async def test_close_waits_for_the_clean_up_of_every_task() -> None:
    owner, cleaned = TaskOwner(), list[str]()
    tasks = [owner.start(forever(cleaned), name="forever") for _ in range(3)]
    await asyncio.sleep(0)
    await owner.close()
    assert cleaned == ["up"] * 3
    assert all(task.cancelled() for task in tasks)
    await owner.close()


async def test_close_ends_what_its_own_closing_starts() -> None:
    owner, cleaned = TaskOwner(), list[str]()

    async def breeding() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            owner.start(forever(cleaned), name="late")

    owner.start(breeding(), name="breeding")
    await asyncio.sleep(0)
    await owner.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_result_in_the_moment_of_a_cancellation_is_not_lost(is_late: bool) -> None:
    owner, discarded = TaskOwner(), list[str]()

    async def make() -> str:
        if is_late:  # runs before the caller is told that this is done
            asyncio.get_running_loop().call_soon(calling.cancel)
        else:
            calling.cancel()
            await asyncio.sleep(0)
        return "made"

    async def discard(made: str) -> None:
        await asyncio.sleep(0)
        discarded.append(made)

    calling = asyncio.ensure_future(owner.run(make(), name="make", discard=discard))
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert discarded == ["made"] * is_late


async def cleaning_up(steps: list[int]) -> str:
    for number in range(10):
        steps.append(number)
        await asyncio.sleep(0)
    return "done"


async def test_run_to_completion_returns_what_came_of_it() -> None:
    assert await run_to_completion(cleaning_up([])) == "done"


@pytest.mark.parametrize("times", [1, 3])
async def test_run_to_completion_goes_on_though_its_caller_is_cancelled(times: int) -> None:
    steps: list[int] = []
    cleaning = asyncio.create_task(run_to_completion(cleaning_up(steps)))
    for _ in range(times):
        await asyncio.sleep(0)
        cleaning.cancel()
    await asyncio.wait([cleaning])
    assert cleaning.cancelled()
    assert steps == list(range(10))


async def test_run_to_completion_goes_on_in_a_cancelled_scope_without_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[object] = []
    wait = asyncio.wait
    monkeypatch.setattr(asyncio, "wait", lambda tasks: waits.append(tasks) or wait(tasks))
    steps: list[int] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        await run_to_completion(cleaning_up(steps))
    assert steps == list(range(10))
    assert len(waits) == 1


async def test_run_to_completion_passes_failures_on() -> None:
    async def failing() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_to_completion(failing())


async def test_finished_tasks_are_forgotten_and_named() -> None:
    owner = TaskOwner()

    async def seven() -> int:
        return 7

    task = owner.start(seven(), name="seven")
    assert task.get_name() == "loops_async: seven"
    assert await task == 7
    await asyncio.sleep(0)
    await owner.close()
    assert not task.cancelled()


async def test_a_background_task_that_dies_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    owner = TaskOwner()

    async def dying() -> None:
        raise ZeroDivisionError("odd")

    await asyncio.wait([owner.start_unattended(dying(), name="dying"), owner.start_unattended(noop(), name="well")])
    await asyncio.sleep(0)
    [record] = caplog.records
    assert record.getMessage() == "the background task loops_async: dying failed"
    assert record.exc_info
    assert isinstance(record.exc_info[1], ZeroDivisionError)


async def noop() -> None: ...


# --- single flight ---------------------------------------------------------------------------------------------------


async def test_a_value_is_made_once_for_all_who_ask() -> None:
    owner = TaskOwner()
    values: SingleFlight[str, object] = SingleFlight(owner)
    made: list[object] = []

    async def make() -> object:
        await asyncio.sleep(0)
        made.append(object())
        return made[-1]

    assert values.peek("a") is None
    found = await asyncio.gather(*(values.get("a", make) for _ in range(8)))
    assert found == [made[0]] * 8
    assert values.peek("a") is made[0]
    assert await values.get("b", make) is made[1]
    values.discard("a")
    assert await values.get("a", make) is made[2]
    await owner.close()


async def test_a_failure_reaches_everyone_and_is_forgotten() -> None:
    owner = TaskOwner()
    values: SingleFlight[str, int] = SingleFlight(owner)

    async def fail() -> int:
        await asyncio.sleep(0)
        raise ConnectError("down")

    async def succeed() -> int:
        return 1

    found = await asyncio.gather(*(values.get("a", fail) for _ in range(3)), return_exceptions=True)
    assert [str(error) for error in found] == ["down"] * 3
    assert values.peek("a") is None
    assert await values.get("a", succeed) == 1
    await owner.close()


async def test_one_caller_that_leaves_does_not_stop_the_others() -> None:
    owner = TaskOwner()
    values: SingleFlight[str, int] = SingleFlight(owner)
    release = asyncio.Event()

    async def make() -> int:
        await release.wait()
        return 1

    leaving, staying = (asyncio.create_task(values.get("a", make)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    release.set()
    assert await staying == 1
    assert leaving.cancelled()
    await owner.close()


async def test_a_failure_after_all_callers_have_left_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    leave = asyncio.Event()

    async def fail() -> None:
        await leave.wait()
        raise ConnectError("down")

    owner = TaskOwner()
    flight = SingleFlight[str, None](owner)
    caller = asyncio.create_task(flight.get("a", fail))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    leave.set()
    await asyncio.sleep(0.01)
    del caller, flight
    gc.collect()
    assert not caplog.records
    await owner.close()


async def test_closing_the_owner_ends_the_wait() -> None:
    owner = TaskOwner()
    values: SingleFlight[str, None] = SingleFlight(owner)

    async def make() -> None:
        await asyncio.Event().wait()

    waiting = asyncio.create_task(values.get("a", make))
    await asyncio.sleep(0)
    await owner.close()
    with pytest.raises(ClosedError, match="closed while it waited for a"):
        await waiting

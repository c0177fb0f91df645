"""The owner of background tasks leaves none behind."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from loops_async._tasks import TaskOwner, to_the_end


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


async def cleaning_up(steps: list[int]) -> str:
    for number in range(10):
        steps.append(number)
        await asyncio.sleep(0)
    return "done"


async def test_to_the_end_returns_what_came_of_it() -> None:
    assert await to_the_end(cleaning_up([])) == "done"


@pytest.mark.parametrize("times", [1, 3])
async def test_to_the_end_goes_on_though_its_caller_is_cancelled(times: int) -> None:
    steps: list[int] = []
    cleaning = asyncio.create_task(to_the_end(cleaning_up(steps)))
    for _ in range(times):
        await asyncio.sleep(0)
        cleaning.cancel()
    await asyncio.wait([cleaning])
    assert cleaning.cancelled()
    assert steps == list(range(10))


async def test_to_the_end_goes_on_in_a_cancelled_scope_without_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[object] = []
    wait = asyncio.wait
    monkeypatch.setattr(asyncio, "wait", lambda tasks: waits.append(tasks) or wait(tasks))
    steps: list[int] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        await to_the_end(cleaning_up(steps))
    assert steps == list(range(10))
    assert len(waits) == 1


async def test_to_the_end_passes_failures_on() -> None:
    async def failing() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await to_the_end(failing())


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

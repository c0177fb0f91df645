"""The owner of background tasks leaves none behind."""

from __future__ import annotations

import asyncio

from loops_async._tasks import TaskOwner


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


async def test_close_finishes_though_its_caller_is_cancelled() -> None:
    owner, cleaned = TaskOwner(), list[str]()
    owner.start(forever(cleaned), name="forever")
    await asyncio.sleep(0)
    closing = asyncio.create_task(owner.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    assert cleaned == ["up"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


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

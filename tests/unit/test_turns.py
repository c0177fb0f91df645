"""The order of operations, whatever is cancelled and whenever."""

from __future__ import annotations

import asyncio
import gc
import weakref

from hypothesis import given
from hypothesis import strategies as st

from loops_async._operations.turns import Turns
from tests.support.patience import PATIENCE_SECONDS

MEMBERS = 6

members = st.lists(st.integers(0, 3), min_size=1, max_size=MEMBERS)
"""For each member, for how many turns of the event loop it works when it is in."""

cancellations = st.lists(st.tuples(st.integers(0, 12), st.integers(0, MEMBERS - 1)), max_size=MEMBERS)
"""After how many turns of the event loop which member is cancelled."""


@given(members, cancellations)
def test_any_cancellations_keep_the_order(works: list[int], cancellations: list[tuple[int, int]]) -> None:
    asyncio.run(_keep_the_order(works, cancellations))


async def _keep_the_order(works: list[int], cancellations: list[tuple[int, int]]) -> None:
    turns = Turns()
    entered: list[int] = []
    inside: list[int] = []

    async def member(number: int) -> None:
        await taken[number].wait()
        entered.append(number)
        inside.append(number)
        try:
            assert inside == [number], "two are in at once"
            for _ in range(works[number]):
                await asyncio.sleep(0)
        finally:
            inside.remove(number)

    taken = [turns.take() for _ in works]
    tasks = [asyncio.create_task(member(number)) for number in range(len(works))]
    for task, turn in zip(tasks, taken, strict=True):
        # Also a task that never started ends its turn.
        task.add_done_callback(lambda _, turn=turn: turn.end())
    cancelled = set()
    for step in range(13):
        for when, who in cancellations:
            if when == step and who < len(tasks):
                tasks[who].cancel()
                cancelled.add(who)
        await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE_SECONDS):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert entered == sorted(entered)
    assert set(entered) >= set(range(len(works))) - cancelled, "someone waits for a turn that never comes"
    assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)


async def test_a_turn_that_ends_early_lets_no_other_overtake() -> None:
    turns = Turns()
    first, second, third = turns.take(), turns.take(), turns.take()
    second.end()
    waiting = asyncio.create_task(third.wait())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done(), "the first is still in"
    first.end()
    await asyncio.wait_for(waiting, PATIENCE_SECONDS)


async def test_ending_twice_is_harmless() -> None:
    turns = Turns()
    first, second = turns.take(), turns.take()
    for turn in (first, first, second, second):
        turn.end()
    await asyncio.wait_for(turns.take().wait(), PATIENCE_SECONDS)


async def test_a_long_chain_of_turns_is_not_kept() -> None:
    turns = Turns()
    earliest = turns.take()
    kept = weakref.ref(earliest.done)
    earliest.end()
    del earliest
    for _ in range(3):
        turn = turns.take()
        await turn.wait()
        turn.end()
    gc.collect()
    assert kept() is None

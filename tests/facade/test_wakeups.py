"""Wake-ups of other event loops: nothing is lost, the order is kept, and an iteration wakes each loop once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops_sync._wakeups import Wakeups


class Waiting(asyncio.SelectorEventLoop):
    """A loop that waits, and counts how often it is woken."""

    def __init__(self) -> None:
        super().__init__()
        self.times_woken = 0
        self.called: list[int] = []

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        self.times_woken += 1
        return super().call_soon_threadsafe(callback, *args, context=context)

    def run_what_is_there(self) -> None:
        self.call_soon(self.stop)
        self.run_forever()


@contextmanager
def opened(count: int) -> Generator[tuple[Wakeups, asyncio.AbstractEventLoop, list[Waiting]]]:
    """Yield what wakes, the loop that it gathers on, and loops that wait."""
    own, waiting = asyncio.new_event_loop(), [Waiting() for _ in range(count)]
    try:
        yield Wakeups(), own, waiting
    finally:
        for loop in (own, *waiting):
            loop.close()


def fail() -> None:
    raise ValueError("mine")


def numbers_of(iterations: list[list[int]], target: int) -> list[list[int]]:
    """Return which calls of each iteration are for a target; calls are numbered."""
    numbers = iter(range(sum(map(len, iterations))))
    numbered = [[(target, next(numbers)) for target in each] for each in iterations]
    return [[number for each, number in iteration if each == target] for iteration in numbered]


ITERATIONS = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=6)


@given(ITERATIONS, st.booleans())
def test_each_function_is_called_once_in_order(iterations: list[list[int]], ends_early: bool) -> None:
    with opened(3) as (wakeups, own, targets):

        async def call() -> None:
            number = 0
            for iteration in iterations:
                for target in iteration:
                    waiting = targets[target]
                    wakeups.call_soon(waiting, partial(waiting.called.append, number))
                    number += 1
                await asyncio.sleep(0)

        with wakeups.gathering(own):
            task = own.create_task(call())
            if ends_early:  # in the middle of an iteration that has calls, or of none
                task.add_done_callback(lambda _: own.stop())
                own.run_forever()
            else:
                own.run_until_complete(task)
                own.run_until_complete(asyncio.sleep(0))
        for index, waiting in enumerate(targets):
            waiting.run_what_is_there()
            expected = numbers_of(iterations, index)
            assert waiting.called == list(chain(*expected))
            assert waiting.times_woken == sum(map(bool, expected))


def test_what_the_last_iteration_gathered_is_sent_at_the_end() -> None:
    with opened(1) as (wakeups, own, [waiting]):

        def call_and_stop() -> None:
            wakeups.call_soon(waiting, partial(waiting.called.append, 1))
            own.stop()

        with wakeups.gathering(own):
            own.call_soon(call_and_stop)
            own.run_forever()
            assert not waiting.times_woken
        waiting.run_what_is_there()
        assert waiting.called == [1]


def test_a_thread_that_gathers_nothing_wakes_at_once() -> None:
    with opened(1) as (wakeups, _, [waiting]):
        for number in range(2):
            wakeups.call_soon(waiting, partial(waiting.called.append, number))
        assert waiting.times_woken == 2
        waiting.run_what_is_there()
        assert waiting.called == [0, 1]


def test_a_closed_loop_and_a_failing_function_harm_no_others() -> None:
    with opened(2) as (wakeups, own, [closed, waiting]):
        closed.close()
        failures: list[object] = []
        waiting.set_exception_handler(lambda _, context: failures.append(context["exception"]))

        async def call() -> None:
            wakeups.call_soon(closed, lambda: pytest.fail("it is closed"))
            wakeups.call_soon(waiting, fail)
            wakeups.call_soon(waiting, partial(waiting.called.append, 1))

        with wakeups.gathering(own):
            own.run_until_complete(call())
        waiting.run_what_is_there()
        waiting.run_what_is_there()
        assert waiting.called == [1]
        assert [type(each) for each in failures] == [ValueError]

"""Time limits that forgive a held event loop, and what is said while something is waited for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from loops_async import _waiting
from loops_async._waiting import HoldWarning, TimeLimit
from loops_async._work.registry import Work
from loops_async._work.waits import Waits
from loops_async.errors import LoopsError
from tests.support.clock import LoopClock


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> LoopClock:
    clock = LoopClock()
    clock.install(monkeypatch)
    return clock


async def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    with TimeLimit(5) as limit:
        await asyncio.sleep(0)
    assert limit.seconds == 5


@pytest.mark.parametrize("seconds", [0.0, 0.01])
async def test_a_limit_ends_its_block_and_what_follows_goes_on(seconds: float) -> None:
    with TimeLimit(seconds):
        await asyncio.Event().wait()
    await asyncio.sleep(0)  # nothing is left of the cancellation
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_no_limit_never_ends(clock: LoopClock) -> None:
    with TimeLimit(None):
        await asyncio.sleep(10_000)
        return
    pytest.fail("there is no limit")


async def test_a_cancellation_from_elsewhere_is_let_on() -> None:
    async def wait() -> None:
        with TimeLimit(5):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_inner_of_two_limits_ends_only_its_block() -> None:
    reached = False
    with TimeLimit(5):
        with TimeLimit(0.01):
            await asyncio.Event().wait()
        reached = True
    assert reached


async def test_time_that_is_paused_does_not_count(clock: LoopClock) -> None:
    was_there = False
    with TimeLimit(0.05) as limit:
        with limit.paused():
            await asyncio.sleep(0.1)
        was_there = True
        await asyncio.Event().wait()
    assert was_there


async def test_an_answer_that_arrived_while_the_loop_was_held_is_read() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"here\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        got = b""
        with TimeLimit(0.01):
            time.sleep(_waiting.LATE_SECONDS + 0.1)  # noqa: ASYNC251 - as a program does that holds the loop
            got = await reader.readline()
        assert got == b"here\n"
        writer.close()
        await writer.wait_closed()


async def test_a_program_that_holds_the_loop_is_told_once(
    clock: LoopClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_waiting, "hold_warning", HoldWarning())

    async def wait() -> None:
        with TimeLimit(0.01):
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(wait()) for _ in range(3)]
    await asyncio.sleep(0)
    clock.now += 2.5
    await asyncio.gather(*tasks)
    assert caplog.text.count("held the event loop for at least 2.5 s") == caplog.text.count("held") == 1


async def test_a_program_that_always_holds_the_loop_does_not_wait_for_ever(
    clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_waiting, "LATE_SECONDS", 0.0)
    with TimeLimit(0.01):
        await asyncio.Event().wait()


# --- what is said ---


@pytest.fixture
def clock_of_holds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(_waiting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def waits(clock: LoopClock) -> Iterator[Waits]:
    waits = Waits()
    yield waits
    waits.close()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


async def test_what_is_waited_for_is_said_once_until_there_is_news(
    waits: Waits, caplog: pytest.LogCaptureFixture
) -> None:
    with waits.on("operation o1") as wait:
        for news in ("it is not done yet", "it is not done yet", "half of it is done"):
            wait.heard(news)
            await asyncio.sleep(100)
    assert warnings(caplog) == [
        "still waiting for operation o1, for 30 s now; last answer: it is not done yet",
        "still waiting for operation o1, for 230 s now; last answer: half of it is done",
    ]


async def test_the_place_in_the_program_is_said(waits: Waits, caplog: pytest.LogCaptureFixture) -> None:
    work = Work()

    async def library() -> None:
        with work.begin("operation", "forward"), waits.on("operation o1"):
            await asyncio.sleep(40)

    async def train() -> None:
        await library()

    await train()
    work.close()
    assert "called at library (" in caplog.text
    assert f"{__file__}:" in caplog.text


# --- a loop that is held ---


def test_one_hold_is_said_once_whatever_notices_it(
    clock_of_holds: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    warning = HoldWarning()
    warning.say_while_held(1.2, ", in the task t", ["grade (a.py:3)", "main (a.py:9)"])
    clock_of_holds[0] += 1.0
    warning.say_while_held(2.2, ", in the task t", ["grade (a.py:3)"])
    clock_of_holds[0] += 0.3
    warning.say(2.5)
    (said,) = warnings(caplog)
    assert "for 1.2 s now, in the task t, in grade (a.py:3), called by main (a.py:9)" in said


def test_a_culprit_is_said_again_only_after_another_one(
    clock_of_holds: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    warning = HoldWarning()
    for culprit in ("a", "a", "b", "a"):
        clock_of_holds[0] += 100.0
        warning.say_while_held(1.0, "", [culprit])
    assert [text.partition("now, in ")[2][0] for text in warnings(caplog)] == ["a", "b", "a"]


def test_without_a_culprit_only_much_longer_ones_are_said(
    clock_of_holds: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    warning = HoldWarning()
    for seconds in (1.5, 1.5, 2.0, 3.0, 1.0):
        clock_of_holds[0] += 100.0
        warning.say(seconds)
    assert [text.partition("at least ")[2][:3] for text in warnings(caplog)] == ["1.5", "3.0"]


async def test_news_postpone_it(waits: Waits, caplog: pytest.LogCaptureFixture) -> None:
    with waits.on("operation o1") as wait:
        for number in range(12):
            wait.heard(f"{number} of 12 done")
            await asyncio.sleep(29)
    assert not warnings(caplog)


async def test_of_many_that_wait_for_the_same_one_is_named(waits: Waits, caplog: pytest.LogCaptureFixture) -> None:
    with waits.on("sample s1", queue="samples"), waits.on("sample s2", queue="samples"), waits.on("sample s3"):
        await asyncio.sleep(40)
    assert [text.partition(",")[0] for text in warnings(caplog)] == [
        "still waiting for sample s1 (and 1 more)",
        "still waiting for sample s3",
    ]


async def test_one_that_ends_is_news_for_the_others(waits: Waits, caplog: pytest.LogCaptureFixture) -> None:
    with waits.on("sample s1", queue="samples"):
        for _ in range(12):
            with waits.on("sample s2", queue="samples"):
                await asyncio.sleep(29)
    assert not warnings(caplog)


async def test_a_failed_attempt_is_the_last_answer(waits: Waits, caplog: pytest.LogCaptureFixture) -> None:
    with waits.on("operation o1") as wait:
        with pytest.raises(LoopsError), wait.hearing():
            raise LoopsError("answered 503")
        await asyncio.sleep(40)
    assert warnings(caplog) == ["still waiting for operation o1, for 30 s now; last answer: answered 503"]

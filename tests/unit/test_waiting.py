"""Time limits that forgive a held event loop, and what is said while something is waited for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator

import pytest

from loops_async import _waiting
from loops_async._waiting import TimeLimit, Waits
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
    monkeypatch.setattr(_waiting.hold_warning, "_said", float("-inf"))

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
def waits(clock: LoopClock) -> Iterator[Waits]:
    waits = Waits()
    yield waits
    waits.close()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


async def test_what_is_waited_for_is_said_at_growing_intervals(waits: Waits, caplog: pytest.LogCaptureFixture) -> None:
    with waits.on("operation o1") as wait:
        wait.heard("it is not done yet")
        await asyncio.sleep(200)
    assert warnings(caplog) == [
        f"still waiting for operation o1, for {seconds} s now; last answer: it is not done yet"
        for seconds in (30, 60, 120)
    ]


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

"""One schedule of pings for all trainers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextvars import ContextVar

import pytest

from loops_async._session.heartbeat import Heartbeat
from loops_async._tasks import TaskOwner
from loops_async.errors import ApiError, ClosedError, ConnectError, ServerError
from tests.support.clock import Clock
from tests.support.patience import PATIENCE_SECONDS

GONE = ConnectError("gone")


@pytest.fixture
async def heartbeat(clock: Clock) -> AsyncIterator[Heartbeat]:
    owner = TaskOwner()
    yield Heartbeat(owner)
    await owner.close()


class Trainer:
    """Answers pings as told: each entry is an error, or None for an answer that all is well; the last one repeats."""

    def __init__(self, clock: Clock, *answers: BaseException | None) -> None:
        self.clock = clock
        self.answers = list(answers) or [None]
        self.pinged_at: list[float] = []
        self._seen = asyncio.Event()

    async def ping(self) -> None:
        self.pinged_at.append(self.clock.now)
        self._seen.set()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is not None:
            raise answer

    async def pinged(self, times: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.pinged_at) < times:
                self._seen.clear()
                await self._seen.wait()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


async def test_all_are_pinged_once_a_minute_at_the_same_time(heartbeat: Heartbeat, clock: Clock) -> None:
    trainers = [Trainer(clock) for _ in range(3)]
    for number, trainer in enumerate(trainers):
        heartbeat.add(f"trainer {number}", trainer, trainer.ping)
    for trainer in trainers:
        await trainer.pinged(3)
    assert [trainer.pinged_at[:3] for trainer in trainers] == [[60.0, 120.0, 180.0]] * 3


async def test_one_that_fails_does_not_stop_the_others(heartbeat: Heartbeat, clock: Clock) -> None:
    failing, well = Trainer(clock, GONE), Trainer(clock)
    heartbeat.add("failing", failing, failing.ping)
    heartbeat.add("well", well, well.ping)
    await well.pinged(25)
    assert well.pinged_at[:25] == [60.0 * beat for beat in range(1, 26)]


async def test_a_failure_is_said_once_and_again_when_it_is_another_one(
    heartbeat: Heartbeat, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [ServerError("broken", status=status) for status in (500, 500, 502)]
    failing, well = Trainer(clock, None, *[GONE] * 5, *broken, *[GONE] * 5), Trainer(clock)
    heartbeat.add("the trainer of run r", failing, failing.ping)
    heartbeat.add("well", well, well.ping)
    await well.pinged(30)
    assert len(failing.pinged_at) >= 29
    failed = "the trainer of run r did not answer a ping, and may be scaled to zero when that goes on:"
    assert warnings(caplog) == [f"{failed} {error}" for error in ("gone", "broken", "broken", "gone")]


async def test_one_that_answers_again_is_said_to_and_its_next_failure_is_new(
    heartbeat: Heartbeat, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loops_async")
    recovering = Trainer(clock, *[GONE] * 4, None, *[GONE] * 4, None)
    heartbeat.add("recovering", recovering, recovering.ping)
    await recovering.pinged(30)
    assert len(warnings(caplog)) == 2
    assert [one.getMessage() for one in caplog.records].count("recovering answers pings again") == 2


@pytest.mark.parametrize("status", [400, 401, 404, 429])
async def test_a_4xx_is_an_answer(
    heartbeat: Heartbeat, clock: Clock, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    answering = Trainer(clock, ApiError("m", status=status))
    heartbeat.add("answering", answering, answering.ping)
    await answering.pinged(30)
    assert warnings(caplog) == []


async def test_a_5xx_is_a_failure(heartbeat: Heartbeat, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    broken = Trainer(clock, ServerError("broken", status=500))
    heartbeat.add("broken", broken, broken.ping)
    await broken.pinged(6)
    assert len(warnings(caplog)) == 1


async def test_removed_is_pinged_no_more(heartbeat: Heartbeat, clock: Clock) -> None:
    leaving, staying = Trainer(clock), Trainer(clock)
    heartbeat.add("leaving", leaving, leaving.ping)
    heartbeat.add("staying", staying, staying.ping)
    await staying.pinged(2)
    heartbeat.remove("leaving", leaving)
    heartbeat.remove("never was", leaving)
    seen = len(leaving.pinged_at)
    await staying.pinged(10)
    assert len(leaving.pinged_at) == seen


async def test_removed_while_its_ping_fails_is_not_counted(heartbeat: Heartbeat, clock: Clock) -> None:
    beaten = asyncio.Event()

    async def remove_itself() -> None:
        heartbeat.remove("leaving", well)
        beaten.set()
        raise ClosedError("closed")

    well = Trainer(clock)
    heartbeat.add("leaving", well, remove_itself)
    heartbeat.add("well", well, well.ping)
    await well.pinged(3)
    assert beaten.is_set()


@pytest.mark.parametrize("error", [ZeroDivisionError("odd"), asyncio.CancelledError()], ids=repr)
async def test_a_ping_may_raise_anything(heartbeat: Heartbeat, clock: Clock, error: BaseException) -> None:
    failing, well = Trainer(clock, error), Trainer(clock)
    heartbeat.add("failing", failing, failing.ping)
    heartbeat.add("well", well, well.ping)
    await well.pinged(10)
    assert well.pinged_at[:10] == [60.0 * beat for beat in range(1, 11)]
    assert len(failing.pinged_at) >= 9


async def test_a_heartbeat_that_was_cancelled_starts_again_with_the_next_trainer(
    heartbeat: Heartbeat, clock: Clock
) -> None:
    first, second = Trainer(clock), Trainer(clock)
    heartbeat.add("first", first, first.ping)
    await first.pinged(1)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
        await asyncio.wait([task])
    heartbeat.add("second", second, second.ping)
    seen = len(first.pinged_at)
    await first.pinged(seen + 2)
    await second.pinged(2)


async def test_a_trainer_whose_client_is_collected_is_not_pinged(heartbeat: Heartbeat, clock: Clock) -> None:
    class Client:
        pass

    dropped, kept, trainer, other = Client(), Client(), Trainer(clock), Trainer(clock)
    heartbeat.add("trainer", dropped, trainer.ping)
    heartbeat.add("trainer", kept, trainer.ping)
    heartbeat.add("other", other, other.ping)
    del dropped
    await other.pinged(2)
    assert len(trainer.pinged_at) >= 1
    del kept
    seen = len(trainer.pinged_at)
    await other.pinged(10)
    assert len(trainer.pinged_at) <= seen + 1


async def test_nothing_runs_before_the_first_trainer(clock: Clock) -> None:
    Heartbeat(TaskOwner())
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_ping_is_no_part_of_what_was_under_way_when_the_heartbeat_began(
    heartbeat: Heartbeat, clock: Clock
) -> None:
    caller = ContextVar("caller", default="nothing")
    seen: list[str] = []

    async def ping() -> None:
        seen.append(caller.get())
        await trainer.ping()

    trainer = Trainer(clock)
    caller.set("a trace of the program")
    heartbeat.add("trainer", trainer, ping)
    await trainer.pinged(1)
    assert seen[0] == "nothing"

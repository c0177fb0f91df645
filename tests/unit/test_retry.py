"""When a call is made again, after which pause, and when that ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest

from loops_async._http.retry import CONTROL_PLANE, POLL, READ, SUBMIT, RetryPolicy, retry, until, was_not_sent
from loops_async.errors import (
    ApiError,
    BadRequestError,
    ConnectError,
    LoopsError,
    ProtocolError,
    RateLimitError,
    RequestTimeoutError,
    SampleTimeoutError,
    ServerError,
)
from tests.support.clock import Clock


class Failing:
    """A call that fails with the given errors, one after the other, and then returns 7."""

    def __init__(self, *errors: Exception, forever: bool = False) -> None:
        self.errors = list(errors)
        self.forever = forever
        self.calls = 0

    async def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors[0] if self.forever else self.errors.pop(0)
        return 7


def slow_down(retry_after: float | None) -> ServerError:
    return ServerError("busy", status=503, retry_after=retry_after)


async def test_success_costs_no_pause(clock: Clock) -> None:
    assert await retry(Failing(), READ, what="w") == 7
    assert clock.pauses == []


async def test_pauses_double_up_to_the_longest_and_are_spread(clock: Clock) -> None:
    call = Failing(*(ConnectError("gone") for _ in range(10)))
    assert await retry(call, (RetryPolicy(first_pause=0.5, longest_pause=30.0),), what="w") == 7
    tops = [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert len(clock.pauses) == len(tops)
    assert all(top / 2 <= pause <= top for pause, top in zip(clock.pauses, tops, strict=True))
    assert len(set(clock.pauses)) == len(tops), "many clients must not come back at once"


@pytest.mark.parametrize(("said", "pause"), [(3.0, 3.0), (0.25, 0.25), (60.0, 60.0), (86400.0, 60.0)])
async def test_retry_after_replaces_the_pause_up_to_a_minute(clock: Clock, said: float, pause: float) -> None:
    assert await retry(Failing(slow_down(said)), READ, what="w") == 7
    assert clock.pauses == [pause]


async def test_tries_count_calls_and_the_last_error_is_raised_as_it_is(clock: Clock) -> None:
    errors = [ConnectError(str(number)) for number in range(9)]
    call = Failing(*errors)
    with pytest.raises(ConnectError) as last:
        await retry(call, (RetryPolicy(tries=4),), what="w")
    assert call.calls == 4
    assert last.value is errors[3]
    assert last.value.__cause__ is None
    assert len(clock.pauses) == 3


@pytest.mark.parametrize("policies", [SUBMIT, POLL], ids=["submit", "poll"])
async def test_seconds_bound_the_whole(clock: Clock, policies: tuple[RetryPolicy, ...]) -> None:
    call = Failing(ConnectError("gone"), forever=True)
    with pytest.raises(ConnectError):
        await retry(call, policies, what="w")
    [policy] = policies
    assert policy.seconds is not None
    assert clock.now == pytest.approx(policy.seconds), "it tries once more when the time is just over, not later"


async def test_each_policy_has_a_budget_of_its_own(clock: Clock) -> None:
    refused = [RateLimitError("slow", status=429) for _ in range(9)]
    call = Failing(*refused[:5], ServerError("down", status=503), *refused[5:], ServerError("down", status=503))
    assert await retry(call, (CONTROL_PLANE[0], RetryPolicy(tries=3)), what="w") == 7
    assert call.calls == 12

    down = Failing(RateLimitError("slow", status=429), *(ServerError("down", status=503) for _ in range(3)))
    with pytest.raises(ServerError):
        await retry(down, (CONTROL_PLANE[0], RetryPolicy(tries=3)), what="w")
    assert down.calls == 4


async def test_seconds_count_from_the_first_error_of_their_kind(clock: Clock) -> None:
    unreached = RetryPolicy(kind=ConnectError, seconds=5.0, first_pause=1.0, longest_pause=1.0)
    busy = [slow_down(10.0) for _ in range(4)]
    call = Failing(*busy, ConnectError("gone"), ConnectError("gone"))
    assert await retry(call, (unreached, RetryPolicy(seconds=60.0)), what="w") == 7
    assert clock.now > 40


async def test_a_poll_is_repeated_after_two_to_four_seconds(clock: Clock) -> None:
    await retry(Failing(*(ConnectError("gone") for _ in range(5))), POLL, what="w")
    assert all(1 <= pause <= 4 for pause in clock.pauses)


@pytest.mark.parametrize(
    "error",
    [BadRequestError("no", status=400), SampleTimeoutError("late"), ProtocolError("html"), LoopsError("x")],
    ids=lambda error: type(error).__name__,
)
async def test_what_cannot_help_is_not_repeated(clock: Clock, error: LoopsError) -> None:
    call = Failing(error, forever=True)
    with pytest.raises(type(error)) as raised:
        await retry(call, READ, what="w")
    assert raised.value is error
    assert (call.calls, clock.pauses) == (1, [])


async def test_an_error_that_cannot_help_ends_the_trying_later_too(clock: Clock) -> None:
    call = Failing(ConnectError("gone"), BadRequestError("no", status=400), forever=False)
    with pytest.raises(BadRequestError):
        await retry(call, READ, what="w")
    assert call.calls == 2


@pytest.mark.parametrize("error", [ZeroDivisionError(), asyncio.CancelledError()], ids=repr)
async def test_foreign_errors_pass(clock: Clock, error: BaseException) -> None:
    async def call() -> None:
        raise error

    with pytest.raises(type(error)):
        await retry(call, READ, what="w")
    assert clock.pauses == []


@pytest.mark.parametrize(
    ("error", "certain"),
    [
        (ConnectError("refused", was_sent=False), True),
        (ConnectError("broke", was_sent=True), False),
        (RateLimitError("slow", status=429), True),
        (slow_down(None), True),
        (ServerError("gateway", status=502), False),
        (ServerError("gateway", status=504), False),
        (RequestTimeoutError("late"), False),
        (ApiError("hold", status=408), False),
    ],
    ids=repr,
)
async def test_what_costs_money_is_repeated_only_when_it_certainly_was_not_done(
    clock: Clock, error: LoopsError, certain: bool
) -> None:
    call = Failing(error)
    if certain:
        assert await retry(call, READ, what="w", when=was_not_sent) == 7
    else:
        with pytest.raises(type(error)):
            await retry(call, READ, what="w", when=was_not_sent)
        assert call.calls == 1


async def test_each_repetition_is_logged_with_its_reason(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "loops_async"):
        await retry(Failing(slow_down(3.0)), READ, what="no session yet")
    assert [record.getMessage() for record in caplog.records] == ["no session yet; retrying in 3.0 s: busy"]


# --- until -----------------------------------------------------------------------------------------------------------


def found_at(call: int) -> Callable[[], Awaitable[int | None]]:
    calls = iter(range(1, call + 1))

    async def probe() -> int | None:
        number = next(calls)
        return number if number == call else None

    return probe


async def test_until_probes_at_once_then_after_growing_pauses(clock: Clock) -> None:
    assert await until(found_at(1), seconds=60) == 1
    assert clock.pauses == []
    assert await until(found_at(30), seconds=3600, longest_pause=10.0) == 30
    assert clock.pauses[0] == pytest.approx(0.25, rel=0.11)
    assert max(clock.pauses) == pytest.approx(10, rel=0.11)
    for (spent, pause), _ in pairwise(zip(_sums(clock.pauses), clock.pauses, strict=True)):
        assert pause <= 0.3 + 0.33 * spent, "the news is never late by much more than a quarter of the wait"


def _sums(pauses: list[float]) -> list[float]:
    return [sum(pauses[:index]) for index in range(len(pauses))]


async def test_until_gives_up_in_time() -> None:
    async with asyncio.timeout(5):
        assert await until(found_at(10_000), seconds=0.01) is None


async def test_until_passes_errors_on(clock: Clock) -> None:
    with pytest.raises(ConnectError):
        await until(Failing(ConnectError("gone")), seconds=60)


async def test_until_does_not_wait_for_a_probe_that_hangs() -> None:
    async def hangs() -> int | None:
        await asyncio.Event().wait()
        return None

    async with asyncio.timeout(5):
        assert await until(hangs, seconds=0.01) is None

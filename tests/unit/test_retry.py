"""When a call is made again, after which pause, and when that ends."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest

from loops_async._http.retry import (
    BUSY,
    CALLS,
    CREATION,
    DOWNLOAD,
    OPERATION,
    OUTAGE,
    POLL,
    READ,
    SAMPLE,
    Call,
    Failure,
    RetryBudget,
    RetryPolicy,
    failure_of,
    retry,
    until,
)
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
from tests.support.patience import PATIENCE_SECONDS

UNREACHED = ConnectError("refused", was_sent=False)
BROKE = ConnectError("broke")


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


async def tried(call: Failing, kind: Call = READ, *, budget: RetryBudget | None = None) -> int:
    return await retry(call, kind, what="w", budget=budget or RetryBudget())


def having(policy: RetryPolicy) -> Call:
    return Call(name="c", unreached=policy, turned_away=policy, lost=policy, cut=policy, broken=policy)


async def test_success_costs_no_pause(clock: Clock) -> None:
    assert await tried(Failing()) == 7
    assert clock.pauses == []


async def test_pauses_double_up_to_the_longest_and_are_spread(clock: Clock) -> None:
    call = Failing(*(ConnectError("gone") for _ in range(10)))
    policy = RetryPolicy(tries=99, seconds=999.0, first_pause=0.5, longest_pause=30.0)
    assert await tried(call, having(policy)) == 7
    tops = [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert len(clock.pauses) == len(tops)
    assert all(top / 2 <= pause <= top for pause, top in zip(clock.pauses, tops, strict=True))
    assert len(set(clock.pauses)) == len(tops), "many clients must not come back at once"


@pytest.mark.parametrize(("hint", "pause"), [(3.0, 3.0), (60.0, 60.0), (120.0, 120.0), (86400.0, BUSY.seconds)])
async def test_retry_after_lengthens_a_pause_up_to_the_time_that_is_left(
    clock: Clock, hint: float, pause: float
) -> None:
    assert await tried(Failing(slow_down(hint))) == 7
    assert clock.pauses == [pause]


@pytest.mark.parametrize("hint", [0.0, -5.0, 0.1, math.nan, math.inf, -math.inf])
async def test_retry_after_never_shortens_a_pause(clock: Clock, hint: float) -> None:
    assert await tried(Failing(slow_down(hint), slow_down(hint))) == 7
    assert 0.5 <= clock.pauses[0] <= 1.0 <= clock.pauses[1] <= 2.0


async def test_tries_count_calls_and_the_last_error_is_raised_as_it_is(clock: Clock) -> None:
    errors = [ConnectError(str(number)) for number in range(9)]
    call = Failing(*errors)
    with pytest.raises(ConnectError) as last:
        await tried(call, having(RetryPolicy(tries=4, seconds=999.0)))
    assert call.calls == 4
    assert last.value is errors[3]
    assert last.value.__cause__ is None
    assert len(clock.pauses) == 3


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.name)
async def test_every_policy_is_limited_in_tries_and_in_time(clock: Clock, kind: Call) -> None:
    for failure in Failure:
        policy = kind.policy(failure)
        assert policy is None or (policy.tries < math.inf and policy.seconds < math.inf)
    call = Failing(UNREACHED, forever=True)
    with pytest.raises(ConnectError):
        await tried(call, kind)
    assert kind.unreached is not None
    assert clock.now <= kind.unreached.seconds


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.name)
async def test_every_call_bears_an_outage_of_a_minute(clock: Clock, kind: Call) -> None:
    async def call() -> int:
        if clock.now < 60:
            raise UNREACHED
        return 7

    for _ in range(20):
        clock.now = 0.0
        assert await retry(call, kind, what="w", budget=RetryBudget()) == 7


async def test_each_policy_has_tries_of_its_own(clock: Clock) -> None:
    policy = RetryPolicy(tries=3, seconds=999.0)
    kind = Call(name="c", unreached=BUSY, turned_away=BUSY, lost=policy, cut=None, broken=None)
    busy = [RateLimitError("slow", status=429) for _ in range(9)]
    assert await tried(Failing(*busy[:5], BROKE, *busy[5:], BROKE), kind) == 7
    down = Failing(busy[0], BROKE, BROKE, BROKE)
    with pytest.raises(ConnectError):
        await tried(down, kind)
    assert down.calls == 4


async def test_seconds_count_from_the_first_error_of_their_kind(clock: Clock) -> None:
    unreached = RetryPolicy(tries=9, seconds=5.0, first_pause=1.0, longest_pause=1.0)
    kind = Call(name="c", unreached=unreached, turned_away=BUSY, lost=None, cut=None, broken=None)
    assert await tried(Failing(*(slow_down(10.0) for _ in range(4)), UNREACHED, UNREACHED), kind) == 7
    assert clock.now > 40


async def test_a_poll_is_repeated_after_two_to_four_seconds(clock: Clock) -> None:
    await tried(Failing(*(ConnectError("gone") for _ in range(5))), POLL)
    assert all(1 <= pause <= 4 for pause in clock.pauses)


async def test_progress_starts_the_tries_and_the_time_again(clock: Clock) -> None:
    size = 0

    async def call() -> int:
        nonlocal size
        if size >= 100:
            return 7
        size += 1
        raise BROKE

    assert await retry(call, DOWNLOAD, what="w", budget=RetryBudget(), progress=lambda: size) == 7
    assert max(clock.pauses) <= OUTAGE.first_pause


@pytest.mark.parametrize(
    "error",
    [BadRequestError("no", status=400), SampleTimeoutError("late"), ProtocolError("html"), LoopsError("x")],
    ids=lambda error: type(error).__name__,
)
async def test_what_cannot_help_is_not_repeated(clock: Clock, error: LoopsError) -> None:
    call = Failing(error, forever=True)
    with pytest.raises(type(error)) as raised:
        await tried(call)
    assert raised.value is error
    assert (call.calls, clock.pauses) == (1, [])


async def test_an_error_that_cannot_help_ends_the_trying_later_too(clock: Clock) -> None:
    call = Failing(ConnectError("gone"), BadRequestError("no", status=400), forever=False)
    with pytest.raises(BadRequestError):
        await tried(call)
    assert call.calls == 2


@pytest.mark.parametrize("error", [ZeroDivisionError(), asyncio.CancelledError()], ids=repr)
async def test_foreign_errors_pass(clock: Clock, error: BaseException) -> None:
    async def call() -> None:
        raise error

    with pytest.raises(type(error)):
        await retry(call, READ, what="w", budget=RetryBudget())
    assert clock.pauses == []


def gateway(status: int) -> ServerError:
    error = ServerError("page", status=status)
    error.from_gateway = error.may_have_acted = True
    return error


def final(status: int) -> ApiError:
    error = ApiError("deactivated", status=status)
    error.retryable = error.may_have_acted = False
    return error


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (UNREACHED, Failure.UNREACHED),
        (RateLimitError("slow", status=429), Failure.TURNED_AWAY),
        (slow_down(None), Failure.TURNED_AWAY),
        (BROKE, Failure.LOST),
        (ConnectError("cut", has_begun=True), Failure.CUT),
        (RequestTimeoutError("late"), Failure.LOST),
        (ApiError("hold", status=408), Failure.LOST),
        *((gateway(status), Failure.LOST) for status in (502, 503, 504, 520, 524)),
        (ServerError("bug", status=500), Failure.BROKEN),
        (ProtocolError("html", status=200), Failure.BROKEN),
        (ProtocolError("not HTTP"), Failure.BROKEN),
        (ProtocolError("redirect", status=307), None),
        (ProtocolError("page", status=404), None),
        (ServerError("not offered", status=501), None),
        (final(429), None),
        (final(502), None),
        (SampleTimeoutError("late"), None),
        (BadRequestError("no", status=400), None),
    ],
    ids=repr,
)
async def test_the_kind_of_a_failure_decides_what_is_repeated(
    clock: Clock, error: LoopsError, failure: Failure | None
) -> None:
    assert failure_of(error) is failure
    for kind in CALLS:
        call = Failing(error)
        if failure is not None and kind.policy(failure) is not None:
            assert await tried(call, kind) == 7
        else:
            with pytest.raises(type(error)):
                await tried(call, kind)
            assert call.calls == 1


def test_what_was_perhaps_executed_is_repeated_only_where_that_does_no_harm() -> None:
    for kind in (CREATION, SAMPLE):
        assert (kind.lost, kind.cut, kind.broken) == (None, None, None)
    assert None not in (OPERATION.lost, OPERATION.cut, OPERATION.broken)


async def test_each_repetition_is_logged_with_its_reason(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "loops_async"):
        await retry(Failing(slow_down(3.0)), READ, what="no session yet", budget=RetryBudget())
    assert [record.getMessage() for record in caplog.records] == ["no session yet; retrying in 3.0 s: busy"]


async def test_thousands_of_calls_share_one_budget(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a storm, a retry waits for its turn; when that comes too late, the error is raised."""
    budget = RetryBudget(burst=10, rate=1.0)
    waits = [budget_wait(budget) for _ in range(30)]
    assert waits[:10] == [0.0] * 10
    assert waits[10:] == pytest.approx(list(range(1, 21)))
    clock.now += 30.0
    assert budget_wait(budget) == 0.0

    empty = RetryBudget(burst=0, rate=1.0)
    call = Failing(BROKE)
    assert await tried(call, having(RetryPolicy(tries=9, seconds=50.0)), budget=empty) == 7
    assert clock.pauses[-1] == pytest.approx(1.0)
    for _ in range(60):
        empty.take()
    late = Failing(BROKE)
    with pytest.raises(ConnectError):
        await tried(late, having(RetryPolicy(tries=9, seconds=50.0)), budget=empty)
    assert late.calls == 1


def budget_wait(budget: RetryBudget) -> float:
    delay = budget.delay()
    budget.take()
    return delay


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
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await until(found_at(10_000), seconds=0.01) is None


async def test_until_passes_errors_on(clock: Clock) -> None:
    with pytest.raises(ConnectError):
        await until(Failing(ConnectError("gone")), seconds=60)


async def test_until_does_not_wait_for_a_probe_that_hangs() -> None:
    async def hangs() -> int | None:
        await asyncio.Event().wait()
        return None

    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await until(hangs, seconds=0.01) is None

"""What may be retried, and for how long: one table for every call that the library makes.

A failure is one of five kinds. What certainly was not executed may always be sent again. What was perhaps executed may
be sent again only where executing it twice does no harm: it changes nothing, or it carries a key by which the receiver
recognizes it. Everything else is a refusal, which is final.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from enum import Enum
from itertools import count
from typing import Any, Final, TypeVar

import backoff
from msgspec import Struct
from msgspec.structs import replace

from .._tasks import TaskOwner
from .._waiting import TimeLimit
from .._work.registry import CURRENT
from ..errors import (
    ApiError,
    ClosedError,
    ConnectError,
    LoopsError,
    ProtocolError,
    RequestTimeoutError,
    without_quote,
)
from . import tape
from .attempts import NUMBER

T = TypeVar("T")

log = logging.getLogger("loops_async.http")


class Failure(Enum):
    """How a request failed. The first two were certainly not executed, the others perhaps."""

    UNREACHED = "no connection"
    TURNED_AWAY = "429, or a 503 of the service"
    LOST = "408, 502, 504, a gateway's 503, no answer in time, connection broken"
    CUT = "answer cut off after it began"
    BROKEN = "500, or a success that cannot be read"


class RetryPolicy(Struct, frozen=True, kw_only=True):
    """How often and for how long one call is sent again after failures of one kind.

    `tries` limits the number of calls that fail in this way, `seconds` the time since the first of them. The pause
    starts at `first_pause` seconds and doubles up to `longest_pause`; each pause is drawn between half of that and all
    of it, so that many clients do not retry at the same moment.
    """

    tries: int
    seconds: float
    first_pause: float = 0.5
    longest_pause: float = 10.0


class Call(Struct, frozen=True, kw_only=True):
    """A kind of call: its policy for each kind of failure, None where that failure is raised at once."""

    name: str
    unreached: RetryPolicy | None
    turned_away: RetryPolicy | None
    lost: RetryPolicy | None
    cut: RetryPolicy | None
    broken: RetryPolicy | None

    def policy(self, failure: Failure) -> RetryPolicy | None:
        """Return the policy for a kind of failure."""
        policy: RetryPolicy | None = getattr(self, failure.name.lower())
        return policy

    def waiting(self, seconds: float) -> Call:
        """Return this kind of call with patience of `seconds` for a service that turns requests away."""
        patient = RetryPolicy(tries=max(BUSY.tries, math.ceil(seconds / 10)), seconds=seconds, longest_pause=30.0)
        return replace(self, turned_away=patient)


OUTAGE: Final = RetryPolicy(tries=20, seconds=75.0)
"""Long enough for an outage of a minute."""
BUSY: Final = RetryPolicy(tries=30, seconds=600.0, first_pause=1.0, longest_pause=30.0)
"""Much longer while the service only asks to slow down."""
POLLING: Final = RetryPolicy(tries=120, seconds=120.0, first_pause=2.0, longest_pause=4.0)

READ: Final = Call(
    name="read, or another control-plane call that may be repeated",
    unreached=OUTAGE, turned_away=BUSY, lost=OUTAGE, cut=OUTAGE, broken=None,
)  # fmt: skip
CREATION: Final = Call(
    name="creation of a run, a sampler or a deployed model",
    unreached=OUTAGE, turned_away=BUSY, lost=None, cut=None, broken=None,
)  # fmt: skip
OPERATION: Final = Call(
    name="submission of a trainer's operation, always with the same key",
    unreached=OUTAGE, turned_away=BUSY, lost=OUTAGE, cut=OUTAGE, broken=OUTAGE,
)  # fmt: skip
QUEUED_SAMPLE: Final = Call(
    name="submission of a sample to a queue, always with the same key",
    unreached=OUTAGE, turned_away=BUSY, lost=OUTAGE, cut=OUTAGE, broken=OUTAGE,
)  # fmt: skip
SAMPLE: Final = Call(
    name="sample on a dedicated sampler",
    unreached=OUTAGE, turned_away=BUSY, lost=None, cut=None, broken=None,
)  # fmt: skip
POLL: Final = Call(
    name="poll for the outcome of an operation",
    unreached=POLLING, turned_away=POLLING, lost=POLLING, cut=POLLING, broken=POLLING,
)  # fmt: skip
DOWNLOAD: Final = Call(
    name="file of a checkpoint, continued where it stopped; only tries without progress count",
    unreached=OUTAGE, turned_away=BUSY, lost=OUTAGE, cut=OUTAGE, broken=None,
)  # fmt: skip

CALLS: Final = (READ, CREATION, OPERATION, QUEUED_SAMPLE, SAMPLE, POLL, DOWNLOAD)
"""The table that `docs/reliability.md` shows."""


def failure_of(error: Exception) -> Failure | None:
    """Return how a request failed; None for a refusal, and for what is no failure of a request."""
    match error:
        case ConnectError(was_sent=False, retryable=retryable):
            return Failure.UNREACHED if retryable else None  # e.g. an untrusted certificate
        case ConnectError(has_begun=True):
            return Failure.CUT
        case ConnectError() | RequestTimeoutError(retryable=True):
            return Failure.LOST
        case ProtocolError(status=status):
            # A redirect or an error page refuses; a success was executed.
            return Failure.BROKEN if status is None or status < 300 else None
        case ApiError(may_have_acted=True, retryable=retryable):
            return Failure.LOST if retryable else Failure.BROKEN
        case ApiError(retryable=True):
            return Failure.TURNED_AWAY
        case _:
            return None


def may_have_acted(error: Exception) -> bool:
    """Whether the service perhaps executed a request that failed in this way."""
    return failure_of(error) in (Failure.LOST, Failure.CUT, Failure.BROKEN)


class RetryBudget:
    """Limits how often all calls of one client retry: a bucket of `burst` retries that fills with `rate` a second.

    When it is empty, a retry waits for its turn, so thousands of calls that fail together do not become a storm.
    """

    def __init__(self, *, burst: int = 500, rate: float = 50.0) -> None:
        self._burst = burst
        self._rate = rate
        self._tokens = float(burst)
        self._updated = 0.0
        self._pauses = TaskOwner()
        self._is_closed = False

    async def pause(self, seconds: float) -> None:
        """Wait before a retry; raise `ClosedError` as soon as the client is closed."""
        await tape.pause(seconds, lambda shown: self._pauses.run(asyncio.sleep(shown), name="a retry"))

    def check_open(self) -> None:
        """Raise `ClosedError` if the client is closed, so that closing logs no retries."""
        if self._is_closed:
            raise ClosedError("the client was closed before a retry")

    async def close(self) -> None:
        """End all pauses."""
        self._is_closed = True
        await self._pauses.close()

    def delay(self) -> float:
        """Return how many seconds from now a retry may be sent that is asked for now; it must then be taken."""
        now = time.monotonic()
        self._tokens = min(float(self._burst), self._tokens + max(0.0, now - self._updated) * self._rate)
        self._updated = now
        return max(0.0, (1.0 - self._tokens) / self._rate)

    def take(self) -> None:
        """Take a retry; the bucket may become indebted, which delays those after it."""
        self._tokens -= 1.0


async def retry(
    call: Callable[[], Awaitable[T]],
    kind: Call,
    *,
    what: str,
    budget: RetryBudget,
    progress: Callable[[], object] = lambda: None,
) -> T:
    """Return the result of `call`; call it again while the policies of its `kind` allow that.

    ``Retry-After`` lengthens a pause, as far as the policy has time left. The last error is raised unchanged; `what`
    begins the log message for each retry. When `progress` returns something else than after the failure before, the
    tries and the time start again.
    """
    attempts: _Attempts | None = None
    outer, work = NUMBER.get(), CURRENT.get()
    NUMBER.set(1)
    try:
        while True:
            try:
                return await call()
            except LoopsError as error:
                failure = failure_of(error)
                policy = None if failure is None else kind.policy(failure)
                if policy is None:
                    raise
                if attempts is None or attempts.progress != progress():
                    attempts = _Attempts(progress())
                pause = attempts.pause_after(error, policy, budget)
                if pause is None:
                    raise
                budget.check_open()
                work.retrying(error, pause)
                log.warning("%s; retrying in %.1f s: %s", what, pause, without_quote(error))
            await budget.pause(pause)
            NUMBER.set(NUMBER.get() + 1)
            work.trying(NUMBER.get())
    finally:
        NUMBER.set(outer)  # a call that another one needs has its own number
        work.attempt = outer


class _Attempts:
    """What one call has used of each policy."""

    def __init__(self, progress: object) -> None:
        self.progress = progress
        self._tries: Counter[RetryPolicy] = Counter()
        self._since: dict[RetryPolicy, float] = {}

    def pause_after(self, error: LoopsError, policy: RetryPolicy, budget: RetryBudget) -> float | None:
        """Count `error` and return the pause in seconds before the next try; None when no try is left."""
        now = time.monotonic()
        since = self._since.setdefault(policy, now)
        self._tries[policy] += 1
        seconds_left = since + policy.seconds - now
        delay = budget.delay()
        if self._tries[policy] >= policy.tries or seconds_left <= 0 or delay > seconds_left:
            return None
        budget.take()
        return min(max(delay, pause_before(self._tries[policy] - 1, error, policy)), seconds_left)


def pause_before(attempt: int, error: BaseException, policy: RetryPolicy) -> float:
    """Return the seconds to wait before a retry, after `attempt` others; an error may ask for more."""
    longest = min(policy.longest_pause, policy.first_pause * 2.0 ** min(attempt, 30))
    pause = longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, keeps no secret
    hint = getattr(error, "retry_after", None)
    # A hint of zero or of nonsense must not turn pauses into none.
    return max(pause, hint) if hint is not None and math.isfinite(hint) else pause


async def until(
    probe: Callable[[], Awaitable[T | None]],
    *,
    seconds: float | None,
    longest_pause: float = 10.0,
) -> T | None:
    """Call `probe` until it returns a value that is not None, and return it; return None after `seconds`.

    The first pauses are a quarter second; later ones grow with the elapsed time, up to `longest_pause`: a result is
    late by little more than a quarter of the wait, and a long wait needs few calls.
    """

    def pauses() -> Generator[float, Any, None]:
        yield 0.0
        pause = 0.25
        for attempt in count():
            yield pause
            pause = min(longest_pause, pause * 1.25) if attempt >= 3 else pause

    def jitter(pause: float) -> float:
        return 0.0 if tape.is_playing() else pause * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load, not a secret

    async def probed() -> T | None:
        found = await probe()
        if found is None and tape.current is not None:
            await tape.current.before_pause()
        return found

    poll = backoff.on_predicate(pauses, lambda found: found is None, jitter=jitter, logger=None)
    with TimeLimit(seconds), tape.waiting():  # also ends a probe that hangs
        found: T | None = await poll(probed)()
        return found
    return None

"""Retry policies: which errors are retried, how often, and after what pause."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Sequence
from itertools import count
from typing import Any, Final, TypeVar

import anyio
import backoff
from msgspec import Struct

from ..errors import ConnectError, LoopsError, RateLimitError, RequestTimeoutError

T = TypeVar("T")

log = logging.getLogger("loops_async")

RETRY_AFTER_CAP: Final = 60.0


class RetryPolicy(Struct, frozen=True, kw_only=True):
    """How often and for how long one call is retried after errors of one kind.

    `seconds` limits the time since the first error of that kind, `tries` the number of calls that fail with it. The
    pause starts at `first_pause` seconds and doubles up to `longest_pause`; each pause is drawn between half of that
    and all of it, so that many clients do not retry at the same moment.
    """

    kind: type[LoopsError] = LoopsError
    seconds: float | None = None
    tries: int | None = None
    first_pause: float = 0.5
    longest_pause: float = 30.0


READ: Final = (RetryPolicy(tries=4),)
CONTROL_PLANE: Final = (RetryPolicy(kind=RateLimitError, tries=10, first_pause=1.0), *READ)
"""Many more tries while the service only asks to slow down."""
SUBMIT: Final = (RetryPolicy(seconds=60.0),)
UNREACHED: Final = RetryPolicy(kind=ConnectError, seconds=60.0)
POLL: Final = (RetryPolicy(seconds=120.0, first_pause=2.0, longest_pause=4.0),)


def is_retryable(error: Exception) -> bool:
    """Whether the error is marked as retryable: the same call may succeed."""
    return isinstance(error, LoopsError) and error.retryable


def was_not_sent(error: Exception) -> bool:
    """Whether the service certainly did not act: it was not reached, or its status says so."""
    return getattr(error, "status", None) in (429, 503) or (isinstance(error, ConnectError) and not error.was_sent)


def answer_was_lost(error: Exception) -> bool:
    """Whether the service may have acted although no answer arrived, e.g. when a gateway answered in its place."""
    if isinstance(error, ConnectError):
        return error.was_sent
    return isinstance(error, RequestTimeoutError) or getattr(error, "status", None) in (408, 502, 504)


async def retry(
    call: Callable[[], Awaitable[T]],
    policies: Sequence[RetryPolicy],
    *,
    what: str,
    when: Callable[[Exception], bool] = is_retryable,
) -> T:
    """Return the result of `call`; retry it while `when` and the policy for its error allow that.

    The policy for an error is the first of `policies` whose kind matches. A ``Retry-After`` of the service replaces
    the pause, up to 60 s. The last error is raised unchanged; the log line of each retry begins with `what`.
    """
    budget: _Budget | None = None
    while True:
        try:
            return await call()
        except LoopsError as error:
            if not when(error):
                raise
            budget = budget or _Budget(policies)
            pause = budget.pause_after(error)
            if pause is None:
                raise
            log.warning("%s; retrying in %.1f s: %s", what, pause, error)
        await asyncio.sleep(pause)


class _Budget:
    """The remaining tries and time of each policy for one call."""

    def __init__(self, policies: Sequence[RetryPolicy]) -> None:
        self._policies = policies
        self._tries: Counter[RetryPolicy] = Counter()
        self._since: dict[RetryPolicy, float] = {}

    def pause_after(self, error: LoopsError) -> float | None:
        """Count `error` and return the pause in seconds before the next try; None when no try is left."""
        policy = next(policy for policy in self._policies if isinstance(error, policy.kind))
        now = time.monotonic()
        since = self._since.setdefault(policy, now)
        self._tries[policy] += 1
        seconds_left = math.inf if policy.seconds is None else since + policy.seconds - now
        if seconds_left <= 0 or (policy.tries is not None and self._tries[policy] >= policy.tries):
            return None
        return min(_pause(self._tries[policy] - 1, error, policy), seconds_left)


def _pause(attempt: int, error: Exception, policy: RetryPolicy) -> float:
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        return min(float(retry_after), RETRY_AFTER_CAP)
    longest = min(policy.longest_pause, policy.first_pause * 2.0 ** min(attempt, 30))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, not a secret


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
        return pause * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load, not a secret

    poll = backoff.on_predicate(pauses, lambda found: found is None, jitter=jitter, logger=None)
    with anyio.move_on_after(seconds):  # also ends a probe that hangs
        found: T | None = await poll(probe)()
        return found
    return None

"""When to try again, and how long to wait before."""

from __future__ import annotations

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


class Patience(Struct, frozen=True, kw_only=True):
    """How often and how long one call is tried again after errors of one kind.

    `seconds` bounds the time since the first of them, `tries` their number; `first_pause` doubles up to
    `longest_pause`, and each pause is drawn between its half and itself, so that many clients do not come back at once.
    """

    kind: type[LoopsError] = LoopsError
    seconds: float | None = None
    tries: int | None = None
    first_pause: float = 0.5
    longest_pause: float = 30.0


CONTROL = Patience(tries=4)
RATE_LIMITED = Patience(kind=RateLimitError, tries=10, first_pause=1.0)
SUBMIT = Patience(seconds=60.0)
UNREACHED = Patience(kind=ConnectError, seconds=60.0)
POLL = Patience(seconds=120.0, first_pause=2.0, longest_pause=4.0)


def is_retryable(error: Exception) -> bool:
    """Whether the error itself says that the same call may succeed."""
    return isinstance(error, LoopsError) and error.retryable


def was_not_sent(error: Exception) -> bool:
    """Whether the service certainly did not act: it was not reached, or said so."""
    return getattr(error, "status", None) in (429, 503) or (isinstance(error, ConnectError) and not error.was_sent)


def answer_was_lost(error: Exception) -> bool:
    """Whether the service may have acted without our knowing; a gateway's word says nothing of what is behind it."""
    if isinstance(error, ConnectError):
        return error.was_sent
    return isinstance(error, RequestTimeoutError) or getattr(error, "status", None) in (408, 502, 504)


async def retrying(
    call: Callable[[], Awaitable[T]],
    *patiences: Patience,
    what: str,
    when: Callable[[Exception], bool] = is_retryable,
) -> T:
    """Return what `call` returns, calling again while `when` allows it and the patience with its errors lasts.

    Of several `patiences`, the first whose kind an error is counts for it. A ``Retry-After`` of the service replaces
    the pause, up to 60 s. The last error is raised as it is.
    """
    try:
        return await call()  # the common case costs next to nothing
    except LoopsError as error:
        if not when(error):
            raise
        first = error
    return await _persistently(call, first, _Budget(patiences), what, when)


async def _persistently(
    call: Callable[[], Awaitable[T]],
    first: LoopsError,
    budget: _Budget,
    what: str,
    when: Callable[[Exception], bool],
) -> T:
    errors = [first]

    async def attempt() -> T:
        if errors:  # what is known already counts as the first attempt
            raise errors.pop()
        return await call()

    def tell(details: Any) -> None:
        log.warning("%s; trying again in %.1f s: %s", what, details["wait"], details["exception"])

    persistent = backoff.on_exception(
        budget.pauses,
        LoopsError,
        jitter=None,
        giveup=lambda error: not when(error) or budget.is_spent(error),
        on_backoff=tell,
        logger=None,
    )
    result: T = await persistent(attempt)()
    return result


async def politely(
    call: Callable[[], Awaitable[T]], *, what: str, when: Callable[[Exception], bool] = is_retryable
) -> T:
    """Call the control plane as `retrying` does; with much more patience while it only asks us to slow down."""
    return await retrying(call, RATE_LIMITED, CONTROL, what=what, when=when)


class _Budget:
    """What is left of each patience with one call."""

    def __init__(self, patiences: Sequence[Patience]) -> None:
        self._patiences = patiences
        self._tries: Counter[Patience] = Counter()
        self._since: dict[Patience, float] = {}

    def is_spent(self, error: Exception) -> bool:
        """Count `error`, and tell whether it was one too many."""
        patience = self._for(error)
        self._tries[patience] += 1
        is_last = patience.tries is not None and self._tries[patience] >= patience.tries
        return is_last or self._seconds_left(patience) <= 0

    def pauses(self) -> Generator[float, Any, None]:
        """Yield pauses in seconds; backoff sends the error that each of them follows."""
        error = yield 0.0
        while True:
            patience = self._for(error)
            pause = _pause(self._tries[patience] - 1, error, patience)
            error = yield min(pause, self._seconds_left(patience))

    def _for(self, error: Exception) -> Patience:
        return next(patience for patience in self._patiences if isinstance(error, patience.kind))

    def _seconds_left(self, patience: Patience) -> float:
        now = time.monotonic()
        return math.inf if patience.seconds is None else self._since.setdefault(patience, now) + patience.seconds - now


def _pause(attempt: int, error: Exception, patience: Patience) -> float:
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        return min(float(retry_after), RETRY_AFTER_CAP)
    longest = min(patience.longest_pause, patience.first_pause * 2.0 ** min(attempt, 30))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, keeps no secret


async def until(
    probe: Callable[[], Awaitable[T | None]],
    *,
    seconds: float | None,
    longest_pause: float = 10.0,
) -> T | None:
    """Call `probe` until it returns something, and return that; None when `seconds` are over.

    The first pauses are a quarter second; later ones grow with the time already spent, so that the news is never
    late by much more than a quarter of the wait, and a long wait costs few calls.
    """

    def pauses() -> Generator[float, Any, None]:
        yield 0.0
        pause = 0.25
        for attempt in count():
            yield pause
            pause = min(longest_pause, pause * 1.25) if attempt >= 3 else pause

    def jitter(pause: float) -> float:
        return pause * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load, keeps no secret

    poll = backoff.on_predicate(pauses, lambda found: found is None, jitter=jitter, logger=None)
    with anyio.move_on_after(seconds):  # ends a probe that hangs, too
        found: T | None = await poll(probe)()
        return found
    return None

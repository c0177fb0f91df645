"""When to try again, and how long to wait before."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Generator
from itertools import count
from typing import Any, Final, TypeVar

import anyio
import backoff
from msgspec import Struct

from .errors import ConnectError, LoopsError, RateLimitError, RequestTimeoutError

T = TypeVar("T")

log = logging.getLogger("loops_async")

RETRY_AFTER_CAP: Final = 60.0


class Patience(Struct, frozen=True, kw_only=True):
    """How often and how long one kind of call is tried again.

    `seconds` bounds the whole, `tries` the number of calls; `first_pause` doubles up to `longest_pause`, and each
    pause is drawn between its half and itself, so that many clients do not come back at once.
    """

    seconds: float | None = None
    tries: int | None = None
    first_pause: float = 0.5
    longest_pause: float = 30.0


CONTROL = Patience(tries=4)
RATE_LIMITED = Patience(tries=10, first_pause=1.0)
SUBMIT = Patience(seconds=60.0)
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
    patience: Patience,
    *,
    what: str,
    when: Callable[[Exception], bool] = is_retryable,
) -> T:
    """Return what `call` returns, calling again while `when` allows it and `patience` lasts.

    A ``Retry-After`` of the service replaces the pause, up to 60 s. The last error is raised as it is.
    """
    try:
        return await call()
    except LoopsError as error:
        if not when(error):
            raise
        first: LoopsError | None = error

    async def attempt() -> T:
        # The common case above costs nothing; here, what it already knows counts as the first attempt.
        nonlocal first
        if first is not None:
            known, first = first, None
            raise known
        return await call()

    def tell(details: Any) -> None:
        log.warning("%s; trying again in %.1f s: %s", what, details["wait"], details["exception"])

    persistent = backoff.on_exception(
        _pauses,
        LoopsError,
        max_tries=patience.tries,
        max_time=patience.seconds,
        jitter=None,
        giveup=lambda error: not when(error),
        on_backoff=tell,
        logger=None,
        patience=patience,
    )
    result: T = await persistent(attempt)()
    return result


async def politely(
    call: Callable[[], Awaitable[T]], *, what: str, when: Callable[[Exception], bool] = is_retryable
) -> T:
    """Call the control plane as `retrying` does; with much more patience while it only asks us to slow down."""
    return await retrying(
        lambda: retrying(
            call, CONTROL, what=what, when=lambda error: when(error) and not isinstance(error, RateLimitError)
        ),
        RATE_LIMITED,
        what=what,
        when=lambda error: when(error) and isinstance(error, RateLimitError),
    )


def _pauses(patience: Patience) -> Generator[float, Any, None]:
    """Yield pauses in seconds; backoff sends the error that each of them follows."""
    error = yield 0.0
    for attempt in count():
        error = yield _pause(attempt, error, patience)


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

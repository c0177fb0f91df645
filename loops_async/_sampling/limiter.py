"""The limit of sequences in flight, which streams of rollouts and `sample_many` may share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from heapq import heappop, heappush
from typing import Final, Protocol

from .._arguments import check_at_least
from ..errors import ApiError, ConfigError, LoopsError
from .adaptive import Adaptive, HillClimb

FIRST: Final = -1
"""The priority of evaluation and of `sample_many`: before rollouts, whose priority is the index of their group."""

OVERLOADED: Final = (429, 503)
"""The statuses of a service that has too many requests."""

_on_rejection: ContextVar[Callable[[], None] | None] = ContextVar("loops_async: on_rejection", default=None)
"""What a sample in this context reports a 429 or 503 to."""


class Slots:
    """The places that a request holds."""

    __slots__ = ("tokens",)

    def __init__(self) -> None:
        self.tokens: int | None = None

    def finished(self, tokens: int) -> None:
        """Report how many tokens the request has generated; an `Adaptive` limit follows what is reported."""
        self.tokens = tokens


class Climb(Protocol):
    """What decides the limit of a `Limiter`, and hears of all that happens: a `HillClimb`, or what asks another one."""

    limit: int
    clock: float

    def occupied(self, now: float, in_flight: int, waiting: int) -> None:
        """Hear how many sequences were in flight and waited since the last event."""
        ...

    def finished(self, count: int, tokens: int, began: float) -> None:
        """Hear of a request for `count` sequences that was admitted when `clock` was `began`."""
        ...

    def rejected(self) -> None:
        """Hear of a 429 or 503."""
        ...


class Limiter:
    """Limits the sequences in flight: a request for `num_samples` completions counts as that many.

    Streams of rollouts and calls of `sample_many` that are given the same limiter share its places. Free places go to
    evaluation and `sample_many` first, then to rollouts, the oldest group first. A request larger than the limit runs
    alone. The properties may be read in any thread.

    Args:
        limit: the most sequences in flight; an `Adaptive` limit follows the sampler's capacity.

    Raises:
        InputError: `limit` is not a whole number of at least 1, or an `Adaptive` whose bounds are wrong.

    Example:
        ::

            limiter = loops.Limiter(loops.Adaptive(maximum=512))
            single = sampler.sample_many(prompts, limit=limiter)
            several = sampler.sample_many(prompts, num_samples=4, limit=limiter)
    """

    def __init__(self, limit: int | Adaptive) -> None:
        self._climb: Climb | None = HillClimb(limit) if isinstance(limit, Adaptive) else None
        self._fixed = 0 if isinstance(limit, Adaptive) else check_at_least(limit, 1, "limit")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queue: list[tuple[int, int, int, asyncio.Future[None]]] = []
        """A heap of those who wait: priority, number, count, and what wakes them; it is done if they were cancelled."""
        self._arrivals = 0
        self._in_flight = 0
        self._waiting = 0
        self._rejections = 0

    @property
    def limit(self) -> int:
        """The present limit."""
        return self._fixed if self._climb is None else self._climb.limit

    @property
    def in_flight(self) -> int:
        """How many sequences hold a place."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """How many sequences wait for a place."""
        return self._waiting

    @property
    def rejections(self) -> int:
        """How often the service has answered 429 or 503, also if the request was then repeated."""
        return self._rejections

    def __repr__(self) -> str:
        return f"<Limiter {self.limit}, {self._in_flight} in flight, {self._waiting} waiting>"

    @asynccontextmanager
    async def _slots(self, count: int, priority: int) -> AsyncGenerator[Slots]:
        loop = await self._acquire(count, priority)
        began = 0.0 if self._climb is None else self._climb.clock
        held, outer = Slots(), _on_rejection.get()
        _on_rejection.set(self._reject)
        try:
            yield held
        except Exception:
            held.finished(0)  # what fails, takes time and yields nothing
            raise
        finally:
            _on_rejection.set(outer)
            if loop is self._loop:  # otherwise the loop was closed, and its places were given back
                self._release(count, held.tokens, began)

    # --- places ---

    async def _acquire(self, count: int, priority: int) -> asyncio.AbstractEventLoop:
        loop = self._entered_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._observe()
        self._arrivals += 1
        self._waiting += count
        heappush(self._queue, (priority, self._arrivals, count, turn))
        self._wake()
        if not turn.done():
            try:
                await turn
            except BaseException:
                self._give_up(count, turn)
                raise
        return loop

    def _give_up(self, count: int, turn: asyncio.Future[None]) -> None:
        """End a wait that was cancelled; places that it was given at the same moment go to the others."""
        self._observe()
        if turn.done() and not turn.cancelled():
            self._in_flight -= count
        else:
            turn.cancel()
            self._waiting -= count
        self._wake()

    def _release(self, count: int, tokens: int | None, began: float) -> None:
        self._observe()
        self._in_flight -= count
        if self._climb is not None and tokens is not None:
            self._climb.finished(count, tokens, began)
        self._wake()

    def _wake(self) -> None:
        """Give free places to those who are first; one who does not fit yet is not overtaken."""
        while self._queue:
            _, _, count, turn = self._queue[0]
            if not turn.done():
                if self._in_flight and self._in_flight + count > self.limit:
                    return
                self._in_flight += count
                self._waiting -= count
                turn.set_result(None)
            heappop(self._queue)

    def _entered_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed() and (self._in_flight or self._waiting):
                raise ConfigError(
                    f"limit: {self!r} is in use in another event loop; give each event loop a Limiter of its own"
                )
            self._loop = loop
            self._queue.clear()
            self._in_flight = self._waiting = 0
        return loop

    # --- what an adaptive limit learns ---

    def _observe(self) -> None:
        if self._climb is not None:
            self._climb.occupied(asyncio.get_running_loop().time(), self._in_flight, self._waiting)

    def _reject(self) -> None:
        self._rejections += 1
        if self._climb is not None:
            self._climb.rejected()


def slots(limiter: Limiter, count: int, *, priority: int = FIRST) -> AbstractAsyncContextManager[Slots]:
    """Hold places for a request for `count` sequences; whose `priority` is smallest gets them first.

    It is no method, since a `Limiter` is the same in both forms. A sample in the block reports each 429 and 503 to the
    limiter. Blocks must not be nested: the inner one might wait for the places of the outer one.

    Raises:
        ConfigError: the limiter is in use in another event loop.
    """
    return limiter._slots(count, priority)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - see above


def follow(limiter: Limiter, climb: Climb) -> None:
    """Let `climb` decide the limit from now on. When it becomes larger by itself, call `wake`."""
    limiter._climb = climb  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - as above


def wake(limiter: Limiter) -> None:
    """Give places that have become free to those who wait."""
    limiter._wake()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - as above


def report_rejection(error: LoopsError) -> None:
    """Report a failed attempt to sample to the limiter whose places it holds, if the service had too many requests."""
    on_rejection = _on_rejection.get()
    if on_rejection is not None and isinstance(error, ApiError) and error.status in OVERLOADED:
        on_rejection()


def as_limiter(limit: int | Adaptive | Limiter) -> Limiter:
    """Return the limiter that the argument `limit` of a call means."""
    return limit if isinstance(limit, Limiter) else Limiter(limit)

"""One schedule of pings for all trainers of a client, so that they stay up while only samplers work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Final
from weakref import WeakSet

from .._tasks import TaskOwner
from ..errors import ApiError

log = logging.getLogger("loops_async.http")

PERIOD_SECONDS: Final = 60.0


class _Pinged:
    """A trainer that is pinged while any of its clients lives."""

    def __init__(self, ping: Callable[[], Awaitable[None]]) -> None:
        self.ping = ping
        self.clients: WeakSet[object] = WeakSet()
        self.failure: str | None = None
        """What was said of its last failure; None while it answers."""


class Heartbeat:
    """Pings every registered trainer once a minute, all at the same time (data-plane reference 1.6)."""

    def __init__(self, tasks: TaskOwner, period: float = PERIOD_SECONDS) -> None:
        self._tasks = tasks
        self._period = period
        self._trainers: dict[str, _Pinged] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, name: str, client: object, ping: Callable[[], Awaitable[None]]) -> None:
        """Ping a trainer until each client that was added for it was removed or collected.

        `ping` must not refer to `client`, which it would keep alive.
        """
        pinged = self._trainers.setdefault(name, _Pinged(ping))
        pinged.clients.add(client)
        pinged.failure = None
        if self._task is None or self._task.done():
            # In no context: its requests are part of nothing that was under way when it began.
            self._task = Context().run(self._tasks.start_unattended, self._beat(), name="heartbeat")

    def remove(self, name: str, client: object) -> None:
        """Stop pinging a trainer, unless another client still needs it."""
        if name in self._trainers:
            self._trainers[name].clients.discard(client)
        self._forget_unused()

    def _forget_unused(self) -> None:
        self._trainers = {name: pinged for name, pinged in self._trainers.items() if pinged.clients}

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._period)
            self._forget_unused()
            # Whatever a ping raises must not end those of the others.
            pings = [self._ping(name, pinged) for name, pinged in self._trainers.items()]
            await asyncio.gather(*pings, return_exceptions=True)

    async def _ping(self, name: str, pinged: _Pinged) -> None:
        try:
            await pinged.ping()
        except Exception as error:
            if not isinstance(error, ApiError) or error.status >= 500:
                self._failed(name, pinged, error)
                return
        # Any answer, also a refusal, shows that the request reached it, which keeps it running.
        if pinged.failure is not None:
            pinged.failure = None
            log.info("%s answers pings again", name)

    def _failed(self, name: str, pinged: _Pinged, error: Exception) -> None:
        """Say that a trainer does not answer, once, and again when it fails in another way."""
        failure = f"{type(error).__name__} {getattr(error, 'status', '')}"
        if pinged.clients and failure != pinged.failure:  # it may have been removed during the ping
            pinged.failure = failure
            log.warning("%s did not answer a ping, and may be scaled to zero when that goes on: %s", name, error)

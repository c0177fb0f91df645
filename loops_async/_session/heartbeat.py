"""One schedule of pings for all trainers of a client, which keeps them running while only samplers work."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from .._tasks import TaskOwner
from ..errors import ApiError, LoopsError

log = logging.getLogger("loops_async")

PERIOD_SECONDS: Final = 60.0
WARN_AFTER: Final = 5
GIVE_UP_AFTER: Final = 20


class Heartbeat:
    """Pings every registered trainer once a minute, all at the same time (data-plane reference 1.6)."""

    def __init__(self, tasks: TaskOwner, period: float = PERIOD_SECONDS) -> None:
        self._tasks = tasks
        self._period = period
        self._failures: dict[str, int] = {}
        self._pings: dict[str, Callable[[], Awaitable[None]]] = {}
        self._registrations: Counter[str] = Counter()
        self._task: asyncio.Task[None] | None = None

    def add(self, name: str, ping: Callable[[], Awaitable[None]]) -> None:
        """Start to ping this trainer, until it was removed as often as it was added."""
        self._registrations[name] += 1
        self._pings[name] = ping
        self._failures[name] = 0
        if self._task is None:
            self._task = self._tasks.start(self._beat(), name="heartbeat")

    def remove(self, name: str) -> None:
        """Stop pinging this trainer, unless another client still needs it."""
        self._registrations[name] -= 1
        if self._registrations[name] <= 0:
            self._forget(name)

    def _forget(self, name: str) -> None:
        del self._registrations[name]
        self._pings.pop(name, None)
        self._failures.pop(name, None)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._period)
            await asyncio.gather(*(self._ping(name, ping) for name, ping in list(self._pings.items())))

    async def _ping(self, name: str, ping: Callable[[], Awaitable[None]]) -> None:
        try:
            await ping()
        except LoopsError as error:
            if isinstance(error, ApiError) and error.status < 500:
                return  # any answer shows that the request reached it, which keeps it running
            self._count_failure(name, error)
        else:
            if name in self._failures:
                self._failures[name] = 0

    def _count_failure(self, name: str, error: LoopsError) -> None:
        if name not in self._failures:
            return  # removed during the ping
        self._failures[name] += 1
        if self._failures[name] == WARN_AFTER:
            log.warning("%s has not answered %d pings in a row: %s", name, WARN_AFTER, error)
        elif self._failures[name] == GIVE_UP_AFTER:
            log.warning("%s has not answered %d pings in a row; pings are stopped: %s", name, GIVE_UP_AFTER, error)
            self._forget(name)

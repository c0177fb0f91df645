"""What deployments say of themselves: their log."""

from __future__ import annotations

import time
from typing import Final, get_args

from loops_async.types import LogLevel, LogLine, SortDirection

from .store import LogRow, Store

__all__ = ["DEFAULT_LIMIT", "DEFAULT_WINDOW_SECONDS", "MOST_LINES", "MOST_WINDOW_SECONDS", "Journal", "Log"]

DEFAULT_LIMIT: Final = 500
MOST_LINES: Final = 1000
DEFAULT_WINDOW_SECONDS: Final = 30 * 60
MOST_WINDOW_SECONDS: Final = 7 * 24 * 3600

# The service is one process, so there is one replica.
_REPLICA: Final = "0"
_LEVELS: Final = get_args(LogLevel)


class Log:
    """The log of one deployment."""

    def __init__(self, store: Store, deployment_id: str) -> None:
        self._store = store
        self._deployment_id = deployment_id

    def write(self, level: LogLevel, message: str, *, request_id: str | None = None) -> None:
        """Add a line; it is on its way to the store when this returns."""
        self._store.append_log(LogRow(self._deployment_id, time.time_ns(), _LEVELS.index(level), message, request_id))


class Journal:
    """The logs of all deployments, kept for as long as they can be asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def open(self) -> None:
        """Forget what nobody can ask for any more."""
        await self._store.forget_logs(time.time_ns() - MOST_WINDOW_SECONDS * 1_000_000_000)

    def log(self, deployment_id: str) -> Log:
        """Return the log of a deployment."""
        return Log(self._store, deployment_id)

    async def read(
        self,
        deployment_id: str,
        *,
        start: int,
        end: int,
        direction: SortDirection,
        limit: int = -1,
        min_level: LogLevel = "DEBUG",
    ) -> list[LogLine]:
        """Return the lines from `start` up to, not with, `end`, both in nanoseconds since 1970; -1 is no limit."""
        rows = await self._store.logs(
            deployment_id,
            start=start,
            end=end,
            newest_first=direction == "desc",
            limit=limit,
            min_severity=_LEVELS.index(min_level),
        )
        return [
            LogLine(
                timestamp=str(row.timestamp),
                message=row.message,
                replica=_REPLICA,
                request_id=row.request_id,
                level=_LEVELS[row.severity],
            )
            for row in rows
        ]

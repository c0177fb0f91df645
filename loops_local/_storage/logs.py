"""The logs of deployments, as the control plane shows them."""

from __future__ import annotations

import time
from collections import deque
from typing import Final, get_args

from loops_async.types import LogLevel, LogLine, SortDirection

from .store import LogRow, Store

__all__ = ["RETENTION_SECONDS", "DeploymentLog", "Logs"]

RETENTION_SECONDS: Final = 7 * 24 * 3600

MOST_LATEST: Final = 100
"""The last lines of all deployments, which are kept in memory."""

# The service is one process, so each deployment has one replica.
_REPLICA: Final = "0"
_LEVELS: Final = get_args(LogLevel)


class DeploymentLog:
    """Writes the log of one deployment."""

    def __init__(self, store: Store, deployment_id: str, latest: deque[LogRow]) -> None:
        self._store = store
        self._deployment_id = deployment_id
        self._latest = latest

    def write(self, level: LogLevel, message: str, *, request_id: str | None = None) -> None:
        """Add a line; the write is queued when this returns."""
        row = LogRow(self._deployment_id, time.time_ns(), _LEVELS.index(level), message, request_id)
        self._store.append_log(row)
        self._latest.append(row)


class Logs:
    """The logs of all deployments, kept for `RETENTION_SECONDS`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._latest: deque[LogRow] = deque(maxlen=MOST_LATEST)

    @property
    def latest(self) -> list[tuple[str, LogLine]]:
        """The last lines since the start of the service, each with the id of its deployment, oldest first."""
        return [(row.deployment_id, _line(row)) for row in self._latest]

    async def open(self) -> None:
        """Delete the lines that are older than the retention time."""
        await self._store.delete_logs(time.time_ns() - RETENTION_SECONDS * 1_000_000_000)

    def of(self, deployment_id: str) -> DeploymentLog:
        """Return the log of a deployment."""
        return DeploymentLog(self._store, deployment_id, self._latest)

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
        """Return the lines from `start` to before `end`, both in nanoseconds since 1970; -1 means no limit."""
        rows = await self._store.logs(
            deployment_id,
            start=start,
            end=end,
            newest_first=direction == "desc",
            limit=limit,
            min_severity=_LEVELS.index(min_level),
        )
        return [_line(row) for row in rows]


def _line(row: LogRow) -> LogLine:
    return LogLine(
        timestamp=str(row.timestamp),
        message=row.message,
        replica=_REPLICA,
        request_id=row.request_id,
        level=_LEVELS[row.severity],
    )

"""The store: one SQLite file that stays consistent even when the process is killed.

Objects are JSON documents, one row each. The service reads them once at its start, works on them in memory and writes
every change. Only the outcomes of finished operations, which may be large, are read from the file when needed.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Concatenate, NamedTuple, ParamSpec, TypeAlias, TypeVar

import msgspec

from .private import make_private_file
from .records import Record

__all__ = ["LogRow", "Store", "StoreLockedError"]

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=Record)
_Row: TypeAlias = tuple[object, ...]

# EXCLUSIVE makes the file itself the lock of the data directory: a second service fails at once, and the system
# releases the lock when the process ends. NORMAL in WAL mode loses nothing when the process is killed.
_SCHEMA = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS objects (
    kind TEXT NOT NULL, id TEXT NOT NULL, document BLOB NOT NULL, PRIMARY KEY (kind, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS operations (
    run_id TEXT NOT NULL, id TEXT NOT NULL, finished REAL NOT NULL, answer BLOB NOT NULL, PRIMARY KEY (run_id, id)
);
CREATE INDEX IF NOT EXISTS operations_by_time ON operations (finished);
CREATE TABLE IF NOT EXISTS logs (
    deployment_id TEXT NOT NULL, timestamp INTEGER NOT NULL, severity INTEGER NOT NULL, message TEXT NOT NULL,
    request_id TEXT
);
CREATE INDEX IF NOT EXISTS logs_by_deployment ON logs (deployment_id, timestamp);
CREATE TABLE IF NOT EXISTS secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL);
COMMIT;
"""

_OLDEST_LOGS = """
SELECT * FROM logs WHERE deployment_id = ? AND timestamp >= ? AND timestamp < ? AND severity >= ?
ORDER BY timestamp, rowid LIMIT ?
"""
_NEWEST_LOGS = _OLDEST_LOGS.replace("timestamp, rowid", "timestamp DESC, rowid DESC")


class StoreLockedError(OSError):
    """Another service uses the same data directory."""


class LogRow(NamedTuple):
    """A line of a deployment's log; `timestamp` is in nanoseconds since 1970."""

    deployment_id: str
    timestamp: int
    severity: int
    message: str
    request_id: str | None


class Store:
    """Reads and writes in its own thread, so that the event loop never waits for the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "loops-store")
        self._db: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Open the file, creating it if it is missing; raises `StoreLockedError`."""
        await self._run(Store._open)

    async def close(self) -> None:
        """Finish the pending writes, close the file and end the thread."""
        await self._run(Store._close)
        self._thread.shutdown()

    async def secret(self, name: str) -> bytes:
        """Return a random secret of this data directory, created at the first call."""
        return await self._run(Store._secret, name)

    async def load(self, kind: type[R]) -> list[R]:
        """Return all objects of a kind, oldest first."""
        return await self._run(Store._load, kind)

    def put(self, *records: Record, delete: Sequence[Record] = ()) -> asyncio.Future[None]:
        """Write objects and delete others, all or none.

        The write is queued when this returns, also if the result is not awaited.
        """
        written = [(type(record).__name__, record.id, msgspec.json.encode(record)) for record in records]
        deleted = [(type(record).__name__, record.id) for record in delete]
        return self._run(Store._write_objects, written, deleted)

    def put_outcome(self, run_id: str, operation_id: str, outcome: bytes) -> asyncio.Future[None]:
        """Write the outcome of a finished operation."""
        rows = [(run_id, operation_id, time.time(), outcome)]
        return self._run(Store._write, "INSERT OR REPLACE INTO operations VALUES (?, ?, ?, ?)", rows)

    async def outcome(self, run_id: str, operation_id: str) -> bytes | None:
        """Return the outcome of a finished operation, None when it is unknown or was deleted."""
        return await self._run(Store._outcome, run_id, operation_id)

    async def finished_operations(self) -> dict[tuple[str, str], float]:
        """Return the run, id and time of every finished operation."""
        return await self._run(Store._finished_operations)

    def delete_outcomes(self, before: float) -> asyncio.Future[None]:
        """Delete the outcomes of operations that finished before a time."""
        return self._run(Store._write, "DELETE FROM operations WHERE finished < ?", [(before,)])

    def append_log(self, row: LogRow) -> asyncio.Future[None]:
        """Add a line to a log."""
        return self._run(Store._write, "INSERT INTO logs VALUES (?, ?, ?, ?, ?)", [row])

    def delete_logs(self, before: int) -> asyncio.Future[None]:
        """Delete the lines before a time in nanoseconds since 1970."""
        return self._run(Store._write, "DELETE FROM logs WHERE timestamp < ?", [(before,)])

    async def logs(
        self, deployment_id: str, *, start: int, end: int, newest_first: bool, limit: int, min_severity: int
    ) -> list[LogRow]:
        """Return the lines of a log from `start` to before `end`; a negative `limit` means no limit."""
        query = _NEWEST_LOGS if newest_first else _OLDEST_LOGS
        return await self._run(Store._logs, query, deployment_id, start, end, min_severity, limit)

    # The methods below, except `_run`, run in the store's thread.

    def _run(self, work: Callable[Concatenate[Store, P], T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        return asyncio.wrap_future(self._thread.submit(work, self, *args, **kwargs))

    def _open(self) -> None:
        make_private_file(self._path)  # it holds the secret that signs URLs
        self._db = sqlite3.connect(self._path, timeout=0, isolation_level=None, cached_statements=32)
        try:
            self._db.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            self._close()
            if "locked" not in str(error):
                raise
            raise StoreLockedError(f"{self._path.parent} is in use by another loops-local service") from error

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    @property
    def _open_db(self) -> sqlite3.Connection:
        if self._db is None:
            raise RuntimeError("the store is closed")
        return self._db

    def _secret(self, name: str) -> bytes:
        self._write("INSERT OR IGNORE INTO secrets VALUES (?, ?)", [(name, secrets.token_bytes(32))])
        return bytes(self._open_db.execute("SELECT value FROM secrets WHERE name = ?", (name,)).fetchone()[0])

    def _load(self, kind: type[R]) -> list[R]:
        decoder = msgspec.json.Decoder(kind)
        rows = self._open_db.execute("SELECT document FROM objects WHERE kind = ?", (kind.__name__,))
        return sorted((decoder.decode(row[0]) for row in rows), key=lambda record: record.created_at)

    def _write_objects(self, written: Sequence[_Row], deleted: Sequence[_Row]) -> None:
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO objects VALUES (?, ?, ?)", written)
            db.executemany("DELETE FROM objects WHERE kind = ? AND id = ?", deleted)

    def _write(self, statement: str, rows: Sequence[_Row]) -> None:
        with self._transaction() as db:
            db.executemany(statement, rows)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = self._open_db
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")

    def _outcome(self, run_id: str, operation_id: str) -> bytes | None:
        found = self._open_db.execute(
            "SELECT answer FROM operations WHERE run_id = ? AND id = ?", (run_id, operation_id)
        ).fetchone()
        return None if found is None else bytes(found[0])

    def _finished_operations(self) -> dict[tuple[str, str], float]:
        rows = self._open_db.execute("SELECT run_id, id, finished FROM operations")
        return {(run_id, operation_id): finished for run_id, operation_id, finished in rows}

    def _logs(self, query: str, *arguments: object) -> list[LogRow]:
        return [LogRow(*row) for row in self._open_db.execute(query, arguments)]

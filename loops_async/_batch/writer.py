"""Writing the records of a batch while the next answers arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import BinaryIO, Final

from anyio import to_thread

from .files import write_records
from .records import Record

MOST_PENDING: Final = 256
"""How many records may wait for a slow disk."""


class Writer:
    """Writes records in a worker thread, all that have arrived meanwhile at once: a hop for each would cost more.

    Args:
        file: where they go.
        on_written: is called after each write.
    """

    def __init__(self, file: BinaryIO, on_written: Callable[[], object]) -> None:
        self._file = file
        self._on_written = on_written
        self._pending: list[Record] = []
        self._writing: asyncio.Task[None] | None = None

    async def put(self, record: Record) -> None:
        """Write a record soon.

        Raises:
            OSError: writing an earlier one has failed.
        """
        self._pending.append(record)
        if self._writing is not None and len(self._pending) >= MOST_PENDING:
            await asyncio.wait([self._writing])
        if self._writing is None or self._writing.done():
            await self._written()
            self._writing = asyncio.create_task(self._write(), name="loops_async: write records")

    async def close(self) -> None:
        """Wait until all are written."""
        await self._written()
        await self._write()

    async def _written(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            await writing

    async def _write(self) -> None:
        while self._pending:
            records, self._pending = self._pending, []
            await to_thread.run_sync(write_records, self._file, records)
            self._on_written()

"""Checkpoints: directories of files, each with a row in the store."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Container, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from loops_async._tasks import TaskOwner
from loops_async.errors import InputError
from loops_async.protocol import CheckpointKind, CheckpointUri

from .._errors import not_found
from ..engine import Engine
from ..engine.base import Adapter
from .adapters import AdapterCache
from .records import CheckpointRecord, Record, RunRecord
from .store import Store

__all__ = ["Checkpoints", "StoredFile", "list_files", "total_size"]


class StoredFile(Struct, frozen=True):
    """A file of a checkpoint; `name` is relative to its directory, with ``/`` between segments."""

    name: str
    size_bytes: int
    last_modified: datetime


class Checkpoints:
    """All checkpoints, and the adapters read from them.

    A checkpoint's directory is named by its id, never by a name that a caller chose. Its files are written first and
    its row last, so a directory without a row was left by a killed process and is removed at the next start.

    A checkpoint is replaced when its run saves another under its name. If it is pinned, its row is kept, and only who
    knows its id finds it, until it is unpinned. Its files are removed when no row refers to them, neither its own nor
    that of the run that serves it, and no reader is inside a block of `reading`.
    """

    def __init__(self, store: Store, directory: Path, owner: TaskOwner) -> None:
        self._store = store
        self._root = directory.resolve()
        self._by_id: dict[str, CheckpointRecord] = {}
        self._by_uri: dict[CheckpointUri, CheckpointRecord] = {}
        self._replaced: dict[str, CheckpointRecord] = {}
        self._served: dict[str, str] = {}
        self._readers: Counter[str] = Counter()
        self._without_row: set[str] = set()
        self._adapters = AdapterCache(owner)

    @property
    def adapter_bytes(self) -> int:
        """The memory of the adapters that runs serve, requests use, or that are kept for the next request."""
        return self._adapters.nbytes

    async def open(self, runs: Iterable[RunRecord]) -> None:
        """Read the rows, and delete the directories that neither a row nor one of `runs` refers to."""
        for record in await self._store.load(CheckpointRecord):
            self._remember(record)
        self._served = {run.id: run.live.checkpoint_id for run in runs if run.live is not None}
        await asyncio.to_thread(self._remove_unknown, {*self._by_id, *self._replaced, *self._served.values()})

    def path(self, run_id: str, checkpoint_id: str) -> Path:
        """Return the directory of a checkpoint, which may not exist yet."""
        return self._root / run_id / checkpoint_id

    def directory(self, record: CheckpointRecord) -> Path:
        """Return the directory of a checkpoint."""
        return self.path(record.run_id, record.id)

    async def add(
        self, record: CheckpointRecord, *, adapter: Adapter | None = None, served_by: RunRecord | None = None
    ) -> None:
        """Add a checkpoint whose files are written; it replaces one of the same name.

        A process that is killed here leaves either the old state or the new one: memory is changed first, then all rows
        in one transaction, and the old files are removed last.

        Args:
            record: the checkpoint.
            adapter: its weights, where they are in memory already.
            served_by: its run, if that serves it from now on; its row is written too.
        """
        known = self._by_uri.get(record.uri)
        rows: list[Record] = [record]
        removed: list[CheckpointRecord] = []
        if known is not None:
            self._forget(known)
            if known.pinned_by:
                known.replaced = True
                self._remember(known)
                rows.append(known)
            else:
                removed.append(known)
        self._remember(record)
        if adapter is not None:
            self._adapters.share(record.id, adapter)
        outdated = {old.id for old in removed}
        if served_by is not None:
            rows.append(served_by)
            outdated.add(self._served.get(record.run_id, record.id))
            self._served[record.run_id] = record.id
        await self._store.put(*rows, delete=removed)
        for checkpoint_id in outdated:
            await self._retire(record.run_id, checkpoint_id)

    async def find(self, checkpoint_id: str) -> CheckpointRecord | None:
        """Return a checkpoint by its id, None when there is none."""
        await self._expire()
        return self._by_id.get(checkpoint_id)

    async def get(self, checkpoint_id: str) -> CheckpointRecord:
        """Return a checkpoint by its id."""
        record = await self.find(checkpoint_id)
        if record is None:
            raise not_found("checkpoint", checkpoint_id)
        return record

    async def at(self, uri: CheckpointUri) -> CheckpointRecord:
        """Return the checkpoint of a URI."""
        await self._expire()
        record = self._by_uri.get(uri)
        if record is None:
            raise not_found("checkpoint", str(uri))
        return record

    async def argument(self, path: str, *, kind: CheckpointKind, field: str) -> CheckpointRecord:
        """Return the checkpoint that a request has in `field`.

        Raises:
            InputError: `path` is not the URI of a checkpoint of this kind, or there is no such checkpoint.
        """
        uri = CheckpointUri.parse(path, kind=kind, path=field)
        await self._expire()
        if uri not in self._by_uri:
            raise InputError(field, f"there is no checkpoint {path!r}")
        return self._by_uri[uri]

    async def pinned(self, path: str, checkpoint_id: str, *, field: str) -> CheckpointRecord:
        """Return the checkpoint of a path that has this id, also if it was replaced.

        Raises:
            InputError: `path` is no such URI, or its checkpoint of this id is gone.
        """
        uri = CheckpointUri.parse(path, kind="sampler_weights", path=field)
        await self._expire()
        record = self._by_id.get(checkpoint_id) or self._replaced.get(checkpoint_id)
        if record is None or record.uri != uri:
            problem = f"checkpoint {checkpoint_id!r} of {path!r} has expired, or was replaced by another of its name"
            raise InputError(field, problem)
        return record

    async def pin(self, record: CheckpointRecord, by: str) -> None:
        """Keep a checkpoint, also if it is replaced, until the run or sampler with the id `by` is unpinned."""
        is_known = record.id in self._by_id or record.id in self._replaced
        if is_known and by not in record.pinned_by:
            record.pinned_by.append(by)
            await self._store.put(record)

    async def unpin(self, by: str) -> None:
        """Remove what was replaced and is pinned by no other run or sampler."""
        held = [each for each in (*self._by_id.values(), *self._replaced.values()) if by in each.pinned_by]
        for record in held:
            record.pinned_by.remove(by)
        gone = [record for record in held if record.replaced and not record.pinned_by]
        for record in gone:
            self._forget(record)
        await self._store.put(*[record for record in held if record not in gone], delete=gone)
        for record in gone:
            await self._retire(record.run_id, record.id)

    async def select(self, *, run_id: str | None = None, base_model: str | None = None) -> list[CheckpointRecord]:
        """Return the checkpoints of a run or of a model, oldest first."""
        await self._expire()
        return [
            record
            for record in self._by_id.values()
            if run_id in (None, record.run_id) and base_model in (None, record.base_model)
        ]

    async def files(self, record: CheckpointRecord) -> list[StoredFile]:
        """Return a checkpoint's files, ordered by name."""
        async with self.reading(record.run_id, record.id) as directory:
            return await asyncio.to_thread(list_files, directory)

    @asynccontextmanager
    async def loadable(self, path: str, *, base_model: str, local: bool) -> AsyncIterator[Path]:
        """Give the directory that a trainer of `base_model` may load; its files stay inside the block.

        Args:
            path: a ``bt://`` URI of a trainer's checkpoint, or a directory inside the data directory.
            base_model: the model that is trained.
            local: whether the run is of local mode; it may read only the checkpoints of local mode.

        Raises:
            InputError: there is no such checkpoint, the run may not read it, or it belongs to another model.
        """
        if path.startswith("bt:"):
            record = await self.argument(path, kind="weights", field="path")
            if local and not record.local:
                raise InputError("path", f"there is no checkpoint {path!r}")
            if record.base_model != base_model:
                raise InputError("path", f"{path!r} belongs to {record.base_model!r}, this run trains {base_model!r}")
        else:
            directory = await asyncio.to_thread(self._inside_data_dir, path)
            found = self._in_directory(directory)
            if local and (found is None or not found.local):
                raise InputError("path", f"local mode reads only checkpoints of local mode; got {path!r}")
            if found is None:
                yield directory
                return
            record = found
        async with self.reading(record.run_id, record.id) as directory:
            yield directory

    def _in_directory(self, directory: Path) -> CheckpointRecord | None:
        record = self._by_id.get(directory.name)
        return record if record is not None and self.directory(record) == directory else None

    def _inside_data_dir(self, path: str) -> Path:
        data_dir = self._root.parent.resolve()
        named = Path(unquote(urlsplit(path).path) if path.startswith("file:") else path)
        try:
            found = (data_dir / named).resolve()
            is_directory = found.is_dir()
        except (OSError, ValueError) as error:
            raise InputError("path", f"cannot be the path of a directory: {error}") from error
        if not found.is_relative_to(data_dir):
            raise InputError("path", f"files can only be read from the service's data directory; got {path!r}")
        if not is_directory:
            raise InputError("path", f"there is no directory {path!r}")
        return found

    async def adapter(self, run_id: str, checkpoint_id: str, engine: Engine) -> Adapter:
        """Return the weights of a checkpoint, read once for all callers."""
        async with self.reading(run_id, checkpoint_id) as directory:
            return await self._adapters.get(checkpoint_id, partial(asyncio.to_thread, engine.load_adapter, directory))

    async def pinned_adapter(self, record: CheckpointRecord, engine: Engine) -> Adapter:
        """Return the weights of a checkpoint that a request named, and keep them for the next such request."""
        adapter = await self.adapter(record.run_id, record.id, engine)
        if record.id in self._by_id or record.id in self._replaced:
            self._adapters.keep(record.id, adapter)
        return adapter

    @asynccontextmanager
    async def reading(self, run_id: str, checkpoint_id: str) -> AsyncIterator[Path]:
        """Give a checkpoint's directory; its files stay inside the block, also if it is replaced or expires."""
        self._readers[checkpoint_id] += 1
        try:
            yield self.path(run_id, checkpoint_id)
        finally:
            self._readers[checkpoint_id] -= 1
            if not self._readers[checkpoint_id]:
                del self._readers[checkpoint_id]
                await self._remove_unread(run_id, checkpoint_id)

    def _remember(self, record: CheckpointRecord) -> None:
        if record.replaced:
            self._replaced[record.id] = record
        else:
            self._by_id[record.id] = record
            self._by_uri[record.uri] = record

    def _forget(self, record: CheckpointRecord) -> None:
        self._by_id.pop(record.id, None)
        self._replaced.pop(record.id, None)
        if self._by_uri.get(record.uri) is record:
            del self._by_uri[record.uri]

    async def _expire(self) -> None:
        expired = [record for record in (*self._by_id.values(), *self._replaced.values()) if record.expired]
        for record in expired:
            self._forget(record)
        if expired:
            await self._store.put(delete=expired)
        for record in expired:
            await self._retire(record.run_id, record.id)

    async def _retire(self, run_id: str, checkpoint_id: str) -> None:
        """Remove the files of a checkpoint unless a row refers to it; called when the rows are written."""
        known = checkpoint_id in self._by_id or checkpoint_id in self._replaced
        if not known and checkpoint_id != self._served.get(run_id):
            self._without_row.add(checkpoint_id)
            await self._remove_unread(run_id, checkpoint_id)

    async def _remove_unread(self, run_id: str, checkpoint_id: str) -> None:
        """Remove files without a row, unless a reader is left, which will do it."""
        if checkpoint_id in self._without_row and not self._readers[checkpoint_id]:
            self._without_row.remove(checkpoint_id)
            self._adapters.release(checkpoint_id)
            await asyncio.to_thread(shutil.rmtree, self.path(run_id, checkpoint_id), ignore_errors=True)

    def _remove_unknown(self, known: Container[str]) -> None:
        for directory in self._root.glob("*/*"):
            if directory.name not in known:
                shutil.rmtree(directory)


def list_files(directory: Path) -> list[StoredFile]:
    """Return the files of a directory, ordered by name."""
    # A link could lead to a file outside the directory.
    paths = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted((_stored_file(directory, path) for path in paths), key=lambda file: file.name)


def _stored_file(directory: Path, path: Path) -> StoredFile:
    stat = path.stat()
    modified = datetime.fromtimestamp(stat.st_mtime, UTC)
    return StoredFile(path.relative_to(directory).as_posix(), stat.st_size, modified)


def total_size(directory: Path) -> int:
    """Return the bytes of all files of a directory."""
    return sum(file.size_bytes for file in list_files(directory))

"""Checkpoints: directories of files, each with a row in the store."""

from __future__ import annotations

import asyncio
import shutil
from collections import OrderedDict
from collections.abc import Callable, Container, Coroutine
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from loops_async._tasks import SingleFlight, TaskOwner
from loops_async.errors import InputError
from loops_async.protocol import CheckpointKind, CheckpointUri

from .._errors import not_found
from ..engine import Engine
from ..engine.base import Adapter
from .records import CheckpointRecord
from .store import Store

__all__ = ["Checkpoints", "StoredFile", "list_files", "total_size"]

_MAX_ADAPTERS: Final = 64


class StoredFile(Struct, frozen=True):
    """A file of a checkpoint; `name` is relative to its directory, with ``/`` between segments."""

    name: str
    size_bytes: int
    last_modified: datetime


class Checkpoints:
    """All checkpoints, and the adapters read from them.

    A checkpoint's directory is named by its id, never by a name that a caller chose. Its files are written first and
    its row last, so a directory without a row was left by a killed process and is removed at the next start.
    """

    def __init__(self, store: Store, directory: Path, owner: TaskOwner) -> None:
        self._store = store
        self._root = directory.resolve()
        self._by_id: dict[str, CheckpointRecord] = {}
        self._by_uri: dict[CheckpointUri, CheckpointRecord] = {}
        self._published: dict[str, str] = {}
        self._adapters: SingleFlight[str, Adapter] = SingleFlight(owner)
        self._recently_used: OrderedDict[str, None] = OrderedDict()

    async def open(self) -> None:
        """Read the rows."""
        for record in await self._store.load(CheckpointRecord):
            self._remember(record)

    async def remove_incomplete(self) -> None:
        """Delete the directories that nothing refers to; called after `publish` for every run."""
        await asyncio.to_thread(self._remove_unknown, {*self._by_id, *self._published.values()})

    def path(self, run_id: str, checkpoint_id: str) -> Path:
        """Return the directory of a checkpoint, which may not exist yet."""
        return self._root / run_id / checkpoint_id

    def directory(self, record: CheckpointRecord) -> Path:
        """Return the directory of a checkpoint."""
        return self.path(record.run_id, record.id)

    async def add(self, record: CheckpointRecord) -> None:
        """Add a checkpoint whose files are written; it replaces one of the same name."""
        replaced = self._by_uri.get(record.uri)
        self._remember(record)
        await self._store.put(record)
        if replaced is not None:
            await self._delete(replaced)

    async def publish(self, run_id: str, checkpoint_id: str, adapter: Adapter | None = None) -> None:
        """Keep the files that `run_id` serves until it publishes again, even if their checkpoint is replaced.

        Args:
            run_id: the run.
            checkpoint_id: whose weights it serves.
            adapter: these weights, where they are in memory already.
        """
        previous = self._published.get(run_id)
        self._published[run_id] = checkpoint_id
        if adapter is not None:
            self._read_once(checkpoint_id, partial(_ready, adapter))
        if previous is not None and previous not in self._by_id:
            await self._remove_files(run_id, previous)

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
        return await asyncio.to_thread(list_files, self.directory(record))

    async def loadable(self, path: str, *, base_model: str, local: bool) -> Path:
        """Return the directory that a trainer of `base_model` may load.

        Args:
            path: a ``bt://`` URI of a trainer's checkpoint, or a directory inside the data directory.
            base_model: the model that is trained.
            local: whether the run is of local mode; it may read only the checkpoints of local mode.

        Raises:
            InputError: there is no such checkpoint, the run may not read it, or it belongs to another model.
        """
        if not path.startswith("bt:"):
            directory = await asyncio.to_thread(self._inside_data_dir, path)
            known = self._by_id.get(directory.name)
            if local and (known is None or not known.local or self.directory(known) != directory):
                raise InputError("path", f"local mode reads only checkpoints of local mode; got {path!r}")
            return directory
        record = await self.argument(path, kind="weights", field="path")
        if local and not record.local:
            raise InputError("path", f"there is no checkpoint {path!r}")
        if record.base_model != base_model:
            raise InputError("path", f"{path!r} belongs to {record.base_model!r}, this run trains {base_model!r}")
        return self.directory(record)

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
        """Return the weights of a checkpoint: read once for all callers, and kept while recently used."""
        read = partial(asyncio.to_thread, engine.load_adapter, self.path(run_id, checkpoint_id))
        self._read_once(checkpoint_id, read)
        return await self._adapters.get(checkpoint_id, read)

    def _read_once(self, checkpoint_id: str, read: Callable[[], Coroutine[Any, Any, Adapter]]) -> None:
        self._adapters.start(checkpoint_id, read)
        self._recently_used[checkpoint_id] = None
        self._recently_used.move_to_end(checkpoint_id)
        if len(self._recently_used) > _MAX_ADAPTERS:
            self._discard_adapter(next(iter(self._recently_used)))

    def _discard_adapter(self, checkpoint_id: str) -> None:
        self._recently_used.pop(checkpoint_id, None)
        self._adapters.discard(checkpoint_id)

    def _remember(self, record: CheckpointRecord) -> None:
        self._by_id[record.id] = record
        self._by_uri[record.uri] = record

    async def _expire(self) -> None:
        for record in [record for record in self._by_id.values() if record.expired]:
            await self._delete(record)

    async def _delete(self, record: CheckpointRecord) -> None:
        self._by_id.pop(record.id, None)
        if self._by_uri.get(record.uri) is record:
            del self._by_uri[record.uri]
        await self._store.delete(record)
        if self._published.get(record.run_id) != record.id:
            await self._remove_files(record.run_id, record.id)

    async def _remove_files(self, run_id: str, checkpoint_id: str) -> None:
        self._discard_adapter(checkpoint_id)
        await asyncio.to_thread(shutil.rmtree, self.path(run_id, checkpoint_id), ignore_errors=True)

    def _remove_unknown(self, known: Container[str]) -> None:
        for directory in self._root.glob("*/*"):
            if directory.name not in known:
                shutil.rmtree(directory)


async def _ready(adapter: Adapter) -> Adapter:
    return adapter


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

"""Checkpoints: directories of files, each with a row in the store."""

from __future__ import annotations

import asyncio
import shutil
from collections import OrderedDict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from loops_async.errors import InputError
from loops_async.protocol import CheckpointUri

from .engine import Engine, RefusedError
from .engine.base import Adapter
from .records import CheckpointRecord
from .store import Store
from .web import not_found

__all__ = ["Checkpoints", "StoredFile", "files_below", "parse_uri", "size_below"]

_ADAPTERS_KEPT: Final = 64


class StoredFile(Struct, frozen=True):
    """A file of a checkpoint; `name` is relative to its directory, with ``/`` between segments."""

    name: str
    size_bytes: int
    last_modified: datetime


class Checkpoints:
    """All checkpoints that there are.

    A checkpoint's directory is named by its id, never by what a caller chose. It is written first and gets its row
    when it is complete, so a directory without a row is what a kill left, and is removed at the next start.
    """

    def __init__(self, store: Store, directory: Path) -> None:
        self._store = store
        self._root = directory.resolve()
        self._by_id: dict[str, CheckpointRecord] = {}
        self._by_uri: dict[CheckpointUri, CheckpointRecord] = {}
        self._adapters: OrderedDict[str, asyncio.Future[Adapter]] = OrderedDict()
        self._served: dict[str, str] = {}

    async def open(self) -> None:
        """Read what there is."""
        for record in await self._store.load(CheckpointRecord):
            self._remember(record)

    async def remove_leftovers(self) -> None:
        """Delete directories that nothing refers to; called once the runs have told what they serve."""
        await asyncio.to_thread(self._remove_leftovers, {*self._by_id, *self._served.values()})

    def draft(self, run_id: str, checkpoint_id: str) -> Path:
        """Return the directory to write a new checkpoint into."""
        return self._root / run_id / checkpoint_id

    async def add(self, record: CheckpointRecord) -> None:
        """Make a checkpoint known whose files are written; one of the same name is replaced."""
        replaced = self._by_uri.get(record.uri)
        self._remember(record)
        await self._store.put(record)
        if replaced is not None:
            await self._forget(replaced)

    async def serve(self, run_id: str, checkpoint_id: str, adapter: Adapter | None = None) -> None:
        """Keep the files of what `run_id` serves until it serves something else, even when they are replaced."""
        previous = self._served.get(run_id)
        self._served[run_id] = checkpoint_id
        if adapter is not None:
            ready = asyncio.get_running_loop().create_future()
            ready.set_result(adapter)
            self._adapters[checkpoint_id] = ready
        if previous is not None and previous not in self._by_id:
            await self._remove_files(run_id, previous)

    def directory(self, record: CheckpointRecord) -> Path:
        """Return where a checkpoint's files are."""
        return self._root / record.run_id / record.id

    async def find(self, checkpoint_id: str) -> CheckpointRecord | None:
        """Return a checkpoint by its id, None when there is none (any more)."""
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

    async def of(self, *, run_id: str | None = None, base_model: str | None = None) -> list[CheckpointRecord]:
        """Return the checkpoints of a run or of a model, oldest first."""
        await self._expire()
        return [
            record
            for record in self._by_id.values()
            if run_id in (None, record.run_id) and base_model in (None, record.base_model)
        ]

    async def files(self, record: CheckpointRecord) -> list[StoredFile]:
        """Return a checkpoint's files, ordered by name."""
        return await asyncio.to_thread(files_below, self.directory(record))

    async def readable(self, path: str, *, base_model: str, local: bool) -> Path:
        """Return the directory that a trainer of `base_model` may load.

        Args:
            path: a ``bt://`` URI of a trainer's checkpoint, or a directory inside the data directory.
            base_model: the model that is trained.
            local: whether a run of local mode asks; it may read what local mode has saved and nothing else.

        Raises:
            RefusedError: it may not, or the checkpoint is of another model.
            HttpError: there is no such checkpoint.
        """
        if not path.startswith("bt:"):
            directory = await asyncio.to_thread(self._inside, path)
            record = self._by_id.get(directory.name)
            if local and (record is None or not record.local or self.directory(record) != directory):
                raise RefusedError(f"path: local mode reads what local mode has saved; got {path!r}")
            return directory
        record = await self.at(parse_uri(path, kind="weights"))
        if local and not record.local:
            raise not_found("checkpoint", path)
        if record.base_model != base_model:
            raise RefusedError(f"path: {path!r} belongs to {record.base_model!r}, this run trains {base_model!r}")
        return self.directory(record)

    def _inside(self, path: str) -> Path:
        data_dir = self._root.parent.resolve()
        named = Path(unquote(urlsplit(path).path) if path.startswith("file:") else path)
        found = (data_dir / named).resolve()
        if not found.is_relative_to(data_dir):
            raise RefusedError(f"path: files can only be read from the service's data directory; got {path!r}")
        if not found.is_dir():
            raise RefusedError(f"path: there is no directory {path!r}")
        return found

    async def adapter(self, run_id: str, checkpoint_id: str, engine: Engine) -> Adapter:
        """Return the weights of a checkpoint, read once for everybody and kept while it is used."""
        found = self._adapters.get(checkpoint_id)
        if found is None or (found.done() and found.exception() is not None):
            loading = asyncio.to_thread(engine.load_adapter, self.draft(run_id, checkpoint_id))
            found = self._adapters[checkpoint_id] = asyncio.ensure_future(loading)
        self._adapters.move_to_end(checkpoint_id)
        while len(self._adapters) > _ADAPTERS_KEPT:
            self._adapters.popitem(last=False)
        return await asyncio.shield(found)

    def _remember(self, record: CheckpointRecord) -> None:
        self._by_id[record.id] = record
        self._by_uri[record.uri] = record

    async def _expire(self) -> None:
        for record in [record for record in self._by_id.values() if record.expired]:
            await self._forget(record)

    async def _forget(self, record: CheckpointRecord) -> None:
        self._by_id.pop(record.id, None)
        if self._by_uri.get(record.uri) is record:
            del self._by_uri[record.uri]
        await self._store.delete(record)
        if self._served.get(record.run_id) != record.id:
            await self._remove_files(record.run_id, record.id)

    async def _remove_files(self, run_id: str, checkpoint_id: str) -> None:
        self._adapters.pop(checkpoint_id, None)
        await asyncio.to_thread(shutil.rmtree, self.draft(run_id, checkpoint_id), ignore_errors=True)

    def _remove_leftovers(self, known: Iterable[str]) -> None:
        for directory in self._root.glob("*/*"):
            if directory.name not in known:
                shutil.rmtree(directory)


def parse_uri(text: str, *, kind: str | None = None, field: str = "path") -> CheckpointUri:
    """Parse a ``bt://`` URI of an operation."""
    try:
        uri = CheckpointUri.parse(text, path=field)
    except InputError as error:
        raise RefusedError(str(error)) from error
    if kind is not None and uri.kind != kind:
        raise RefusedError(f"{field}: must be a '{kind}' checkpoint; got {text!r}")
    return uri


def files_below(directory: Path) -> list[StoredFile]:
    """Return the files of a directory, ordered by name."""
    # A link could lead to a file of somebody else.
    paths = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted((_stored_file(directory, path) for path in paths), key=lambda file: file.name)


def _stored_file(directory: Path, path: Path) -> StoredFile:
    stat = path.stat()
    modified = datetime.fromtimestamp(stat.st_mtime, UTC)
    return StoredFile(path.relative_to(directory).as_posix(), stat.st_size, modified)


def size_below(directory: Path) -> int:
    """Return the bytes of all files of a directory."""
    return sum(file.size_bytes for file in files_below(directory))

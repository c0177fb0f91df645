"""Downloading the files of a checkpoint, all of them or none."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from os import PathLike
from pathlib import Path
from typing import Final, Literal

import anyio
from anyio import to_thread
from msgspec import Struct

from .._files import flush
from .._http.messages import Request
from .._http.retry import DOWNLOAD, retry
from .._http.tape import OpenAnswer
from .._session.runtime import Runtime
from .._tasks import SingleFlight
from .._work.registry import Entry
from ..errors import ApiError, ConnectError, InputError, ProtocolError
from ..protocol import encode, segment
from ..types import CheckpointDownload, CheckpointFile, DownloadProgress
from .checksums import stated_checksum, stated_version
from .listing import checkpoint_files
from .paths import local_paths, name_errors, reject_symlinks

__all__ = ["download"]

log = logging.getLogger("loops_async.checkpoints")

FILES_AT_ONCE: Final = 8
BLOCK_BYTES: Final = 1 << 20
IDLE_SECONDS: Final = 60.0
"""The longest time without new data; the total time of a file is not limited."""

MTIME_TOLERANCE_SECONDS: Final = 0.001
"""File systems round times."""

EXPIRED_STATUSES: Final = (400, 401, 403, 410)
"""The statuses with which file stores answer an expired signed URL."""

RANGE_NOT_SATISFIABLE: Final = 416
"""The status of a store that does not have the rest of a partial file, which is then downloaded anew."""

_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-")


async def download(
    runtime: Runtime,
    checkpoint_id: str,
    dest_dir: str | PathLike[str],
    on_progress: Callable[[DownloadProgress], object] | None = None,
) -> CheckpointDownload:
    """Download all files of a checkpoint into `dest_dir`, all or none.

    Files are fetched into ``.<checkpoint_id>.part`` and moved to their final paths when all are complete. A later call
    resumes an interrupted download, and skips files that have the size and time of the listing. Nothing is written if
    a name is unsafe. Sizes are compared with the listing, and checksums if the file store sends one. A file that was
    changed since it was interrupted is downloaded anew. The API key is not sent to the file URLs; expired URLs are
    renewed.

    Raises:
        ProtocolError: the listing names a file outside `dest_dir`, the same file twice, or one that this file system
            or Windows cannot hold; or a file has another size or checksum than stated.
        UnsupportedError: the checkpoint is stored where there are no file URLs.
        InputError: `dest_dir` is a file.
        OSError: the disk is full or not writable.
    """
    with runtime.transport.work.begin("download", f"checkpoint {checkpoint_id}", id=checkpoint_id) as entry:
        return await _download(runtime, entry, checkpoint_id, Path(dest_dir), on_progress)


async def _download(
    runtime: Runtime,
    entry: Entry,
    checkpoint_id: str,
    root: Path,
    on_progress: Callable[[DownloadProgress], object] | None,
) -> CheckpointDownload:
    if await anyio.Path(root).is_file():
        raise InputError("dest_dir", f"must be a directory; {root} is a file")
    files = [file async for file in checkpoint_files(runtime.control_plane, checkpoint_id)]
    entry.tell("listed")
    # Adapters of different steps have the same file names and sizes, so partial files of one must not pass for another.
    staging = Staging(root, f".{segment(checkpoint_id)}.part")
    listing = await to_thread.run_sync(staging.arrange, files)
    progress = Progress(listing, on_progress)
    urls = FileUrls(runtime, checkpoint_id, files)
    waiting = iter(listing)
    try:
        async with anyio.create_task_group() as group:
            for _ in range(min(FILES_AT_ONCE, len(listing))):
                group.start_soon(_fetch_all, runtime, waiting, urls, progress)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    entry.tell("fetched")
    await to_thread.run_sync(staging.move_into_place, listing)
    entry.tell("complete")
    log.info("checkpoint %s: downloaded, %d files, %d B fetched", checkpoint_id, len(files), progress.bytes_fetched)
    return CheckpointDownload(
        dest_dir=root,
        file_count=len(files),
        bytes_written=sum(file.size_bytes for file in files),
        bytes_fetched=progress.bytes_fetched,
    )


class Item(Struct, frozen=True):
    """A file of the listing and its paths: the final one, and those while it is fetched and once it is complete.

    `validator` is the path of what the store calls the version of the partial file.
    """

    file: CheckpointFile
    target: Path
    partial: Path
    validator: Path
    complete: Path

    @property
    def name(self) -> str:
        return self.file.relative_file_name

    @property
    def modified(self) -> float | None:
        """The Unix time of the listing; None if there is none. Some stores state the year 1 for an unknown time."""
        seconds = self.file.last_modified.timestamp() if self.file.last_modified else 0.0
        return seconds if seconds > 0.0 else None


class Staging:
    """The directory for files until all are complete: ``half/`` for partial files, ``whole/`` for checked ones.

    A file's name there is made of all that the listing says of it, so that no file is resumed from another version.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._root = root
        self._name = name
        self._directory = root / name

    def arrange(self, files: list[CheckpointFile]) -> list[Item]:
        """Return the paths of each file, or reject the whole listing."""
        items = [
            self._item(file, self._root / path)
            for file, path in zip(files, local_paths(files, reserved=self._name), strict=True)
        ]
        for item in items:
            with name_errors(item.name):
                reject_symlinks(self._root, [item.target, item.partial, item.validator, item.complete])
        return items

    def _item(self, file: CheckpointFile, target: Path) -> Item:
        version = [file.relative_file_name, file.node_rank, file.size_bytes, file.last_modified]
        name = hashlib.sha256(encode(version)).hexdigest()[:32]
        half, whole = self._directory / "half", self._directory / "whole"
        return Item(file, target, half / name, half / f"{name}.version", whole / name)

    def move_into_place(self, items: list[Item]) -> None:
        """Move every fetched file to its final path; call this when all files are complete."""
        for item in items:
            if item.complete.exists():
                with name_errors(item.name):
                    item.target.parent.mkdir(parents=True, exist_ok=True)
                    item.complete.replace(item.target)
        shutil.rmtree(self._directory, ignore_errors=True)


class Progress:
    """Counts fetched bytes and files, and reports them to the caller."""

    def __init__(self, items: list[Item], on_progress: Callable[[DownloadProgress], object] | None) -> None:
        self.bytes_fetched = 0
        self._on_progress = on_progress
        self._bytes: dict[Path, int] = {}
        self._furthest: dict[Path, int] = {}
        self._bytes_done = self._files_done = 0
        self._bytes_total = sum(item.file.size_bytes for item in items)
        self._files_total = len(items)

    def furthest(self, item: Item) -> int:
        """Return the most bytes of a file that were there at once; it may have been begun anew since."""
        return self._furthest.get(item.target, 0)

    def set_size(self, item: Item, size: int) -> None:
        """Record the number of bytes of a file that are on disk."""
        self._bytes_done += size - self._bytes.get(item.target, 0)
        self._bytes[item.target] = size
        self._furthest[item.target] = max(size, self.furthest(item))
        self._report()

    def finish(self, item: Item) -> None:
        """Record that a file is complete."""
        self._files_done += 1
        self.set_size(item, item.file.size_bytes)

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(
                DownloadProgress(
                    bytes_done=self._bytes_done,
                    bytes_total=self._bytes_total,
                    files_done=self._files_done,
                    files_total=self._files_total,
                )
            )


class FileUrls:
    """The signed URLs of a checkpoint's files. When one has expired, all are renewed together."""

    def __init__(self, runtime: Runtime, checkpoint_id: str, files: list[CheckpointFile]) -> None:
        self._plane = runtime.control_plane
        self._checkpoint_id = checkpoint_id
        self._urls = _urls_of(files)
        self._renewals: SingleFlight[str, None] = SingleFlight(runtime.tasks)

    def of(self, file: CheckpointFile) -> str:
        """Return the newest URL of a file."""
        if _key(file) not in self._urls:
            raise ProtocolError(f"checkpoint {self._checkpoint_id} no longer lists {file.relative_file_name}")
        return self._urls[_key(file)]

    async def renew(self, file: CheckpointFile, expired: str) -> None:
        """Fetch new URLs, unless `expired` was already replaced for another file."""
        if self._urls.get(_key(file)) == expired:
            await self._renewals.get("new URLs", self._renew)

    async def _renew(self) -> None:
        self._urls = _urls_of([fresh async for fresh in checkpoint_files(self._plane, self._checkpoint_id)])
        self._renewals.discard("new URLs")


def _urls_of(files: list[CheckpointFile]) -> dict[tuple[str, int], str]:
    return {_key(file): file.url for file in files}


def _key(file: CheckpointFile) -> tuple[str, int]:
    return file.relative_file_name, file.node_rank


async def _fetch_all(runtime: Runtime, waiting: Iterator[Item], urls: FileUrls, progress: Progress) -> None:
    """Fetch files of the shared iterator until it is exhausted."""
    for item in waiting:
        if not await to_thread.run_sync(_is_done, item):
            await _fetch(runtime, item, urls, progress)
        progress.finish(item)


def _is_done(item: Item) -> bool:
    if item.complete.is_file():
        return True
    if item.modified is None or not item.target.is_file() or item.target.stat().st_size != item.file.size_bytes:
        return False
    return abs(item.target.stat().st_mtime - item.modified) < MTIME_TOLERANCE_SECONDS


async def _fetch(runtime: Runtime, item: Item, urls: FileUrls, progress: Progress) -> None:
    await anyio.Path(item.partial.parent).mkdir(parents=True, exist_ok=True)

    async def attempt() -> None:
        url = urls.of(item.file)
        try:
            await _fetch_remaining(runtime, item, url, progress)
        except ApiError as error:
            if error.status in EXPIRED_STATUSES:
                await urls.renew(item.file, url)
            elif error.status == RANGE_NOT_SATISFIABLE:
                await _discard_partial(item)
            else:
                raise
            await _fetch_remaining(runtime, item, urls.of(item.file), progress)

    try:
        await retry(
            attempt,
            DOWNLOAD,
            what=f"{item.name} is not complete yet",
            budget=runtime.transport.retry_budget,
            progress=lambda: progress.furthest(item),
        )
    except ProtocolError:
        await _discard_partial(item)
        raise
    await to_thread.run_sync(_mark_complete, item)


def _mark_complete(item: Item) -> None:
    """Flush a checked file to disk, so that it survives a crash, and move it to the complete files."""
    with item.partial.open("r+b") as file:  # Windows flushes only files that are open for writing
        flush(file)
    if item.modified is not None:
        os.utime(item.partial, (item.modified, item.modified))
    item.complete.parent.mkdir(parents=True, exist_ok=True)
    item.partial.replace(item.complete)


async def _fetch_remaining(runtime: Runtime, item: Item, url: str, progress: Progress) -> None:
    """Fetch the rest of a partial file, then check its size and checksum."""
    offset = _first_missing(await to_thread.run_sync(_size, item.partial), item.file.size_bytes)
    resumed = await to_thread.run_sync(_read_version, item.validator) if offset else ""
    request = Request(
        method="GET",
        url=url,
        has_signed_url=True,
        what=f"download {item.name}",
        headers=_headers(offset, resumed),
        timeout=None,
        idle_timeout=IDLE_SECONDS,
    )
    async with runtime.transport.stream(request) as answer:
        start = await _start(item, answer, offset, resumed)
        checksum = stated_checksum(answer.headers)
        written = await _receive(item, answer, start, progress)
    if written != item.file.size_bytes:
        kind = ConnectError if written < item.file.size_bytes else ProtocolError
        await _discard_partial(item)
        raise kind(f"{item.name} has {written:,} bytes; the listing says {item.file.size_bytes:,}")
    if checksum is not None and not await to_thread.run_sync(checksum.matches, item.partial):
        raise ProtocolError(
            f"{item.name} does not have the {checksum.algorithm} that its store states; download it again"
        )


def _first_missing(there: int, size: int) -> int:
    """Return the first byte to fetch of a file of which some bytes are there."""
    if there > size:
        return 0
    # If all are there but unchecked, the last one is fetched again, since the answer carries the checksum.
    return min(there, max(0, size - 1))


async def _start(item: Item, answer: OpenAnswer, offset: int, resumed: str) -> int:
    """Return the byte with which an answer begins: `offset`, or 0 if the store sends the whole file."""
    if not offset or answer.status != 206:
        return 0
    content_range = answer.headers.get("Content-Range", "")
    if not _starts_at(content_range, offset):
        raise ProtocolError(f"{item.name}: requested bytes from {offset}, got {content_range or None}")
    version = stated_version(answer.headers)
    if resumed and version and version != resumed:
        await _discard_partial(item)
        raise ConnectError(f"{item.name} was changed at its store while it was downloaded")
    return offset


async def _receive(item: Item, answer: OpenAnswer, start: int, progress: Progress) -> int:
    """Write what an answer sends behind the first `start` bytes; return how many there are then, or would be."""
    async with _open_file(item.partial, "r+b" if start else "wb") as out:
        await out.truncate(start)
        await out.seek(start)
        if not start:
            # Written after the old bytes are gone, and before the new ones come.
            await anyio.Path(item.validator).write_text(stated_version(answer.headers), encoding="utf-8")
        written = start
        progress.set_size(item, written)
        async for block in answer.content.iter_chunked(BLOCK_BYTES):
            written += len(block)
            if written > item.file.size_bytes:
                break
            await out.write(block)
            progress.bytes_fetched += len(block)
            progress.set_size(item, written)
    return written


def _headers(offset: int, version: str) -> dict[str, str]:
    # A compressed answer would have another length and other offsets.
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version:
            headers["If-Range"] = version
    return headers


def _read_version(path: Path) -> str:
    """Return what was written when the download of a file began, empty if it is missing or damaged."""
    try:
        version = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return ""
    return version if version.isascii() and version.isprintable() else ""


@asynccontextmanager
async def _open_file(path: Path, mode: Literal["r+b", "wb"]) -> AsyncGenerator[anyio.AsyncFile[bytes]]:
    """Open a file, and close it even when cancelled, which anyio before 4.14 does not do."""
    file = await anyio.open_file(path, mode)
    try:
        yield file
    finally:
        with anyio.CancelScope(shield=True):
            await file.aclose()


async def _discard_partial(item: Item) -> None:
    """Remove a partial file that may hold wrong bytes, so that no later call resumes from it."""
    await anyio.Path(item.partial).unlink(missing_ok=True)
    await anyio.Path(item.validator).unlink(missing_ok=True)


def _starts_at(content_range: str, start: int) -> bool:
    found = _CONTENT_RANGE.match(content_range)
    return found is not None and int(found[1]) == start


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

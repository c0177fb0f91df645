"""Checkpoint files: listing them page by page, and downloading them whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Final

import anyio
from anyio import CapacityLimiter, to_thread

from ._retry import Patience, retrying
from ._runtime import Runtime
from ._transport import Request
from .errors import ApiError, ConnectError, InputError, ProtocolError
from .protocol import segment
from .types import CheckpointDownload, CheckpointFile

__all__ = ["checkpoint_files", "download"]

FILES_AT_ONCE: Final = 8
BLOCK_BYTES: Final = 1 << 20
PAGE_SIZE: Final = 1000
FILE_PATIENCE: Final = Patience(tries=5)
SAME_SECONDS: Final = 0.001
"""Disks round times."""
EXPIRED: Final = (401, 403, 410)
"""What a file store answers when a signed URL has expired."""


async def checkpoint_files(runtime: Runtime, checkpoint_id: str) -> AsyncIterator[CheckpointFile]:
    """Yield every file of a checkpoint, fetching pages as they are needed."""
    token: int | None = 0
    while token is not None:
        page = await runtime.control_plane.get_checkpoint_files(checkpoint_id, page_size=PAGE_SIZE, page_token=token)
        for file in page.presigned_urls:
            yield file
        if page.next_page_token is not None and page.next_page_token <= token:
            raise ProtocolError(
                f"checkpoint {checkpoint_id}: page {token} of its files names {page.next_page_token} as the next"
            )
        token = page.next_page_token


async def download(runtime: Runtime, checkpoint_id: str, dest_dir: str | PathLike[str]) -> CheckpointDownload:
    """Download all files of a checkpoint into `dest_dir`, whole or not at all.

    Files gather in ``.<checkpoint_id>.part`` and get their places when all of them are whole; a later call goes on
    where one was stopped, and leaves alone what is there with the size and time of the listing. Nothing is written
    when any name is unsafe. The API key is not sent to the file URLs; a URL that expired is asked for again.

    Raises:
        ProtocolError: the listing names a file outside `dest_dir` or the same file twice, or a file has another
            size than the listing says.
        InputError: `dest_dir` is a file.
    """
    root = Path(dest_dir)
    if await anyio.Path(root).is_file():
        raise InputError("dest_dir", f"must be a directory; {root} is a file")
    files = [file async for file in checkpoint_files(runtime, checkpoint_id)]
    # The adapters of two steps have the same names and sizes: what is left of one must not pass for the other.
    staging = root / f".{segment(checkpoint_id)}.part"
    places = await to_thread.run_sync(_places, root, staging, files)
    limiter = CapacityLimiter(FILES_AT_ONCE)
    try:
        async with anyio.create_task_group() as group:
            for file, place in zip(files, places, strict=True):
                group.start_soon(_fetch, runtime, checkpoint_id, file, root / place, staging / place, limiter)
    except* Exception as failures:
        raise failures.exceptions[0] from None
    await to_thread.run_sync(_move, staging, root, files, places)
    return CheckpointDownload(
        dest_dir=root, file_count=len(files), bytes_written=sum(file.size_bytes for file in files)
    )


def _places(root: Path, staging: Path, files: list[CheckpointFile]) -> list[PurePosixPath]:
    """Return where in its directory each file goes, or refuse the whole listing.

    Files of one name from several nodes go to ``node-<rank>/`` each.
    """
    names = [_parts(file.relative_file_name) for file in files]
    is_shared = len({tuple(parts) for parts in names}) < len(names)
    places = [
        PurePosixPath(*([f"node-{file.node_rank}"] if is_shared else []), *parts)
        for file, parts in zip(files, names, strict=True)
    ]
    # A case-insensitive disk would let `A` and `a` overwrite each other.
    folded = [PurePosixPath(str(place).casefold()) for place in places]
    directories = {parent for place in folded for parent in place.parents} | {PurePosixPath(staging.name.casefold())}
    if len(set(folded)) < len(places) or directories.intersection(folded):
        raise ProtocolError("the checkpoint's listing names the same file twice; nothing was written")
    _refuse_links(root, [directory / place for directory in (root, staging) for place in places])
    return places


def _refuse_links(root: Path, paths: list[Path]) -> None:
    real_root = root.resolve()
    for path in paths:
        if not path.parent.resolve().is_relative_to(real_root) or path.is_symlink():
            raise ProtocolError(f"{path} leaves the directory through a symbolic link; nothing was written")


def _move(staging: Path, root: Path, files: list[CheckpointFile], places: list[PurePosixPath]) -> None:
    for file, place in zip(files, places, strict=True):
        if (staging / place).exists():
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (staging / place).replace(root / place)
            if file.last_modified is not None:
                os.utime(root / place, (file.last_modified.timestamp(),) * 2)
    shutil.rmtree(staging, ignore_errors=True)


def _parts(name: str) -> list[str]:
    """Split a file's name into safe path segments."""
    parts = name.split("/")
    is_unsafe = (
        not name
        or "\\" in name
        or not name.isprintable()
        or any(part in ("", ".", "..") or part[1:2] == ":" or part.endswith((".", " ")) for part in parts)
    )
    if is_unsafe:
        raise ProtocolError(f"the checkpoint's listing has an unsafe file name {name!r}; nothing was written")
    return parts


async def _fetch(
    runtime: Runtime, checkpoint_id: str, file: CheckpointFile, place: Path, half: Path, limiter: CapacityLimiter
) -> None:
    async with limiter:
        if await to_thread.run_sync(lambda: _is_there(place, file) or _is_whole(half, file.size_bytes)):
            return
        await anyio.Path(half.parent).mkdir(parents=True, exist_ok=True)
        url = file.url

        async def attempt() -> None:
            nonlocal url
            try:
                await _append(runtime, file, url, half)
            except ApiError as error:
                if error.status not in EXPIRED:
                    raise
                url = await _renewed_url(runtime, checkpoint_id, file)
                await _append(runtime, file, url, half)

        await retrying(attempt, FILE_PATIENCE, what=f"{file.relative_file_name} is not whole yet")


def _is_there(place: Path, file: CheckpointFile) -> bool:
    if file.last_modified is None or not _is_whole(place, file.size_bytes):
        return False
    return abs(place.stat().st_mtime - file.last_modified.timestamp()) < SAME_SECONDS


def _is_whole(place: Path, size: int) -> bool:
    return place.is_file() and place.stat().st_size == size


async def _append(runtime: Runtime, file: CheckpointFile, url: str, half: Path) -> None:
    """Fetch what `half` does not have yet."""
    have = await to_thread.run_sync(lambda: half.stat().st_size if half.exists() else 0)
    if have > file.size_bytes:
        have = 0
    if have == file.size_bytes and have:
        return
    request = Request(
        method="GET",
        url=url,
        what=f"download {file.relative_file_name}",
        headers={"Range": f"bytes={have}-"} if have else {},
        timeout=None,
        authorize=False,
    )
    async with runtime.transport.stream(request) as response:
        is_rest = response.status == 206
        async with await anyio.open_file(half, "ab" if is_rest else "wb") as out:
            async for block in response.content.iter_chunked(BLOCK_BYTES):
                await out.write(block)
            written = await out.tell()
    if written != file.size_bytes:
        # Bytes of unknown origin must not be built upon.
        await anyio.Path(half).unlink()
        kind = ConnectError if written < file.size_bytes else ProtocolError
        raise kind(f"{file.relative_file_name} has {written:,} bytes; the listing says {file.size_bytes:,}")


async def _renewed_url(runtime: Runtime, checkpoint_id: str, file: CheckpointFile) -> str:
    async for fresh in checkpoint_files(runtime, checkpoint_id):
        if (fresh.relative_file_name, fresh.node_rank) == (file.relative_file_name, file.node_rank):
            return fresh.url
    raise ProtocolError(f"checkpoint {checkpoint_id} no longer lists {file.relative_file_name}")

"""Files: pages of signed URLs, and the bytes behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from aiohttp import web

from loops_async import types

from .checkpoints import Checkpoints, StoredFile, files_below
from .records import CheckpointRecord
from .signing import UrlSigner
from .web import HttpError, not_found, query_int

__all__ = ["SIGNED_ROOTS", "Files"]

SIGNED_ROOTS = ("/files/", "/archives/")
"""Below these, a signature is needed instead of a key."""

_PAGE_SIZE = 1000


class Files:
    """Serves files to whoever holds a signed URL, in parts where asked (``Range``)."""

    def __init__(self, checkpoints: Checkpoints, signer: UrlSigner, archives: Path) -> None:
        self._checkpoints = checkpoints
        self._signer = signer
        self._archives = archives

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [
            web.get("/files/{checkpoint_id}/{name:.+}", self.download),
            web.get("/archives/{deployment_id}/{name}", self.download_archive),
        ]

    async def page(self, record: CheckpointRecord, request: web.Request) -> types.CheckpointFilesResponse:
        """Return the page of a checkpoint's files that the query asks for."""
        size = query_int(request, "page_size", _PAGE_SIZE, least=1)
        start = query_int(request, "page_token", 0, least=0)
        files = await self._checkpoints.files(record)
        end = start + size
        return types.CheckpointFilesResponse(
            presigned_urls=[self._show(file, request, "files", record.id) for file in files[start:end]],
            next_page_token=end if end < len(files) else None,
            total_count=len(files),
        )

    async def archive(
        self, deployment_id: str, name: str, content: bytes, request: web.Request
    ) -> list[types.CheckpointFile]:
        """Write a file of a deployment's debug archive; return all of them."""
        directory = self._archives / deployment_id
        files = await asyncio.to_thread(_write_and_list, directory, name, content)
        return [self._show(file, request, "archives", deployment_id) for file in files]

    def _show(self, file: StoredFile, request: web.Request, root: str, owner: str) -> types.CheckpointFile:
        # As the caller reached us, so that it works through a forwarded port.
        url = request.url.origin().joinpath(root, owner, *PurePosixPath(file.name).parts)
        return types.CheckpointFile(
            url=str(self._signer.sign(url)),
            relative_file_name=file.name,
            node_rank=0,
            size_bytes=file.size_bytes,
            last_modified=file.last_modified,
        )

    async def download(self, request: web.Request) -> web.StreamResponse:
        """Send a file of a checkpoint."""
        self._check(request)
        record = await self._checkpoints.get(request.match_info["checkpoint_id"])
        return _sent(
            request.match_info["name"], self._checkpoints.directory(record), await self._checkpoints.files(record)
        )

    async def download_archive(self, request: web.Request) -> web.StreamResponse:
        """Send a file of a debug archive."""
        self._check(request)
        directory = self._archives / request.match_info["deployment_id"]
        return _sent(request.match_info["name"], directory, await asyncio.to_thread(files_below, directory))

    def _check(self, request: web.Request) -> None:
        if (problem := self._signer.problem(request.url)) is not None:
            raise HttpError(403, "FORBIDDEN", problem)


def _sent(name: str, directory: Path, files: Sequence[StoredFile]) -> web.FileResponse:
    # Taken from the listing, so that no name can lead out of the directory, signed or not.
    if name not in {file.name for file in files}:
        raise not_found("file", name)
    return web.FileResponse(directory / name)


def _write_and_list(directory: Path, name: str, content: bytes) -> list[StoredFile]:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(content)
    return files_below(directory)

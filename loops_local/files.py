"""Checkpoint files: pages of signed URLs, and the bytes behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from aiohttp import web

from loops_async import types

from .checkpoints import Checkpoints, StoredFile
from .records import CheckpointRecord
from .signing import UrlSigner
from .web import HttpError, not_found, query_int

__all__ = ["FILES_ROOT", "Files"]

FILES_ROOT = "/files/"
_PAGE_SIZE = 1000


class Files:
    """Serves the files of checkpoints to whoever holds a signed URL, in parts where asked (``Range``)."""

    def __init__(self, checkpoints: Checkpoints, signer: UrlSigner) -> None:
        self._checkpoints = checkpoints
        self._signer = signer

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [web.get(FILES_ROOT + "{checkpoint_id}/{name:.+}", self.download)]

    async def page(self, record: CheckpointRecord, request: web.Request) -> types.CheckpointFilesResponse:
        """Return the page of files that the query asks for."""
        size = query_int(request, "page_size", _PAGE_SIZE, least=1)
        start = query_int(request, "page_token", 0, least=0)
        files = await self._checkpoints.files(record)
        end = start + size
        return types.CheckpointFilesResponse(
            presigned_urls=[self._show(record, file, request) for file in files[start:end]],
            next_page_token=end if end < len(files) else None,
            total_count=len(files),
        )

    def _show(self, record: CheckpointRecord, file: StoredFile, request: web.Request) -> types.CheckpointFile:
        url = request.url.origin().joinpath("files", record.id, *PurePosixPath(file.name).parts)
        return types.CheckpointFile(
            url=str(self._signer.sign(url)),
            relative_file_name=file.name,
            node_rank=0,
            size_bytes=file.size_bytes,
            last_modified=file.last_modified,
        )

    async def download(self, request: web.Request) -> web.StreamResponse:
        """Send a file."""
        if (problem := self._signer.problem(request.url)) is not None:
            raise HttpError(403, "FORBIDDEN", problem)
        record = await self._checkpoints.get(request.match_info["checkpoint_id"])
        # Taken from the listing, so that no name can lead out of the directory, signed or not.
        names = {file.name for file in await self._checkpoints.files(record)}
        if (name := request.match_info["name"]) not in names:
            raise not_found("file", name)
        return web.FileResponse(self._checkpoints.directory(record) / name)

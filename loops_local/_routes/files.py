"""Files: pages of signed URLs, and the bytes behind these URLs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Final

from aiohttp import web
from msgspec import Meta

from loops_async import types

from .._errors import HttpError, not_found
from .._http.openapi import FILE, described
from .._http.parsing import query_int
from .._http.paths import ARCHIVES, FILES
from .._http.signing import UrlSigner
from .._storage.checkpoints import Checkpoints, StoredFile, list_files
from .._storage.private import make_tree_private
from .._storage.records import CheckpointRecord

__all__ = ["PAGE_QUERY", "FileRoutes"]

_PAGE_SIZE = 1000
PAGE_QUERY: Final = {"page_size": Annotated[int, Meta(ge=1)], "page_token": Annotated[int, Meta(ge=0)]}
_SIGNATURE: Final = {"expires": str, "signature": str}


class FileRoutes:
    """The handlers of signed URLs. They send a file whole, or in the ranges that the request asks for."""

    def __init__(self, checkpoints: Checkpoints, signer: UrlSigner, archives: Path) -> None:
        self._checkpoints = checkpoints
        self._signer = signer
        self._archives = archives

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [
            web.get(f"{FILES}/{{checkpoint_id}}/{{name:.+}}", self.download),
            web.get(f"{ARCHIVES}/{{deployment_id}}/{{name}}", self.download_archive),
        ]

    async def page(self, record: CheckpointRecord, request: web.Request) -> types.CheckpointFilesResponse:
        """Return the page of a checkpoint's files that the query asks for."""
        size = query_int(request, "page_size", _PAGE_SIZE, minimum=1)
        start = query_int(request, "page_token", 0, minimum=0)
        files = await self._checkpoints.files(record)
        end = start + size
        return types.CheckpointFilesResponse(
            presigned_urls=[self._signed(file, request, FILES, record.id) for file in files[start:end]],
            next_page_token=end if end < len(files) else None,
            total_count=len(files),
        )

    async def write_archive(
        self, deployment_id: str, name: str, content: bytes, request: web.Request
    ) -> list[types.CheckpointFile]:
        """Write a file of a deployment's debug archive; return all files of the archive."""
        directory = self._archives / deployment_id
        files = await asyncio.to_thread(_write_and_list, directory, name, content)
        return [self._signed(file, request, ARCHIVES, deployment_id) for file in files]

    def _signed(self, file: StoredFile, request: web.Request, root: str, owner: str) -> types.CheckpointFile:
        # With the address that the caller used, so that the URL works through a forwarded port.
        url = request.url.origin().joinpath(root.strip("/"), owner, *PurePosixPath(file.name).parts)
        return types.CheckpointFile(
            url=str(self._signer.sign(url)),
            relative_file_name=file.name,
            node_rank=0,
            size_bytes=file.size_bytes,
            last_modified=file.last_modified,
        )

    @described("Download a file of a checkpoint", FILE, query=_SIGNATURE)
    async def download(self, request: web.Request) -> web.StreamResponse:
        """Send a file of a checkpoint."""
        self._check_signature(request)
        record = await self._checkpoints.get(request.match_info["checkpoint_id"])
        files = await self._checkpoints.files(record)
        return _file_response(request.match_info["name"], self._checkpoints.directory(record), files)

    @described("Download a file of a debug archive", FILE, query=_SIGNATURE)
    async def download_archive(self, request: web.Request) -> web.StreamResponse:
        """Send a file of a debug archive."""
        self._check_signature(request)
        directory = self._archives / request.match_info["deployment_id"]
        files = await asyncio.to_thread(list_files, directory)
        return _file_response(request.match_info["name"], directory, files)

    def _check_signature(self, request: web.Request) -> None:
        if (problem := self._signer.problem(request.url)) is not None:
            raise HttpError(403, "FORBIDDEN", problem)


def _file_response(name: str, directory: Path, files: Sequence[StoredFile]) -> web.FileResponse:
    # Only names of the listing, so that none leads out of the directory, signed or not.
    if name not in {file.name for file in files}:
        raise not_found("file", name)
    return web.FileResponse(directory / name)


def _write_and_list(directory: Path, name: str, content: bytes) -> list[StoredFile]:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(content)
    make_tree_private(directory)
    return list_files(directory)

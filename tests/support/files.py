"""A file store behind the scripted service: listings in pages, signed URLs, ranges, and a count of the bytes sent."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.support.scripted import ScriptedService

BLOCK = 4096
FILES = "/v1/loops/checkpoints/c1/files"
SIGNED = "X-Signature=5ecret5ignature"


def entry(url: str, name: str, size: int, rank: int = 0) -> dict[str, Any]:
    """Return a file as a listing has it."""
    return {
        "url": url,
        "relative_file_name": name,
        "node_rank": rank,
        "size_bytes": size,
        "last_modified": "2026-06-24T18:20:39.854321Z",
    }


def page(files: list[dict[str, Any]], next_page: int | None = None) -> dict[str, Any]:
    """Return a page of a listing."""
    return {"presigned_urls": files, "next_page_token": next_page, "total_count": len(files)}


def found_in(directory: Path) -> dict[str, bytes]:
    """Return the content of every file below a directory."""
    found = {}
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # moved meanwhile
            if path.is_file():
                found[path.relative_to(directory).as_posix()] = path.read_bytes()
    return found


class FileStore:
    """The files of checkpoints.

    Attributes:
        sent: how many bytes of each file were sent.
        limit: how many bytes are sent before the store waits for `go`; `waiting` is set when it does.
        listings: how many listings were begun; each has signatures of its own.
        expired: the listings whose URLs are refused with status `refusal`.
    """

    def __init__(self, service: ScriptedService) -> None:
        self.service = service
        self.sent: Counter[str] = Counter()
        self.limit: float = math.inf
        self.go = asyncio.Event()
        self.waiting = asyncio.Event()
        self.listings = 0
        self.expired: set[int] = set()
        self.refusal = 403

    def holds(
        self,
        files: Mapping[str, bytes],
        *,
        checkpoint: str = "c1",
        headers: Mapping[str, str] | None = None,
        **changes: Any,
    ) -> None:
        """List these files from now on with `changes` to each entry, and serve them with `headers`."""
        entries = []
        for number, (name, content) in enumerate(files.items()):
            path = f"/store/{checkpoint}/{number}"
            self.service.always("GET", path, partial(self._serve, name, content, headers or {}))
            entries.append(entry(f"{self.service.url}{path}", name, len(content)) | changes)
        self.service.always("GET", f"/v1/loops/checkpoints/{checkpoint}/files", partial(self._list, entries))

    def asked(self, number: int = 0, checkpoint: str = "c1") -> int:
        """Return how often a file was asked for."""
        return len(self.service.seen_at("GET", f"/store/{checkpoint}/{number}"))

    async def _list(self, entries: list[dict[str, Any]], request: web.BaseRequest) -> web.StreamResponse:
        start, size = int(request.query["page_token"]), int(request.query["page_size"])
        self.listings += start == 0
        signed = [one | {"url": f"{one['url']}?{SIGNED}&listing={self.listings}"} for one in entries]
        end = start + size
        following = end if end < len(entries) else None
        return web.json_response(page(signed[start:end], following) | {"total_count": len(entries)})

    async def _serve(
        self, name: str, content: bytes, headers: Mapping[str, str], request: web.BaseRequest
    ) -> web.StreamResponse:
        if int(request.query.get("listing", 0)) in self.expired:
            return web.Response(status=self.refusal, text="<Error>expired</Error>")
        wanted = request.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        said = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if wanted else {}
        response = web.StreamResponse(status=206 if wanted else 200, headers={**said, **headers})
        response.content_length = len(content) - start
        await response.prepare(request)
        for at in range(start, len(content), BLOCK):
            if self.sent.total() >= self.limit:
                self.waiting.set()
                await self.go.wait()
            block = content[at : at + BLOCK]
            self.sent[name] += len(block)
            with suppress(ConnectionError):  # the client was killed
                await response.write(block)
        return response

"""A file store behind the stub: signed URLs, ranges, and an account of every byte it sent."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from aiohttp import web

from tests.control_plane.stub import Stub

BLOCK = 4096


class FileStore:
    """Serves the files of checkpoint ``c1``; `limit` is how many bytes it sends before it waits for `go`."""

    def __init__(self, stub: Stub, files: Mapping[str, bytes], *, headers: Mapping[str, str] | None = None) -> None:
        self.files = files
        self.sent: Counter[str] = Counter()
        self.total = sum(map(len, files.values()))
        self.limit: float = math.inf
        self.go = asyncio.Event()
        self.waiting = asyncio.Event()
        self.expired: set[int] = set()
        self.listings = 0
        self._stub = stub
        self._headers = headers or {}
        stub.call("GET /v1/loops/checkpoints/c1/files", self._list)
        for number in range(len(files)):
            stub.call(f"GET /store/{number}", self._serve)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        start, size = int(request.query["page_token"]), int(request.query["page_size"])
        if start == 0:
            self.listings += 1
        entries = [
            {
                "url": f"{self._stub.url}/store/{number}?signature={self.listings}",
                "relative_file_name": name,
                "node_rank": 0,
                "size_bytes": len(content),
                "last_modified": "2026-06-24T18:20:39.854321Z",
            }
            for number, (name, content) in enumerate(self.files.items())
        ]
        end = start + size
        page: dict[str, Any] = {"presigned_urls": entries[start:end], "total_count": len(entries)}
        return web.json_response(page | {"next_page_token": end if end < len(entries) else None})

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        assert "Authorization" not in request.headers
        if int(request.query["signature"]) in self.expired:
            return web.Response(status=403, text="<Error>expired</Error>")
        name, content = list(self.files.items())[int(request.path.rsplit("/", 1)[1])]
        wanted = request.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        said = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if wanted else {}
        response = web.StreamResponse(status=206 if wanted else 200, headers={**said, **self._headers})
        response.content_length = len(content) - start
        await response.prepare(request)
        for at in range(start, len(content), BLOCK):
            if self.sent.total() >= self.limit:
                self.waiting.set()
                await self.go.wait()
            block = content[at : at + BLOCK]
            self.sent[name] += len(block)
            with suppress(ConnectionError):  # whoever asked was killed
                await response.write(block)
        return response

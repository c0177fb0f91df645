"""One request on its way through the proxy."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
from aiohttp import web
from yarl import URL

__all__ = ["HttpExchange", "reset"]

_PIECE: Final = 64 * 1024
_JSON: Final = "application/json"

# Headers that are about one connection, or that aiohttp writes itself.
_OF_REQUEST: Final = ("Host", "Connection", "Keep-Alive", "Transfer-Encoding", "Content-Length", "Accept-Encoding")
_OF_RESPONSE: Final = ("Connection", "Keep-Alive", "Transfer-Encoding", "Content-Length", "Date", "Server")


class HttpExchange:
    """A request, and the two ends of its way: the caller's connection, and the service."""

    def __init__(
        self,
        request: web.BaseRequest,
        body: bytes,
        *,
        session: aiohttp.ClientSession,
        to: str,
        own_url: str,
        refuse: Callable[[float], None],
    ) -> None:
        self._request = request
        self._body = body
        self._session = session
        self._to = to
        self._own_url = own_url
        self._refuse = refuse

    async def execute(self) -> web.Response:
        """Let the service execute the request; return its answer, which is not passed on by that."""
        async with self._sent() as answer:
            return web.Response(status=answer.status, headers=_kept(answer), body=await self._rewritten(answer))

    async def pass_on(self, *, share: float = 1.0) -> web.StreamResponse:
        """Let the service execute the request and pass its answer on; break off after `share` of the body."""
        async with self._sent() as answer:
            response = web.StreamResponse(status=answer.status, headers=_kept(answer))
            pieces: AsyncIterator[bytes] = answer.content.iter_chunked(_PIECE)
            response.content_length = answer.content_length
            if answer.content_type == _JSON:
                whole = await self._rewritten(answer)
                pieces, response.content_length = _one(whole), len(whole)
            await response.prepare(self._request)
            left = sys.maxsize if share == 1 else int((response.content_length or 1) * share)
            async for piece in pieces:
                await response.write(piece[:left])
                left = max(0, left - len(piece))
            if share < 1 and self._request.transport is not None:
                self._request.transport.close()  # not reset: what was sent before a reset may not arrive
            return response

    def reset(self) -> web.StreamResponse:
        """Reset the connection."""
        reset(self._request.transport)
        return web.Response()

    def refuse(self, seconds: float) -> web.StreamResponse:
        """Reset every connection, and refuse new ones for `seconds`."""
        self._refuse(seconds)
        return self.reset()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    async def _rewritten(self, answer: aiohttp.ClientResponse) -> bytes:
        """Return the body; in JSON, the URLs of trainers, samplers and files lead through the proxy, too."""
        body = await answer.read()
        return body.replace(self._to.encode(), self._own_url.encode()) if answer.content_type == _JSON else body

    @asynccontextmanager
    async def _sent(self) -> AsyncGenerator[aiohttp.ClientResponse]:
        headers = self._request.headers.copy()
        for name in _OF_REQUEST:
            headers.popall(name, None)
        headers["Accept-Encoding"] = "identity"
        async with self._session.request(
            self._request.method,
            URL(self._to + self._request.raw_path, encoded=True),
            data=self._body or None,
            headers=headers,
            skip_auto_headers=("User-Agent", "Content-Type", "Accept"),
            allow_redirects=False,
        ) as answer:
            yield answer


def reset(transport: asyncio.BaseTransport | None) -> None:
    """Reset a connection, so that the other side reads an error and not an end."""
    if not isinstance(transport, asyncio.WriteTransport):
        return
    connection = transport.get_extra_info("socket")
    if connection is not None and not transport.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _kept(answer: aiohttp.ClientResponse) -> Mapping[str, str]:
    """Return the headers that are passed on."""
    headers = answer.headers.copy()
    for name in _OF_RESPONSE:
        headers.popall(name, None)
    return headers


async def _one(whole: bytes) -> AsyncGenerator[bytes]:
    yield whole

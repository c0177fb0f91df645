"""Connections that send no request: each holds a file descriptor, of which a process has a limited number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

__all__ = ["Connections"]

_GRACE_SECONDS: Final = 1.0


class Connections:
    """Closes each connection whose first request has not arrived, up to its body, within `seconds`.

    Later requests need no limit of ours: aiohttp closes idle connections.
    """

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._waiting: dict[object, asyncio.TimerHandle] = {}

    def protocol_factory(self, server: web.Server) -> Callable[[], web.RequestHandler]:
        """Return the function that makes the protocol of a new connection."""

        def make() -> web.RequestHandler:
            protocol = server()
            self._call_later(self._seconds, self._expire, protocol)
            return protocol

        return make

    def middleware(self) -> Middleware:
        """Return the middleware that notices requests."""

        @web.middleware
        async def notice(request: web.Request, handler: Handler) -> web.StreamResponse:
            if (timer := self._waiting.pop(request.protocol, None)) is not None:
                timer.cancel()
            return await handler(request)

        return notice

    def _expire(self, protocol: web.RequestHandler) -> None:
        # If the event loop was busy, the request has arrived, but its handler runs after this.
        self._call_later(_GRACE_SECONDS, self._close, protocol)

    def _close(self, protocol: web.RequestHandler) -> None:
        del self._waiting[protocol]
        protocol.force_close()

    def _call_later(
        self, seconds: float, call: Callable[[web.RequestHandler], None], protocol: web.RequestHandler
    ) -> None:
        self._waiting[protocol] = asyncio.get_running_loop().call_later(seconds, call, protocol)

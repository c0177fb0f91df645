"""Faults on demand, for tests of clients: wrong answers, lost answers, broken connections, delays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from aiohttp import web

from .web import json_answer

__all__ = ["Faults"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Fault = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]


class Faults:
    """Each fault hits the next `times` requests whose ``"METHOD /path"`` fits a pattern such as ``"POST */sample"``.

    Planning one returns the list of the requests that it hits, which grows as they come.

    Example:
        >>> from loops_local.faults import Faults
        >>> faults = Faults()
        >>> faults.answer("GET */operations/*", 502, times=2)
        []
    """

    def __init__(self) -> None:
        self._planned: list[tuple[str, list[Fault]]] = []

    def watch(self, route: str, *, times: int = 1) -> list[web.Request]:
        """Change nothing, for a test that wants to see what it sent."""

        async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await handler(request)

        return self._plan(route, fault, times)

    def answer(
        self, route: str, status: int, body: Any = None, *, headers: Mapping[str, str] | None = None, times: int = 1
    ) -> list[web.Request]:
        """Answer with `status` and `body` as JSON; the service does not see the request."""

        async def fault(_request: web.Request, _handler: Handler) -> web.StreamResponse:
            return json_answer({} if body is None else body, status=status, headers=headers)

        return self._plan(route, fault, times)

    def drop(self, route: str, *, times: int = 1) -> list[web.Request]:
        """Break the connection; the service does not see the request."""

        async def fault(request: web.Request, _handler: Handler) -> web.StreamResponse:
            return _broken(request)

        return self._plan(route, fault, times)

    def lose_answer(self, route: str, *, times: int = 1) -> list[web.Request]:
        """Let the service do what it is asked, then break the connection instead of answering."""

        async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
            await handler(request)
            return _broken(request)

        return self._plan(route, fault, times)

    def delay(self, route: str, seconds: float, *, times: int = 1) -> list[web.Request]:
        """Wait before the request is handled."""

        async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
            await asyncio.sleep(seconds)
            return await handler(request)

        return self._plan(route, fault, times)

    def clear(self) -> None:
        """Forget the faults that have not happened."""
        self._planned.clear()

    def next_for(self, request: web.Request) -> Fault | None:
        """Take the fault that is planned for `request`, if any."""
        for pattern, faults in self._planned:
            if faults and fnmatchcase(f"{request.method} {request.path}", pattern):
                return faults.pop()
        return None

    def _plan(self, route: str, fault: Fault, times: int) -> list[web.Request]:
        hits: list[web.Request] = []

        async def noted(request: web.Request, handler: Handler) -> web.StreamResponse:
            hits.append(request)
            return await fault(request, handler)

        self._planned.append((route, [noted] * times))
        return hits


def _broken(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()

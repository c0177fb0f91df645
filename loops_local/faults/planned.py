"""Faults on demand, for tests of clients: wrong responses, lost responses, broken connections, delays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

__all__ = ["Faults", "PlannedFault"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Fault = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]


class PlannedFault(Struct, frozen=True, kw_only=True):
    """A fault that will happen to the next `times` requests of a route; `what` says in words what it is."""

    route: str
    what: str
    times: int


class _Planned(Struct):
    route: str
    what: str
    fault: Fault
    times: int


class Faults:
    """Each fault affects the next `times` requests whose ``"METHOD /path"`` matches a pattern like ``"POST */sample"``.

    Each method plans one fault. It returns the list of the affected requests, which grows as they arrive.

    Example:
        >>> from loops_local.faults import Faults
        >>> faults = Faults()
        >>> faults.answer("GET */operations/*", 502, times=2)
        []
    """

    def __init__(self) -> None:
        self._planned: list[_Planned] = []

    def watch(self, route: str, *, times: int = 1) -> list[web.Request]:
        """Change nothing: for a test that reads the requests it sent."""

        async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await handler(request)

        return self._plan(route, fault, times, "watched")

    def answer(
        self, route: str, status: int, body: Any = None, *, headers: Mapping[str, str] | None = None, times: int = 1
    ) -> list[web.Request]:
        """Respond with `status` and `body` as JSON; the service does not see the request."""
        encoded = msgspec.json.encode({} if body is None else body)

        async def fault(_request: web.Request, _handler: Handler) -> web.StreamResponse:
            return web.Response(body=encoded, status=status, headers=headers, content_type="application/json")

        return self._plan(route, fault, times, f"answer {status}")

    def drop(self, route: str, *, times: int = 1) -> list[web.Request]:
        """Break the connection; the service does not see the request."""

        async def fault(request: web.Request, _handler: Handler) -> web.StreamResponse:
            return _break_connection(request)

        return self._plan(route, fault, times, "connection broken")

    def lose_answer(self, route: str, *, times: int = 1) -> list[web.Request]:
        """Let the service execute the request, then break the connection instead of responding."""

        async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
            await handler(request)
            return _break_connection(request)

        return self._plan(route, fault, times, "answer lost")

    def delay(self, route: str, seconds: float, *, times: int = 1) -> list[web.Request]:
        """Wait before the request is executed."""

        async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
            await asyncio.sleep(seconds)
            return await handler(request)

        return self._plan(route, fault, times, f"delay {seconds:g} s")

    @property
    def in_force(self) -> list[PlannedFault]:
        """The faults that will still happen, in the order in which they were planned."""
        return [
            PlannedFault(route=each.route, what=each.what, times=each.times) for each in self._planned if each.times
        ]

    def clear(self) -> None:
        """Remove the faults that have not happened yet."""
        self._planned.clear()

    def next_for(self, request: web.Request) -> Fault | None:
        """Return the fault that is planned for `request`, if any, and count it as used."""
        for planned in self._planned:
            if planned.times and fnmatchcase(f"{request.method} {request.path}", planned.route):
                planned.times -= 1
                return planned.fault
        return None

    def _plan(self, route: str, fault: Fault, times: int, what: str = "held") -> list[web.Request]:
        affected: list[web.Request] = []

        async def recorded(request: web.Request, handler: Handler) -> web.StreamResponse:
            affected.append(request)
            return await fault(request, handler)

        self._planned.append(_Planned(route, what, recorded, max(0, times)))
        return affected


def _break_connection(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()

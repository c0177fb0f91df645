"""A program that is killed at a certain request, as its journal and the service see it: without a process of its own.

When the request arrives, the journal is copied as it is on disk. It is put back when the client has been closed, so
that what the client wrote at its end is gone. The service keeps what it did.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from loops_async import ServiceClient
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.work import eventually

Program = Callable[[ServiceClient], Awaitable[Any]]

FILES = ("", "-wal")


class Restartable:
    """A program with a journal."""

    def __init__(self, colour: Colour, local: LocalService, path: Path, program: Program, **options: Any) -> None:
        self._colour = colour
        self._local = local
        self._path = path
        self._program = program
        self._options = options

    async def run(self) -> Any:
        """Run it to its end, and return its result."""
        client = self._colour.connected(
            base_url=self._local.base_url,
            api_key=self._local.api_key,
            on_exit="leave",
            journal=self._path,
            **self._options,
        )
        async with client as service:
            return await self._program(service)

    async def kill_at(self, route: str, number: int = 1, *, is_executed: bool) -> None:
        """Run it until the service has the request of this number of a route, or has executed it, and kill it there."""
        copy = self._path.with_name("copy")
        count, is_killed = 0, False

        async def fault(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            nonlocal count, is_killed
            count += 1
            if count < number:
                return await handler(request)
            if is_executed:
                await handler(request)
            for each in FILES:
                shutil.copy(f"{self._path}{each}", f"{copy}{each}")
            is_killed = True
            self._local.faults.clear()
            # Nothing more arrives: least of all what a client that is closed cleans up.
            self._local.faults.answer("POST */deactivate", 403, times=1000)
            self._local.faults.drop("*", times=1000)
            return _dropped(request)

        self._local.faults._plan(route, fault, times=number)
        client = self._colour.connected(
            base_url=self._local.base_url,
            api_key=self._local.api_key,
            on_exit="leave",
            journal=self._path,
            **self._options,
        )
        running: asyncio.Future[Any] | None = None
        try:
            async with client as service:
                running = asyncio.ensure_future(self._program(service))
                await eventually(lambda: is_killed)
        finally:
            if running is not None:
                await asyncio.gather(running, return_exceptions=True)
            self._local.faults.clear()
        for each in FILES:
            shutil.move(f"{copy}{each}", f"{self._path}{each}")


def _dropped(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()

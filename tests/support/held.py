"""Requests that the embedded service keeps waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

from aiohttp import web

from loops_local.faults import Faults


class Held:
    """The next request of a route: `arrived` has it as soon as it is there, and it is executed after `let_go`."""

    def __init__(self, faults: Faults, route: str) -> None:
        self._go = threading.Event()  # the service has a thread of its own
        self.arrived = faults._plan(route, self._wait, times=1)

    def let_go(self) -> None:
        self._go.set()

    async def _wait(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        while not self._go.is_set():  # noqa: ASYNC110 - the event is of another thread
            await asyncio.sleep(0.005)
        return await handler(request)

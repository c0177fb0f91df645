"""What all clients of one service share: the pool, the background tasks, the heartbeat and the control plane."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from .._http.settings import Settings, resolve_settings
from .._http.transport import Transport
from .._tasks import TaskOwner, run_to_completion
from ..control_plane import ControlPlane
from .heartbeat import Heartbeat


class Runtime:
    """Made when a service client opens, gone when it closes; lives in one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings: Settings = settings
        self.transport: Transport = Transport(settings)
        self.tasks: TaskOwner = TaskOwner()
        self.heartbeat: Heartbeat = Heartbeat(self.tasks)
        self.control_plane: ControlPlane = ControlPlane(self.transport, settings.base_url)
        self.admission: asyncio.Semaphore = asyncio.Semaphore(settings.max_connections)
        self.shared: dict[Any, Any] = {}
        """What clients of the same deployment or model share, by key: readiness gates and tokenizers."""

    async def close(self) -> None:
        """End every task, then every connection, even while the caller is being cancelled."""
        await run_to_completion(self._close())

    async def _close(self) -> None:
        await self.tasks.close()
        await self.transport.close()


_Held: TypeAlias = tuple[Runtime, AsyncIterator[Runtime]]
"""A runtime, and the generator that holds it open."""

_detached: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str | None], _Held]] = WeakKeyDictionary()
"""By loop, and by service and authorization: a key that is set later counts."""


async def detached_runtime(base_url: str) -> Runtime:
    """Return this event loop's runtime for values that were unpickled and have no service client.

    It belongs to the loop: an asynchronous generator holds it open, and the loop ends such generators when it
    shuts down (`asyncio.run` and `anyio.run` do), which closes the connections.
    """
    settings = resolve_settings(base_url=base_url)
    runtimes = _detached.setdefault(asyncio.get_running_loop(), {})
    key = base_url, settings.authorization.get("Authorization")
    if key not in runtimes:
        holder = _hold(settings)
        runtimes[key] = (await anext(holder), holder)
    return runtimes[key][0]


async def _hold(settings: Settings) -> AsyncIterator[Runtime]:
    runtime = Runtime(settings)
    try:
        yield runtime
    finally:
        await runtime.close()
        # The loop is ending. Its runtimes refer to it, so they would keep it.
        _detached.pop(asyncio.get_running_loop(), None)

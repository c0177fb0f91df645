"""Clients that are never closed: their connections are closed for them, and a warning names them."""

from __future__ import annotations

import asyncio
import logging
import warnings
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Final

log = logging.getLogger("loops_async.provisioning")


class UnclosedGuard:
    """Calls `close` and warns when `owner` is collected, or when the event loop shuts down, before `disarm`.

    `close` must not refer to `owner`, which it would keep alive. `client` names it in the warning.
    """

    def __init__(self, owner: object, client: str, close: Callable[[], Awaitable[None]]) -> None:
        self._state = _State(client, close)
        # A loop that shuts down (`asyncio.run`, `anyio.run`) closes asynchronous generators, and awaits that.
        self._generator = _closing_at_shutdown(self._state)
        with suppress(StopIteration):
            self._generator.__anext__().__await__().__next__()  # to its `yield`, before which it does not wait
        _armed[self._state] = self._generator
        self._collected = weakref.finalize(owner, _close_soon, asyncio.get_running_loop(), self._generator)
        self._collected.atexit = False

    async def disarm(self) -> None:
        """Do nothing when the owner is collected."""
        self._state.is_armed = False
        self._collected.detach()
        with suppress(RuntimeError):  # it is running: the loop is shutting down
            await self._generator.aclose()


class _State:
    def __init__(self, client: str, close: Callable[[], Awaitable[None]]) -> None:
        self.client = client
        self.close = close
        self.is_armed = True


_armed: Final[dict[_State, AsyncGenerator[None, None]]] = {}
"""Generators that have not ended; the loop only has weak references to them."""


async def _closing_at_shutdown(state: _State) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        _armed.pop(state, None)
        if state.is_armed:
            await state.close()
            problem = f"{state.client} was not closed: use it in a with block, or call its close()"
            log.warning("%s", problem)
            warnings.warn(problem, ResourceWarning, stacklevel=1)


def _close_soon(loop: asyncio.AbstractEventLoop, generator: AsyncGenerator[None, None]) -> None:
    """End a generator in its loop; called in whatever thread collects the owner."""

    async def end() -> None:  # if it is cancelled before it starts, the generator is still there at the shutdown
        await generator.aclose()

    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(lambda: loop.create_task(end(), name="loops_async: close an unclosed client"))

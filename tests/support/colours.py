"""Lets one test body drive both colours: `loops_sync` behind the interface of `loops_async`.

The core's own definitions say what is a coroutine; each of these becomes a call of the blocking twin in a worker
thread, so a name, an argument or a result that the twin has otherwise shows as a failing test.
"""

from __future__ import annotations

import asyncio
import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from operator import attrgetter
from types import ModuleType
from typing import Any

import loops_async
import loops_sync
from loops_sync._bridge import Items


class Colour(ABC):
    """One of the two clients. What it makes is typed as the core's, which is what test bodies are written for."""

    module: ModuleType

    @abstractmethod
    def connected(self, *args: Any, **options: Any) -> AbstractAsyncContextManager[loops_async.ServiceClient]:
        """Return a service client that opens on entry and closes on exit."""

    @abstractmethod
    def connected_locally(self, **urls: str) -> AbstractAsyncContextManager[loops_async.ServiceClient]:
        """Do the same in local mode."""

    @abstractmethod
    def function(self, name: str) -> Callable[..., Awaitable[Any]]:
        """Return a function of the colour that belongs to no object, by its name in the package."""

    def own(self, value: Any) -> Any:
        """Return the colour's own object, for what is not a call: pickling, `repr`."""
        return value

    def adopt(self, value: Any) -> Any:
        """Return an object of the colour as test bodies see it."""
        return value


class Async(Colour):
    """`loops_async` as it is."""

    module = loops_async

    def connected(self, *args: Any, **options: Any) -> AbstractAsyncContextManager[loops_async.ServiceClient]:
        return loops_async.ServiceClient(*args, **options)

    def connected_locally(self, **urls: str) -> AbstractAsyncContextManager[loops_async.ServiceClient]:
        return loops_async.ServiceClient.local(**urls)

    def function(self, name: str) -> Callable[..., Awaitable[Any]]:
        function: Callable[..., Awaitable[Any]] = attrgetter(name)(loops_async)
        return function


class Blocking(Colour):
    """`loops_sync`, each of its calls in a thread of `threads`."""

    module = loops_sync

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads

    def connected(self, *args: Any, **options: Any) -> AbstractAsyncContextManager[loops_async.ServiceClient]:
        return _Entered(self, lambda: loops_sync.ServiceClient(*args, **options))

    def connected_locally(self, **urls: str) -> AbstractAsyncContextManager[loops_async.ServiceClient]:
        return _Entered(self, lambda: loops_sync.ServiceClient.local(**urls))

    def function(self, name: str) -> Callable[..., Awaitable[Any]]:
        return partial(self.call, attrgetter(name)(loops_sync))

    def own(self, value: Any) -> Any:
        return value.facade if isinstance(value, _Awaited) else value

    def adopt(self, value: Any) -> Any:
        if isinstance(value, Items):
            return self._items(value)
        return _Awaited(self, value) if type(value).__module__.startswith("loops_sync") else value

    async def _items(self, items: Items[Any]) -> AsyncGenerator[Any]:
        """Iterate over a blocking iterator, each step in a thread."""
        over = object()
        try:
            while (item := await self.call(next, items, over)) is not over:
                yield item
        finally:
            await self.call(items.close)

    async def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a blocking function in a thread."""
        args = tuple(map(self.own, args))
        loop = asyncio.get_running_loop()
        return self.adopt(await loop.run_in_executor(self._threads, lambda: function(*args, **options)))


class _Entered(AbstractAsyncContextManager[Any, Any]):
    """A blocking client that is made, and so opened, on entry."""

    def __init__(self, colour: Blocking, make: Callable[[], Any]) -> None:
        self._colour = colour
        self._make = make

    async def __aenter__(self) -> Any:
        self._client = await self._colour.call(self._make)
        return await self._client.__aenter__()

    async def __aexit__(self, *outcome: Any) -> Any:
        return await self._client.__aexit__(*outcome)


class _Awaited:
    """An object of `loops_sync`; what is a coroutine in the core is one here."""

    def __init__(self, colour: Blocking, facade: Any) -> None:
        self._colour = colour
        self.facade = facade
        self._core = getattr(loops_async, type(facade).__name__)

    def __getattr__(self, name: str) -> Any:
        is_coroutine = inspect.iscoroutinefunction(getattr(self._core, name))
        if isinstance(getattr(type(self.facade), name), property):
            # Some properties of the blocking client ask the service; these are coroutine methods of the core.
            ask: Callable[[], Any] = partial(getattr, self.facade, name)
            return (lambda: self._colour.call(ask)) if is_coroutine else self._colour.adopt(ask())
        method = getattr(self.facade, name)
        if is_coroutine:
            return lambda *args, **options: self._colour.call(method, *args, **options)
        return lambda *args, **options: self._colour.adopt(method(*args, **options))

    def __await__(self) -> Generator[Any, Any, Any]:
        result: Generator[Any, Any, Any] = self._colour.call(self.facade.result).__await__()
        return result

    async def __aenter__(self) -> Any:
        await self._colour.call(self.facade.__enter__)
        return self

    async def __aexit__(self, *outcome: Any) -> Any:
        return await self._colour.call(self.facade.__exit__, *outcome)

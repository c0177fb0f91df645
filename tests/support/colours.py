"""Lets one test body drive both colours: `loops_sync` behind the interface of `loops_async`.

The core's own definitions say what is a coroutine; each of these becomes a call of the blocking twin in a worker
thread, so a name, an argument or a result that the twin has otherwise shows as a failing test. In turn, a coroutine
function of a test, e.g. a rollout, becomes a plain function for the twin, which makes its calls in its own thread.
"""

from __future__ import annotations

import asyncio
import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Generator, Iterator
from concurrent.futures import Executor, Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import copy_context
from functools import partial
from operator import attrgetter
from types import ModuleType
from typing import Any, Final

import loops_async
import loops_sync
from loops_sync._bridge import Items, current
from loops_sync._handle import Scope
from loops_sync._outcome import Outcome


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
    def gateway(
        self, sampler: loops_async.SamplingClient, **options: Any
    ) -> AbstractAsyncContextManager[loops_async.AgentGateway]:
        """Return a gateway that opens on entry and closes on exit."""

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

    def gateway(
        self, sampler: loops_async.SamplingClient, **options: Any
    ) -> AbstractAsyncContextManager[loops_async.AgentGateway]:
        return loops_async.AgentGateway(sampler, **options)

    def function(self, name: str) -> Callable[..., Awaitable[Any]]:
        function: Callable[..., Awaitable[Any]] = attrgetter(name)(loops_async)
        return function


class Blocking(Colour):
    """`loops_sync`, each of its calls in a thread of `threads`."""

    module = loops_sync

    def __init__(self, threads: Executor) -> None:
        self._threads = threads

    def connected(self, *args: Any, **options: Any) -> AbstractAsyncContextManager[loops_async.ServiceClient]:
        return _Entered(self, lambda: loops_sync.ServiceClient(*args, **options))

    def connected_locally(self, **urls: str) -> AbstractAsyncContextManager[loops_async.ServiceClient]:
        return _Entered(self, lambda: loops_sync.ServiceClient.local(**urls))

    def gateway(
        self, sampler: loops_async.SamplingClient, **options: Any
    ) -> AbstractAsyncContextManager[loops_async.AgentGateway]:
        return _Entered(self, lambda: loops_sync.AgentGateway(self.own(sampler), **options))

    def function(self, name: str) -> Callable[..., Awaitable[Any]]:
        return partial(self.call, attrgetter(name)(loops_sync))

    def own(self, value: Any) -> Any:
        if isinstance(value, _Awaited):
            return value.facade
        if inspect.iscoroutinefunction(value):
            return partial(_run_in_this_thread, asyncio._get_running_loop(), value)
        return _stepped(asyncio._get_running_loop(), value) if isinstance(value, AsyncIterable) else value

    def adopt(self, value: Any) -> Any:
        if isinstance(value, Items):
            return self._items(value)
        if isinstance(value, Scope):
            return self._scope(value)
        return _Awaited(self, value) if type(value).__module__.startswith("loops_sync") else value

    async def _items(self, items: Items[Any]) -> AsyncGenerator[Any]:
        """Iterate over a blocking iterator, each step in a thread."""
        try:
            while (item := await self.call(next, items, _OVER)) is not _OVER:
                yield item
        finally:
            await self.call(items.close)

    @asynccontextmanager
    async def _scope(self, scope: Scope[Any]) -> AsyncGenerator[Any]:
        """Enter and leave a blocking context, both in threads."""
        entered = await self.call(scope.__enter__)
        try:
            yield entered
        except BaseException as error:
            if not await self.call(scope.__exit__, type(error), error, error.__traceback__):
                raise
        else:
            await self.call(scope.__exit__, None, None, None)

    async def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a blocking function in a thread, with the context that the caller would have in its own."""
        call = self.bound(function, *args, **options)
        made = asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, call)
        return self.adopt(await made)

    def bound(self, function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
        """Return a call of a blocking function, with the colour's own form of all arguments."""
        return partial(function, *map(self.own, args), **{name: self.own(value) for name, value in options.items()})


class _Body(Outcome[Any]):
    """A coroutine of a test's, on the test's loop, and the calls of the client that it makes meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._calls: asyncio.Queue[Callable[[], object] | None] = asyncio.Queue()

    def run(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Make the calls in this thread until the coroutine ends; cancelling this thread's function cancels it."""
        self._loop.call_soon_threadsafe(self.start, function, *args)
        while True:
            try:
                call = current().run(self._calls.get)  # here it can be cancelled
            except asyncio.CancelledError:
                asyncio.run_coroutine_threadsafe(self._cancelled(), self._loop).result()
                continue
            if call is None:
                return self.get()
            call()

    async def _cancelled(self) -> None:
        """Cancel the coroutine, and let that reach a call that waits for this thread: it is not to be made."""
        self.cancel()
        for _ in range(3):
            await asyncio.sleep(0)

    def put(self, call: Callable[[], object] | None) -> None:
        current().post(partial(self._calls.put_nowait, call))

    def _notify(self) -> None:
        self.put(None)


class _ThreadOf(Executor):
    """Makes calls in the thread that runs a body."""

    def __init__(self, body: _Body) -> None:
        self._body = body

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._body.put(call)
        return future


def _run_in_this_thread(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *args: Any) -> Any:
    """Call a coroutine function of a test; see `_Body`."""
    body = _Body(loop)
    colour = Blocking(_ThreadOf(body))
    return body.run(function, *map(colour.adopt, args))


def _stepped(loop: asyncio.AbstractEventLoop, items: AsyncIterable[Any]) -> Iterator[Any]:
    """Iterate over an async iterable of a test, each step on the test's loop."""
    iterator, over = aiter(items), object()

    async def step() -> Any:
        return await anext(iterator, over)

    while (item := _run_in_this_thread(loop, step)) is not over:
        yield item


_OVER: Final = object()


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
        return lambda *args, **options: self._colour.adopt(self._colour.bound(method, *args, **options)())

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_colour", "facade", "_core"):
            super().__setattr__(name, value)
        else:
            setattr(self.facade, name, self._colour.own(value))

    def __await__(self) -> Generator[Any, Any, Any]:
        result: Generator[Any, Any, Any] = self._colour.call(self.facade.result).__await__()
        return result

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        item = await self._colour.call(next, self, _OVER)
        if item is _OVER:
            raise StopAsyncIteration
        return item

    async def __aenter__(self) -> Any:
        await self._colour.call(self.facade.__enter__)
        return self

    async def __aexit__(self, *outcome: Any) -> Any:
        return await self._colour.call(self.facade.__exit__, *outcome)

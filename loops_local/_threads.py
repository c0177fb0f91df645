"""Running an asynchronous context in a thread of its own, for blocking programs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

__all__ = ["entered_in_thread"]

T = TypeVar("T")


@contextmanager
def entered_in_thread(make: Callable[[], AbstractAsyncContextManager[T, Any]], *, name: str) -> Iterator[T]:
    """Enter what `make` returns in an event loop in a new thread, give its value, and leave it at the end."""
    started: Future[T] = Future()
    stop: Future[Callable[[], object]] = Future()

    async def serve() -> None:
        stopping = asyncio.Event()
        stop.set_result(partial(asyncio.get_running_loop().call_soon_threadsafe, stopping.set))
        async with make() as value:
            started.set_result(value)
            await stopping.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    try:
        yield started.result()
    finally:
        if thread.is_alive():
            # After a failed start, its loop may be closed already.
            with suppress(RuntimeError):
                stop.result()()
        thread.join()

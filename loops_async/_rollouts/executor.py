"""Where rollouts run code that would hold the event loop, e.g. graders."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Protocol, TypeVar

from .._work.waits import Waits
from ..errors import InputError

__all__ = ["Executor", "Workers"]

T = TypeVar("T")


class Executor(Protocol):
    """Runs functions elsewhere, e.g. a `ProcessExecutor`.

    `submit` must return soon: until then, no other rollout goes on.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Start ``fn(*args)``, and return a `concurrent.futures.Future` of its result."""
        ...


class Workers:
    """Runs functions in an executor of the user, or in worker threads of its own, which end when it closes."""

    def __init__(self, executor: Executor | None) -> None:
        if executor is not None and not callable(getattr(executor, "submit", None)):
            raise InputError("executor", f"must have a method `submit`; got {executor!r}")
        self._executor = executor
        self._threads: ThreadPoolExecutor | None = None
        self._calls: set[Future[Any]] = set()
        """Those in threads of our own that have not ended."""

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Return ``function(*args)``, or raise its error; a caller that is cancelled cancels the call if it can be."""
        if self._executor is None:
            return await asyncio.wrap_future(self._start_in_thread(function, *args))
        future = self._executor.submit(function, *args)
        if not isinstance(future, Future):
            raise InputError(
                "executor", f"its submit must return a concurrent.futures.Future; got {type(future).__name__}"
            )
        result: T = await asyncio.wrap_future(future)
        return result

    async def close(self) -> None:
        """Wait until the threads have ended: a thread cannot be stopped."""
        if self._threads is None:
            return
        self._threads.shutdown(wait=False, cancel_futures=True)
        waits = Waits()
        try:
            with waits.on("functions that ctx.run started in threads to return; only a ProcessExecutor can end them"):
                for call in list(self._calls):
                    await asyncio.wait([asyncio.wrap_future(call)])
        finally:
            waits.close()
        self._threads.shutdown()

    def _start_in_thread(self, function: Callable[..., T], *args: Any) -> Future[T]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(thread_name_prefix="loops-rollouts")
        call = self._threads.submit(copy_context().run, function, *args)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

"""Futures: any thread and any event loop may wait for them, any number of times."""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, Final, Generic, TypeVar

import loops_sync
from loops_sync._wakeups import wakeups

from .errors import translated

__all__ = ["APIFuture", "AwaitableConcurrentFuture", "failed", "in_thread", "started"]

T = TypeVar("T")
F = TypeVar("F", bound="AwaitableConcurrentFuture[Any]")

WAKE_SECONDS: Final = 0.5
"""How often a waiting thread wakes up; on Windows it notices Ctrl-C only then."""

log: logging.Logger = logging.getLogger("loops_tinker")


class APIFuture(ABC, Generic[T]):
    """The result of a call, which is on its way; `await` it or call `result`.

    Example:
        ::

            passed = trainer.forward_backward(data, "cross_entropy")
            stepped = trainer.optim_step(tinker.AdamParams(learning_rate=1e-4))
            print(passed.result().metrics, stepped.result(timeout=60).metrics)
    """

    @abstractmethod
    def result(self, timeout: float | None = None) -> T:
        """Wait for the result in this thread.

        Args:
            timeout: the longest time to wait, in seconds; the call itself has none.

        Raises:
            TimeoutError: this wait ended; the call continues.
            TinkerError: the call failed.
        """

    @abstractmethod
    async def result_async(self, timeout: float | None = None) -> T:
        """Wait for the result in a coroutine; as `result`."""

    @abstractmethod
    def future(self) -> Future[T]:
        """Return the future of `concurrent.futures`."""

    async def coroutine(self) -> T:
        """Wait for the result; for `asyncio.create_task`, which takes coroutines only."""
        return await self

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()


class AwaitableConcurrentFuture(Future[T], APIFuture[T]):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A future of `concurrent.futures` that can also be awaited, made of another such future.

    The error of the other becomes one of this package. With `ends_with_waiter`, the call ends when a task is cancelled
    that awaits it: for calls on which no other depends. With `converts_long`, the result is converted in a thread of
    its own, since the other calls would wait for it.
    """

    def __init__(
        self,
        source: Future[Any],
        convert: Callable[[Any], T] | None = None,
        *,
        ends_with_waiter: bool = False,
        converts_long: bool = False,
        call: loops_sync.CallFuture[Any] | None = None,
    ) -> None:
        super().__init__()
        self._source: Future[Any] | None = source
        self._convert = convert
        self._ends_with_waiter = ends_with_waiter
        self._converts_long = converts_long
        self._call = call
        source.add_done_callback(self._settle)

    def result(self, timeout: float | None = None) -> T:
        if not self.done():
            _warn_in_coroutine()
            self._wait(timeout)
        return super().result()

    async def result_async(self, timeout: float | None = None) -> T:
        # Not `asyncio.wrap_future`, which leaves a cycle of references to each result.
        if not self.done():
            here: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.add_done_callback(partial(_wake, here))
            try:
                await asyncio.wait_for(here, timeout)
            except asyncio.CancelledError:
                if self._ends_with_waiter:
                    self.cancel()
                raise
        try:
            return super().result()
        except CancelledError as cancelled:
            raise asyncio.CancelledError(*cancelled.args) from None

    def future(self) -> Future[T]:
        return self

    def cancel(self) -> bool:
        """Cancel the call, if it has not ended; of an operation that was sent, only the result is lost."""
        is_cancelled = super().cancel()
        source = self._source
        if is_cancelled and source is not None:
            source.cancel()
        return is_cancelled

    def _wait(self, timeout: float | None) -> None:
        call = self._call
        if call is not None:
            try:
                call.result(timeout)
            except Exception:
                # What the call raised is raised by `result`, as the error of this package that it has become.
                if not call.done():
                    raise
            return
        has_ended = threading.Event()
        self.add_done_callback(lambda _: has_ended.set())
        left = float("inf") if timeout is None else timeout
        while left > 0 and not has_ended.wait(min(left, WAKE_SECONDS)):
            left -= WAKE_SECONDS
        if not has_ended.is_set():
            raise TimeoutError(f"no result within {timeout} s; the call continues")

    def _settle(self, source: Future[Any]) -> None:
        if source.cancelled():
            super().cancel()
        if not self.set_running_or_notify_cancel():
            return
        if self._converts_long and _start_thread(partial(self._finish, source)):
            return
        self._finish(source)

    def _finish(self, source: Future[Any]) -> None:
        error = source.exception()
        try:
            if error is not None:
                raise translated(error)
            value = source.result()
            self.set_result(value if self._convert is None else self._convert(value))
        except BaseException as problem:
            self.set_exception(problem.with_traceback(None))
        finally:
            # They refer to this future; so does each to a result, which a cycle would keep until garbage is collected.
            self._source = self._call = None

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


def started(
    method: Callable[..., Any],
    /,
    *args: Any,
    convert: Callable[[Any], Any] | None = None,
    ends_with_waiter: bool = False,
    converts_long: bool = False,
    **kwargs: Any,
) -> AwaitableConcurrentFuture[Any]:
    """Call a method of an object of `loops_sync` without waiting; calls run in the order in which they are started."""
    call = loops_sync.start(method, *args, **kwargs)
    return AwaitableConcurrentFuture(
        call.future(), convert, ends_with_waiter=ends_with_waiter, converts_long=converts_long, call=call
    )


def in_thread(function: Callable[[], T]) -> AwaitableConcurrentFuture[T]:
    """Call a function that waits in a thread of its own, for calls that are few and need no order.

    The thread is a daemon, so that it does not keep the process from ending.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    outcome.set_running_or_notify_cancel()
    if not _start_thread(run):
        outcome.set_exception(RuntimeError("the interpreter is exiting"))
    return AwaitableConcurrentFuture(outcome)


def failed(error: Exception) -> AwaitableConcurrentFuture[Any]:
    """Return a future that raises `error`."""
    outcome: Future[Any] = Future()
    outcome.set_exception(error)
    return AwaitableConcurrentFuture(outcome)


def _wake(waiter: asyncio.Future[None], _: Future[Any]) -> None:
    wakeups.call_soon(waiter.get_loop(), partial(_end_wait, waiter))


def _end_wait(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _start_thread(function: Callable[[], None]) -> bool:
    """Call a function in a daemon thread; return False if the interpreter is exiting."""
    try:
        threading.Thread(target=function, name="loops_tinker", daemon=True).start()
    except RuntimeError:
        return False
    return True


def _warn_in_coroutine() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    log.warning("result() in a coroutine holds the event loop while it waits; `await` the future there")

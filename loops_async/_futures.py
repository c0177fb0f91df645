"""Calls that are started from any thread, and their futures, which any thread and any event loop can wait for."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from functools import partial
from inspect import iscoroutinefunction
from time import monotonic
from typing import Any, Final, Generic, ParamSpec, Protocol, TypeGuard, TypeVar, overload, runtime_checkable

from ._copies import SameWhenCopied
from ._operations.future import OperationFuture
from ._other_names import KnowsOtherNames
from ._waiting import TimeLimit
from .errors import CallTimeoutError, ClosedError, InputError, without_quote

__all__ = ["CallFuture", "start"]

P = ParamSpec("P")
T = TypeVar("T")

WAKE_SECONDS: Final = 0.5
"""How often the main thread wakes up while it waits; on Windows it notices Ctrl-C only then."""

CHECK_SECONDS: Final = 10.0
"""How often other threads and event loops, perhaps thousands, check that the loop of the call still exists."""

log = logging.getLogger("loops_async")

_running: Final[set[asyncio.Task[None]]] = set()
"""The started calls, which their callers may forget: an event loop alone does not keep its tasks in memory."""


class CallFuture(SameWhenCopied, KnowsOtherNames, Generic[T]):
    """The result of a call that was started without waiting; made by `start`.

    Threads, coroutines of any event loop and several `asyncio.run` in turn may wait for it, any number of times. One
    that stops waiting (time-out, cancellation, Ctrl-C) affects neither the others nor the call; `cancel` ends the call.

    Example:
        ::

            import asyncio

            def train():  # in a thread of its own
                step = loops.start(trainer.forward_backward, data, "cross_entropy")
                optim = loops.start(trainer.optim_step, loops.AdamParams(learning_rate=4e-5))
                return step, optim.result(timeout=60)

            step, _ = await asyncio.to_thread(train)
            print((await step).loss)  # in this event loop, or in another one
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, call: Callable[[], Coroutine[Any, Any, T]], *, name: str
    ) -> None:
        self._loop = loop
        self._process = os.getpid()
        self._name = name
        self._is_failure_seen = False
        self._future: _Outcome[T] = _Outcome(loop)
        try:
            loop.call_soon_threadsafe(self._future.begin, call, name)
        except RuntimeError:
            raise ClosedError(f"{name} cannot start: the event loop of its client is closed") from None

    def done(self) -> bool:
        """Whether the result or error is known, or the call was cancelled."""
        return self._future.done()

    def cancelled(self) -> bool:
        """Whether `cancel` was called in time."""
        return self._future.cancelled()

    def cancel(self) -> bool:
        """Cancel the call; return whether that was in time.

        An operation that was not sent yet takes no turn. One that was sent is executed, and only its result is lost. A
        sample that is in flight is dropped.
        """
        return self._future.cancel()

    def result(self, timeout: float | None = None) -> T:
        """Wait in this thread, and return the result.

        In a coroutine this holds the event loop; there, `await` the future.

        Args:
            timeout: the longest time to wait, in seconds; None for no limit.

        Raises:
            CallTimeoutError: this wait timed out; the call continues and can be waited for again.
            concurrent.futures.CancelledError: `cancel` was called.
            ClosedError: the client was closed first; or this thread runs the call, so that it would wait for itself;
                or this process is a fork of the one that started the call.
            LoopsError: the errors of the call, and of the operation that it submits.
        """
        if not self.done():
            self._check_usable()
            if is_running_here(self._loop):
                raise ClosedError(
                    f"waiting for {self._name} on the event loop that runs it would never end: `await` it there"
                )
        deadline = None if timeout is None else monotonic() + timeout
        seconds = wake_interval()
        while not self.done():
            left = seconds if deadline is None else min(seconds, deadline - monotonic())
            if left <= 0:
                raise self._timed_out(timeout)
            wait([self._future], left)
            self._check_usable()
        return self._outcome()

    async def result_async(self, timeout: float | None = None) -> T:
        """Wait in a coroutine of any event loop, and return the result; `await future` is the same without a limit.

        Arguments and errors are those of `result`, but `asyncio.CancelledError` where `cancel` was called.
        """
        with TimeLimit(timeout):
            await self._wait_here()
        if not self.done():
            raise self._timed_out(timeout)
        try:
            return self._outcome()
        except CancelledError as cancelled:
            raise asyncio.CancelledError(*cancelled.args) from None

    def future(self) -> Future[T]:
        """Return the future of `concurrent.futures`, for `wait`, `as_completed` and `asyncio.wrap_future`.

        Cancelling it cancels the call.
        """
        self._is_failure_seen = True  # nothing tells whether it is
        return self._future

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled() else "done" if self.done() else "pending"
        return f"<CallFuture {self._name} {state}>"

    async def _wait_here(self) -> None:
        if self.done():
            return
        self._check_usable()
        loop, is_done = asyncio.get_running_loop(), asyncio.Event()
        self._future.add_done_callback(lambda _: self._call_soon(loop, is_done.set))
        while not self.done():
            with TimeLimit(CHECK_SECONDS):
                await is_done.wait()
            self._check_usable()

    def _call_soon(self, loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
        """Call `function` on a loop that waits."""
        with suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(function)

    def _check_usable(self) -> None:
        """Raise if the future can never be done."""
        if self.done():
            return
        if self._process != os.getpid():
            raise ClosedError(
                f"{self._name} was started in process {self._process}, and its result never reaches this forked child"
            )
        if self._loop.is_closed() and not self.done():
            raise ClosedError(f"the event loop of {self._name} was closed before the call was done")

    def _timed_out(self, timeout: float | None) -> CallTimeoutError:
        return CallTimeoutError(f"no result of {self._name} within {timeout} s; the call continues", timeout=timeout)

    def _outcome(self) -> T:
        error = None if self.cancelled() else self._future.exception()
        if error is None:
            return self._future.result()
        self._is_failure_seen = True
        raise error.with_traceback(None)

    def __del__(self) -> None:
        """Log a failure that no caller has seen, once none can see it."""
        future: _Outcome[T] | None = getattr(self, "_future", None)
        if future is None or self._is_failure_seen or not future.done() or future.cancelled():
            return
        error = future.exception()
        if error is not None and not isinstance(error, ClosedError):
            log.warning("%s failed, and its result was never waited for: %s", self._name, without_quote(error))


class _Outcome(Future[T]):
    """What comes of a call: set on the loop that runs it, seen by any thread. Cancelling it cancels the call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._task: asyncio.Task[None] | None = None

    def begin(self, call: Callable[[], Coroutine[Any, Any, T]], name: str) -> None:
        """Start the task of the call; must be called on the loop."""
        if self.cancelled():
            self.set_running_or_notify_cancel()
            return
        self._task = asyncio.create_task(self._capture(call, name), name=f"loops_async: {name}")
        _running.add(self._task)
        self._task.add_done_callback(_running.discard)
        self._task.add_done_callback(partial(self._ended, name))

    def cancel(self) -> bool:
        is_cancelled = super().cancel()
        if is_cancelled:
            with suppress(RuntimeError):  # the loop is closed, and with it the call
                self._loop.call_soon_threadsafe(self._cancel_task)
        return is_cancelled

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _capture(self, call: Callable[[], Coroutine[Any, Any, T]], name: str) -> None:
        try:
            value = await call()
        except asyncio.CancelledError:
            self._fail(_ended_early(name))
            raise
        except BaseException as error:  # SystemExit, too: it belongs to the caller, and must not end the loop
            self._fail(error)
        else:
            if self.set_running_or_notify_cancel():
                self.set_result(value)

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        if not self.done() or (self.cancelled() and task.cancelled()):  # cancelled before its first step
            self._fail(_ended_early(name))

    def _fail(self, error: BaseException) -> None:
        if not self.done() and self.set_running_or_notify_cancel():
            self.set_exception(error)


def _ended_early(name: str) -> ClosedError:
    return ClosedError(f"{name} was cancelled: its client or its event loop was closed")


@runtime_checkable
class _OfOneLoop(Protocol):
    """A client that is open on one event loop."""

    def _event_loop(self) -> asyncio.AbstractEventLoop: ...


@overload
def start(
    call: Callable[P, Coroutine[Any, Any, OperationFuture[T]]], /, *args: P.args, **kwargs: P.kwargs
) -> CallFuture[T]: ...
@overload
def start(call: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> CallFuture[T]: ...
def start(call: Callable[..., Coroutine[Any, Any, Any]], /, *args: Any, **kwargs: Any) -> CallFuture[Any]:
    """Start a call of a client on the client's event loop, from any other thread, without waiting for anything.

    Calls run in the order in which a thread starts them, so operations take their turns in that order. Arguments are
    checked, and data encoded, by the client's loop: an error of either is the future's. Lists that are arguments are
    copied, so that they may be changed at once; the values in them may not.

    Args:
        call: a coroutine method of an open `ServiceClient`, `TrainingClient` or `SamplingClient`, e.g.
            ``trainer.forward_backward``.
        args: its arguments.
        kwargs: its arguments by name.

    Returns:
        The future of the method's result. For an operation it is that of the operation's own result: what
        ``await (await trainer.forward_backward(...))`` would return.

    Raises:
        InputError: `call` is not such a method.
        ClosedError: the client is not open or was opened in the process that this one was forked from; or this is
            the client's own event loop, where the call can be awaited.
    """
    client = getattr(call, "__self__", None)
    if not isinstance(client, _OfOneLoop) or not iscoroutinefunction(call):
        raise InputError("call", f"must be a coroutine method of a client, e.g. trainer.forward_backward; got {call!r}")
    loop = client._event_loop()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - private to users of clients
    if is_running_here(loop):
        raise ClosedError(f"{call.__name__} would start after what this event loop awaits next: await the call instead")
    copies = {name: copied(value) for name, value in kwargs.items()}
    return CallFuture(loop, resolved(partial(call, *map(copied, args), **copies)), name=call.__name__)


def wake_interval() -> float:
    """Return how often this thread wakes up while it waits, in seconds."""
    return WAKE_SECONDS if threading.current_thread() is threading.main_thread() else CHECK_SECONDS


def resolved(call: Callable[[], Coroutine[Any, Any, Any]]) -> Callable[[], Coroutine[Any, Any, Any]]:
    """Return a call that waits for the operation, too, if `call` submits one."""

    async def call_and_wait() -> Any:
        value = await call()
        return await value if _is_operation(value) else value

    return call_and_wait


def _is_operation(value: Any) -> TypeGuard[OperationFuture[Any]]:
    return isinstance(value, OperationFuture)


def copied(argument: Any) -> Any:
    """Return a copy of a list or a dict, which a caller may change as soon as the call has started."""
    return argument.copy() if type(argument) in (list, dict) else argument


def is_running_here(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this code is run by `loop`."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False

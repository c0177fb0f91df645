"""Threads for functions that stand for coroutines, such as rollouts: each has a thread of its own while it runs.

A thread cannot be cancelled, but its calls of this package can. When the function is cancelled, the call that it waits
for is, or else its next one; that raises `CancelledError`, so the function ends, after its own clean-up. Nothing ends a
function that computes or sleeps: what cancels it waits, and says so in the log.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from inspect import iscoroutinefunction
from queue import SimpleQueue
from time import monotonic
from typing import Any, Final, Generic, ParamSpec, TypeVar

from loops_async._tasks import run_to_completion
from loops_async.errors import InputError

from ._outcome import Outcome, without_first_frame

__all__ = ["InThread", "Worker", "Workers"]

P = ParamSpec("P")
T = TypeVar("T")

WARNING_SECONDS: Final = 5.0
"""How long a cancelled function may run on before a warning; the next ones come after twice the time each."""

IDLE_SECONDS: Final = 1.0
"""When no function has ended for so long, idle threads end."""

IDLE: Final = "loops_sync: idle"

log = logging.getLogger("loops_async")


class InThread(Generic[P, T]):
    """A plain function as a coroutine function, which calls it in a thread; as picklable as the function is."""

    def __init__(self, function: Callable[P, T]) -> None:
        if iscoroutinefunction(function) or not callable(function):
            raise InputError(
                "rollout", f"must be a plain function; coroutine functions are for loops_async; got {function!r}"
            )
        self._function = function
        self.__qualname__ = getattr(function, "__qualname__", repr(function))

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(self._function, *args, **kwargs)


class Workers:
    """The threads of one event loop: as many as functions run at once; idle ones soon end.

    All of it but `join` is used on the loop's thread only.
    """

    def __init__(self) -> None:
        self._idle: list[Worker] = []
        self._running = 0
        self._last_end = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._starting = asyncio.Lock()

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in a thread that is named after the current task, in a copy of the current context.

        Returns when the function has ended, also if the caller is cancelled meanwhile.
        """
        worker = None
        self._running += 1
        try:
            worker = await self._take()
            return await worker.call(partial(function, *args, **kwargs))
        finally:
            self._running -= 1
            if worker is not None:
                self._idle.append(worker)
            self._last_end = monotonic()
            if self._timer is None:
                self._end_later(IDLE_SECONDS)

    def end_idle(self) -> None:
        """End the threads in which no function runs."""
        while self._idle:
            self._idle.pop().end()

    def _end_later(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._end_if_unused)

    def _end_if_unused(self) -> None:
        self._timer = None
        left = self._last_end + IDLE_SECONDS - monotonic()
        if left > 0:
            self._end_later(left)
        else:
            self.end_idle()

    def join(self) -> None:
        """Wait, in any thread, for those that have been told to end, which they do at once."""
        for thread in threading.enumerate():
            if isinstance(thread, Worker) and thread.owner is self and thread.is_ending:
                thread.join()

    async def _take(self) -> Worker:
        if self._idle:
            return self._idle.pop()
        async with self._starting:
            await asyncio.sleep(0)  # starting thousands in one turn would hold the loop
            return self._idle.pop() if self._idle else self._started()

    def _started(self) -> Worker:
        worker = Worker(self)
        try:
            worker.start()
        except RuntimeError as refused:
            refused.add_note(f"{self._running} functions, e.g. rollouts, are to run in a thread of their own each")
            raise
        return worker


class Worker(threading.Thread):
    """A thread that makes one call after another.

    It is a daemon: the exit of the interpreter cancels what runs, and does not wait for what cannot be cancelled.
    """

    def __init__(self, owner: Workers) -> None:
        super().__init__(name=IDLE, daemon=True)
        self.owner = owner
        self.is_ending: bool = False
        self._calls: SimpleQueue[Call[Any] | None] = SimpleQueue()
        self._outcome: Outcome[Any] | None = None
        self._cancel_outcome: Callable[[], None] | None = None
        self._is_cancelled = False

    def run(self) -> None:
        """Make the calls: the code of the thread itself. All other methods must be called on the loop."""
        while (call := self._calls.get()) is not None:
            call.make()
            del call  # an idle thread keeps nothing alive

    async def call(self, function: Callable[[], T]) -> T:
        """Call `function` in this thread, which must be idle."""
        name = _task_name()
        call = Call(function)
        _rename(self, f"loops_sync: {name}")
        self._is_cancelled = False
        self._calls.put(call)
        try:
            await call.has_ended.wait()
        except asyncio.CancelledError:
            self.cancel()
            await run_to_completion(self._end_of(call, name), on_cancel=self.cancel)
            call.raise_failure()
            raise
        finally:
            _rename(self, IDLE)
            self._outcome, self._cancel_outcome = None, None
        return call.result()

    def begin(self, outcome: Outcome[Any], start: Callable[[], None], cancel: Callable[[], None]) -> None:
        """Start a blocking call that the function makes, or refuse it if the function was cancelled meanwhile."""
        if self._is_cancelled:
            self._is_cancelled = False
            outcome.fail(asyncio.CancelledError())
        else:
            self._outcome, self._cancel_outcome = outcome, cancel
            start()

    def cancel(self) -> None:
        """Cancel the blocking call that the function waits for, or else its next one."""
        if self._outcome is None or self._outcome.is_known or self._cancel_outcome is None:
            self._is_cancelled = True
        else:
            self._cancel_outcome()

    def end(self) -> None:
        """End the thread, which must be idle."""
        self.is_ending = True
        self._calls.put(None)

    async def _end_of(self, call: Call[Any], name: str) -> None:
        """Wait until a cancelled call has ended."""
        seconds, waited = WARNING_SECONDS, 0.0
        while not await _is_set(call.has_ended, seconds):
            waited += seconds
            seconds *= 2
            message = "%s was cancelled %g s ago and still runs, at %s; only its calls of loops_sync can be interrupted"
            log.warning(message, name, waited, self._position())

    def _position(self) -> str:
        frame = sys._current_frames().get(self.ident or 0)  # pyright: ignore[reportPrivateUsage] - it is documented
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "its end"


class Call(Generic[T]):
    """One call of a function: made in a worker's thread, waited for on the loop."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.has_ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()
        self._function = function
        self._error: BaseException | None = None

    def make(self) -> None:
        """Make the call, and keep what comes of it."""
        try:
            self._value = self._context.run(self._function)
        except BaseException as error:
            self._error = error
        with suppress(RuntimeError):  # the loop is closed: the interpreter is exiting
            self._loop.call_soon_threadsafe(self.has_ended.set)

    def result(self) -> T:
        """Return the function's result, or raise its error."""
        error, self._error = self._error, None
        if error is None:
            return self._value
        try:
            raise without_first_frame(error)
        finally:
            del error  # its traceback refers to this frame, which refers to it

    def raise_failure(self) -> None:
        """Raise the function's error, unless that is its cancellation."""
        if self._error is not None and not isinstance(self._error, asyncio.CancelledError):
            self.result()


def _rename(thread: threading.Thread, name: str) -> None:
    thread.name = name


def _task_name() -> str:
    task = asyncio.current_task()
    return "function" if task is None else task.get_name().removeprefix("loops_async: ")


async def _is_set(event: asyncio.Event, seconds: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()

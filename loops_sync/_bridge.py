"""The bridge from threads to coroutines: one event loop, which runs all blocking calls of this process.

The loop has its own daemon thread. anyio's `BlockingPortal` is similar, but it ends for all callers when one call
raises `SystemExit`, hangs in a forked child, and prevents the interpreter from exiting while it is open.

Two invariants:

- The outcome of a call, a result or an error, is passed on as a value. No exception of a coroutine can end the loop,
  and an exception that the waiting thread itself raises (Ctrl-C) is never confused with an outcome.
- An asynchronous context or iterator runs in one task from its start to its end, as cancel scopes and task groups
  require, no matter how many calls advance it.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import logging
import os
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, aclosing
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from types import TracebackType
from typing import Any, Final, Generic, ParamSpec, TypeVar, cast

from loops_async._futures import WAKE_SECONDS, wake_interval
from loops_async._tasks import cancel_and_wait
from loops_async.errors import ClosedError

from ._outcome import Outcome
from ._wakeups import wakeups
from ._workers import Worker, Workers

__all__ = ["Bridge", "Held", "Items", "Relay", "current", "stepped_in_worker_threads"]

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M")
E = TypeVar("E")

CLEANUP_SECONDS: Final = 60.0
"""The longest time that Ctrl-C waits for the cleanup of the interrupted coroutine; a second one ends the wait."""

EXIT_SECONDS: Final = 2.0
"""How long the exit of the interpreter waits for everything that is still open."""

EXITING: Final = "the interpreter is exiting, and the event loop of loops_sync has ended"

UNFINISHED: Final = f"its call did not finish its cleanup in {CLEANUP_SECONDS:g} s: what it created may still exist"

log = logging.getLogger("loops_async")


class Bridge:
    """Runs coroutines for the other threads of a process, on a loop that starts with the first call."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self.workers: Workers = Workers()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, which is started if there is none; raises the `ClosedError` of `run`."""
        self._check_usable()
        return cast("asyncio.AbstractEventLoop", self._loop)

    @property
    def worker(self) -> Worker | None:
        """The worker that this is called in, if it is one of this bridge's."""
        thread = threading.current_thread()
        return thread if isinstance(thread, Worker) and thread.owner is self.workers else None

    def run(self, function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a coroutine function on the loop, and return its result or raise its error.

        An exception that interrupts the wait, e.g. Ctrl-C, cancels the coroutine and waits for its clean-up,
        up to 60 s. Notes on the exception say what may be left.

        Raises:
            ClosedError: the call is not possible here: on the loop's own thread it would wait for itself; in a forked
                child and at the exit of the interpreter, that thread does not exist.
        """
        outcome: Outcome[T] = Outcome()
        return self.wait(outcome, partial(outcome.start, function, *args, **kwargs), outcome.cancel)

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a plain function on the loop's thread, since the objects that it uses belong to that thread."""

        async def called() -> T:
            return function(*args, **kwargs)

        return self.run(called)

    def relay(self, callback: Callable[[E], object] | None) -> Relay[E]:
        """Prepare a call that reports to `callback`."""
        return Relay(self, callback)

    def iterate(self, function: Callable[P, AsyncIterable[T]], /, *args: P.args, **kwargs: P.kwargs) -> Items[T]:
        """Return a plain iterator over an async one."""
        return Items(self, lambda: function(*args, **kwargs))

    def hold(
        self, function: Callable[P, AbstractAsyncContextManager[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Held[T]:
        """Return a plain context manager for an async one."""
        return Held(self, lambda: function(*args, **kwargs))

    def advance(self, step: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the next step of an async iterator, as `next` of a plain one."""
        try:
            return self.run(step)
        except StopAsyncIteration:
            raise StopIteration from None

    def post(self, callback: Callable[[], object]) -> bool:
        """Schedule `callback` on the loop, without waiting; safe anywhere, also in finalisers.

        Return False if no loop runs, so that there is nothing to do.
        """
        if self._loop is None or not self.is_of_this_process():
            return False
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed, and so is everything on it
            return False
        return True

    def wait(self, outcome: Outcome[T], start: Callable[[], None], cancel: Callable[[], None]) -> T:
        """Schedule `start` on the loop, and wait for `outcome`.

        If the wait is interrupted, `cancel` is scheduled there. The calls of a worker's function are also cancelled
        when that function is: it gets a `CancelledError`, as the coroutine in its place would.
        """
        self._check_usable()
        worker = self.worker
        seconds = wake_interval()
        try:
            self.post(start if worker is None else partial(worker.begin, outcome, start, cancel))
            while not outcome.wait(seconds):
                self._check_alive()
        except BaseException as interruption:
            if self.post(cancel):
                deadline = monotonic() + CLEANUP_SECONDS
                while not (has_ended := outcome.wait(WAKE_SECONDS)) and monotonic() < deadline:
                    pass
                for note in outcome.notes if has_ended else [UNFINISHED]:
                    interruption.add_note(note)
            raise
        if self._is_stopping and worker is None:
            # Only daemon threads still wait at this point. They stay here until the process ends, without an error.
            threading.Event().wait()
        try:
            return outcome.get()
        except asyncio.CancelledError:
            if worker is not None:
                raise
            raise ClosedError("the call was cancelled: its client was closed, or the interpreter is exiting") from None

    def stop(self) -> None:
        """Cancel everything that runs, wait up to 2 s for its clean-up, and end the thread."""
        self._is_stopping = True
        if self._loop is not None and self._thread is not None and self.post(self._loop.stop):
            self._thread.join(EXIT_SECONDS)

    def prevent_collection(self) -> None:
        """Prevent the garbage collection, in a forked child, of the objects inherited from the parent process.

        Their clean-up in the child would remove the parent's connections from the selector that both share.
        """
        if self._loop is not None:
            inherited = (self, asyncio.all_tasks(self._loop))
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))

    def is_of_this_process(self) -> bool:
        """Whether this bridge was created in this process, and not before a fork in the parent."""
        return self._pid == os.getpid()

    def _check_usable(self) -> None:
        if not self.is_of_this_process():
            raise ClosedError(
                f"this object was created in process {self._pid} and does not work in its forked child: create a new "
                "ServiceClient in each process, or send a SamplingClient there with pickle"
            )
        if self._thread is threading.current_thread():
            raise ClosedError(
                "a blocking call on the event loop's own thread would wait for itself: code that runs there, e.g. a "
                "finaliser, cannot use loops_sync; use loops_async in your own event loop"
            )
        if self._is_stopping:
            raise ClosedError(EXITING)
        if self._loop is None:
            self._start()

    def _check_alive(self) -> None:
        if self._thread is not None and not self._thread.is_alive() and not self._is_stopping:
            raise ClosedError("the thread of loops_sync has died; its traceback is in the program's error output")

    def _start(self) -> None:
        with self._starting:
            if self._loop is None:
                # Worker threads inherit the daemon flag, so an idle one does not delay the interpreter's exit either.
                loop = asyncio.new_event_loop()
                thread = threading.Thread(target=_serve, args=(loop,), name="loops_sync", daemon=True)
                thread.start()
                self._thread, self._loop = thread, loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    with wakeups.gathering(loop):
        while True:
            try:
                loop.run_forever()
                break
            except (SystemExit, KeyboardInterrupt):
                # Raised by a task; the calls of other threads must continue.
                log.exception("a background task tried to end the thread of loops_sync")
        loop.run_until_complete(_cancel_all())
        loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def _cancel_all() -> None:
    await cancel_and_wait(asyncio.all_tasks() - {asyncio.current_task()})


class Relay(Generic[E]):
    """A call whose callback runs in the thread that waits for the call.

    There, a callback may block without delaying other calls, and may use the client. It sees the context and the
    thread-local variables of that thread, and Ctrl-C interrupts it, as it would not in a worker thread. The coroutine
    continues meanwhile, so an exception of the callback cancels the call, and is raised after the call's clean-up.
    """

    def __init__(self, bridge: Bridge, callback: Callable[[E], object] | None) -> None:
        self._bridge = bridge
        self._callback = callback
        self._callback_calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()

    @property
    def post(self) -> Callable[[E], object] | None:
        """The function that the core calls instead of the callback."""
        callback = self._callback
        return None if callback is None else lambda event: self._callback_calls.put(partial(callback, event))

    def run(self, function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run like `Bridge.run`, and call the callback with every event, in order, before returning."""
        outcome: RelayedOutcome[T] = self._outcome()
        return self._bridge.wait(outcome, partial(outcome.start, function, *args, **kwargs), outcome.cancel)

    def hold(
        self, function: Callable[P, AbstractAsyncContextManager[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Held[T]:
        """Hold like `Bridge.hold`, and call the callback with every event, in order, while entering and leaving."""
        return Held(self._bridge, lambda: function(*args, **kwargs), self._outcome)

    def _outcome(self) -> RelayedOutcome[Any]:
        return RelayedOutcome(self._bridge, self._callback_calls)


class RelayedOutcome(Outcome[T]):
    """The outcome of a call, and the calls of its callback before that, which `wait` makes."""

    __slots__ = ("_bridge", "_callback_calls", "_callback_error")

    def __init__(self, bridge: Bridge, callback_calls: SimpleQueue[Callable[[], object] | None]) -> None:
        super().__init__()
        self._bridge = bridge
        self._callback_calls = callback_calls
        self._callback_error: BaseException | None = None

    def wait(self, timeout: float) -> bool:
        deadline = monotonic() + timeout
        while (left := deadline - monotonic()) > 0:
            try:
                call = self._callback_calls.get(timeout=left)
            except Empty:
                break
            if call is None:
                return True
            try:
                call()
            except BaseException as error:  # Ctrl-C, too: the call cleans up before it is raised
                # Later events are still delivered: they report how the call ends. Only the first error is raised.
                if self._callback_error is None:
                    self._callback_error = error
                    self._bridge.post(self.cancel)
        return False

    def get(self) -> T:
        if self._callback_error is not None:
            for note in self.notes:
                self._callback_error.add_note(note)
            self._error, self._callback_error = self._callback_error, None
        return super().get()

    def _notify(self) -> None:
        self._callback_calls.put(None)


class Steps(Generic[T, M]):
    """An async generator that other threads advance; it runs in one task from the first step to the end."""

    def __init__(
        self, bridge: Bridge, generator: AsyncGenerator[T, M], outcome: Callable[[], Outcome[T]] = Outcome
    ) -> None:
        self._bridge = bridge
        self._generator = generator
        self._outcome = outcome
        self._requests: asyncio.Queue[tuple[Outcome[T], M]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._has_ended = False

    def step(self, message: M) -> T:
        """Send `message` and return the yielded value; raise `StopAsyncIteration` if the generator has ended."""
        if self._has_ended:
            raise StopAsyncIteration
        outcome = self._outcome()
        return self._bridge.wait(outcome, lambda: self._request(outcome, message), self.cancel)

    def close(self) -> None:
        """End the generator, and wait for its clean-up."""
        self._bridge.run(self._cancel_and_wait)

    def cancel(self) -> None:
        """Start to end the generator; must be called on the loop."""
        self._has_ended = True
        if self._task is not None:
            self._task.cancel()

    def _request(self, outcome: Outcome[T], message: M) -> None:
        if self._has_ended:
            outcome.fail(StopAsyncIteration())
            return
        if self._task is None:
            self._task = asyncio.create_task(self._serve())
            # It does not see a cancellation before its first step.
            self._task.add_done_callback(lambda _: self._refuse(asyncio.CancelledError()))
        outcome.task = self._task
        self._requests.put_nowait((outcome, message))

    async def _serve(self) -> None:
        try:
            is_open = True
            while is_open:
                outcome, message = await self._requests.get()
                is_open = await outcome.capture(self._generator.asend, message)
        finally:
            self._has_ended = True
            self._refuse(StopAsyncIteration())
            await self._generator.aclose()

    def _refuse(self, error: BaseException) -> None:
        """Fail the requests that came too late."""
        while not self._requests.empty():
            self._requests.get_nowait()[0].fail(error)

    async def _cancel_and_wait(self) -> None:
        self.cancel()
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()  # raises the error of a failed clean-up


class Items(Iterator[T]):
    """A plain iterator over an async one; `close` and garbage collection end it early."""

    def __init__(self, bridge: Bridge, make: Callable[[], AsyncIterable[T]]) -> None:
        async def items() -> AsyncGenerator[T, None]:
            source = make()
            async with AsyncExitStack() as stack:
                if isinstance(source, AsyncGenerator):  # other iterators have nothing to clean up
                    await stack.enter_async_context(aclosing(cast("AsyncGenerator[T, None]", source)))
                async for item in source:
                    yield item

        self._steps = Steps(bridge, items())
        self._finalizer = _cancel_when_collected(self, bridge, self._steps)

    def __next__(self) -> T:
        try:
            return self._steps.step(None)
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """End the iteration, and wait for its clean-up."""
        self._steps.close()


class Held(AbstractContextManager[T]):
    """A plain context manager for an async one, entered at most once; garbage collection leaves it."""

    def __init__(
        self,
        bridge: Bridge,
        make: Callable[[], AbstractAsyncContextManager[T]],
        outcome: Callable[[], Outcome[Any]] = Outcome,
    ) -> None:
        async def enter_and_leave() -> AsyncGenerator[Any, BaseException | None]:
            async with AsyncExitStack() as stack:
                stack.callback(bridge.workers.end_idle)  # last, when its own functions have ended
                error = yield await stack.enter_async_context(make())
                if error is None:
                    yield await stack.__aexit__(None, None, None)
                else:
                    yield await stack.__aexit__(type(error), error, error.__traceback__)

        self._bridge = bridge
        self._steps = Steps(bridge, enter_and_leave(), outcome)
        self._finalizer = _cancel_when_collected(self, bridge, self._steps)

    def __enter__(self) -> T:
        return cast("T", self._steps.step(None))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Leave the context; this does nothing the second time, or in a forked child."""
        if not self._bridge.is_of_this_process():
            return False
        try:
            return bool(self._steps.step(error))
        except StopAsyncIteration:
            return False
        finally:
            self._finalizer()


def _cancel_when_collected(owner: object, bridge: Bridge, steps: Steps[Any, Any]) -> weakref.finalize[Any, Any]:
    """Cancel `steps` when `owner` is garbage collected, without waiting: that may happen on any thread."""
    finalizer = weakref.finalize(owner, bridge.post, steps.cancel)
    finalizer.atexit = False
    return finalizer


def stepped_in_worker_threads(items: Iterable[T]) -> AsyncIterable[T]:
    """Return an async iterator over a plain iterable, whose steps may block and may use loops_sync.

    Anything else is returned as it is, for the core to refuse.
    """
    return _stepped(items) if isinstance(items, Iterable) else items


async def _stepped(items: Iterable[T]) -> AsyncGenerator[T]:
    workers, end = current().workers, object()
    iterator = await workers.run(iter, items)
    while (item := await workers.run(next, iterator, end)) is not end:
        yield cast("T", item)


def current() -> Bridge:
    """Return the bridge of this process."""
    return _current


def _replace_after_fork() -> None:
    global _current
    inherited, _current = _current, Bridge()
    inherited.prevent_collection()


_current = Bridge()

if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_replace_after_fork)


@atexit.register
def _stop_at_exit() -> None:
    _current.stop()

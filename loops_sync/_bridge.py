"""From threads to coroutines: the one event loop on which every blocking call of this process runs.

The loop has a daemon thread of its own. anyio's `BlockingPortal` is close to this, but it ends for everybody when one
call raises `SystemExit`, hangs in a forked child, and keeps the interpreter from exiting while it is open.

Two invariants:

- What a call comes to travels as a value. Nothing that a coroutine raises can end the loop, and what the waiting
  thread raises by itself (Ctrl-C) is never mistaken for it.
- An asynchronous context or iterator lives in one task from its beginning to its end, as cancel scopes and task groups
  demand, however many calls step it.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import logging
import os
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, aclosing
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from types import TracebackType
from typing import Any, Final, Generic, ParamSpec, TypeVar, cast

from loops_async.errors import ClosedError

__all__ = ["Bridge", "Held", "Items", "Relay", "current", "stepped_in_worker_threads"]

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M")
E = TypeVar("E")

CLEANUP_SECONDS: Final = 5.0
"""How long Ctrl-C waits for the interrupted coroutine to clean up behind itself."""

EXIT_SECONDS: Final = 2.0
"""How long the end of the interpreter waits for everything that is still open."""

WAKE_SECONDS: Final = 0.5
"""How often a waiting thread looks up; on Windows it notices Ctrl-C only then."""

EXITING: Final = "the interpreter is exiting, and the event loop of loops_sync is gone"

log = logging.getLogger("loops_sync")


class Bridge:
    """Runs coroutines for the other threads of a process, on a loop that starts with the first of them."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    def run(self, function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a coroutine function on the loop, and return or raise what it comes to.

        An exception that ends the waiting, such as Ctrl-C, cancels the coroutine and waits up to 5 s for its clean-up.

        Raises:
            ClosedError: the call cannot be made from here: on the loop's own thread it would wait for itself, in a
                forked child there is no such thread, and at the interpreter's end it is gone.
        """
        outcome: Outcome[T] = Outcome()
        return self.wait(outcome, partial(outcome.start, function, *args, **kwargs), outcome.cancel)

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a plain function on the loop: what it touches belongs to that thread."""

        async def called() -> T:
            return function(*args, **kwargs)

        return self.run(called)

    def relay(self, callback: Callable[[E], object] | None) -> Relay[E]:
        """Prepare a call that reports to `callback`."""
        return Relay(self, callback)

    def iterate(self, function: Callable[P, AsyncIterator[T]], /, *args: P.args, **kwargs: P.kwargs) -> Items[T]:
        """Make an async iterator into a plain one."""
        return Items(self, lambda: function(*args, **kwargs))

    def hold(
        self, function: Callable[P, AbstractAsyncContextManager[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Held[T]:
        """Make an async context manager into a plain one."""
        return Held(self, lambda: function(*args, **kwargs))

    def post(self, callback: Callable[[], object]) -> bool:
        """Have `callback` called on the loop soon, without waiting; safe anywhere, also in finalisers.

        False when there is no loop (any more), and so nothing to do there.
        """
        if self._loop is None or not self.is_of_this_process():
            return False
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed, and with it whatever was open
            return False
        return True

    def wait(self, outcome: Outcome[T], start: Callable[[], None], cancel: Callable[[], None]) -> T:
        """Have `start` called on the loop, and wait for `outcome`.

        `cancel` is called there if the waiting is broken off.
        """
        self._check_usable()
        try:
            self.post(start)
            while not outcome.wait(WAKE_SECONDS):
                pass
        except BaseException:
            if self.post(cancel):
                outcome.wait(CLEANUP_SECONDS)
            raise
        if self._is_stopping:
            # Only daemon threads still wait by then. They end here with the process, as others do, and say nothing.
            threading.Event().wait()
        return outcome.get()

    def stop(self) -> None:
        """Cancel whatever runs, wait up to 2 s for its clean-up, and end the thread."""
        self._is_stopping = True
        if self._loop is not None and self._thread is not None and self.post(self._loop.stop):
            self._thread.join(EXIT_SECONDS)

    def abandon(self) -> None:
        """Keep what was inherited from the parent process from ever being collected here.

        Its clean-up would run in the child, and take the parent's connections out of the selector that both share.
        """
        if self._loop is not None:
            inherited = (self, asyncio.all_tasks(self._loop))
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))

    def is_of_this_process(self) -> bool:
        """Whether it is not that of the process from which this one was forked."""
        return self._pid == os.getpid()

    def _check_usable(self) -> None:
        if not self.is_of_this_process():
            raise ClosedError(
                f"this object was made in process {self._pid} and does not work in its forked child: make a new "
                "ServiceClient in each process, or send a SamplingClient there with pickle"
            )
        if self._thread is threading.current_thread():
            raise ClosedError(
                "a blocking call on the event loop's own thread would wait for itself: what runs there, for "
                "example a finaliser, cannot use loops_sync; use loops_async in an event loop of your own"
            )
        if self._is_stopping:
            raise ClosedError(EXITING)
        if self._loop is None:
            self._start()

    def _start(self) -> None:
        with self._starting:
            if self._loop is None:
                # Worker threads inherit that they are daemons, so an idle one does not keep the interpreter either.
                loop = asyncio.new_event_loop()
                thread = threading.Thread(target=_serve, args=(loop,), name="loops_sync", daemon=True)
                thread.start()
                self._thread, self._loop = thread, loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            loop.run_forever()
            break
        except BaseException:
            # A task that raises SystemExit ends `run_forever`, but everybody else's calls go on.
            log.exception("a background task tried to end the thread of loops_sync")
    loop.run_until_complete(_cancel_all())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


class Outcome(Generic[T]):
    """What a call comes to: put here on the loop's thread, waited for on another."""

    __slots__ = ("_error", "_pending", "_value", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[bool] | None = None
        self._error: BaseException | None = None
        self._pending = threading.Lock()
        self._pending.acquire()

    def start(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Begin to carry it; to be called on the loop."""
        self.task = asyncio.create_task(self.carry(function, *args, **kwargs))

    async def carry(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Take what the function comes to; whether that is a value."""
        try:
            self._value = await function(*args, **kwargs)
        except BaseException as error:
            self.fail(error)
            return False
        self._arrive()
        return True

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._arrive()

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def wait(self, timeout: float) -> bool:
        """Wait for up to `timeout` seconds; whether it is there."""
        return self._pending.acquire(timeout=timeout)

    def get(self) -> T:
        if self._error is None:
            return self._value
        error, self._error = self._error, None
        if isinstance(error, asyncio.CancelledError):
            raise ClosedError("the call was cancelled: its client was closed, or the interpreter is exiting")
        traceback = error.__traceback__
        try:
            raise error.with_traceback(traceback.tb_next if traceback else None)  # without the frame of `carry`
        finally:
            del error, traceback  # they hold this frame, which holds them

    def _arrive(self) -> None:
        self._pending.release()


class Relay(Generic[E]):
    """A call whose callback is called by the thread that waits for it, which has nothing else to do.

    There a callback may block, which holds up nobody else's calls, and may call the client back. It finds what belongs
    to that thread (context and thread-local variables), and Ctrl-C reaches it; in a worker thread it would not. The
    core goes on meanwhile, so what the callback raises cancels the call, which cleans up before that is raised.
    """

    def __init__(self, bridge: Bridge, callback: Callable[[E], object] | None) -> None:
        self._bridge = bridge
        self._callback = callback
        self._arrivals: SimpleQueue[Callable[[], object] | None] = SimpleQueue()

    @property
    def post(self) -> Callable[[E], object] | None:
        """What the core is to call in place of the callback."""
        callback = self._callback
        return None if callback is None else lambda event: self._arrivals.put(partial(callback, event))

    def run(self, function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Do what `Bridge.run` does, and call the callback with every event, in order, before that returns."""
        outcome: RelayedOutcome[T] = RelayedOutcome(self._bridge, self._arrivals)
        return self._bridge.wait(outcome, partial(outcome.start, function, *args, **kwargs), outcome.cancel)


class RelayedOutcome(Outcome[T]):
    """What a call comes to, and the calls of its callback before that, which `wait` makes."""

    __slots__ = ("_arrivals", "_bridge", "_raised")

    def __init__(self, bridge: Bridge, arrivals: SimpleQueue[Callable[[], object] | None]) -> None:
        super().__init__()
        self._bridge = bridge
        self._arrivals = arrivals
        self._raised: Exception | None = None

    def wait(self, timeout: float) -> bool:
        deadline = monotonic() + timeout
        while (left := deadline - monotonic()) > 0:
            try:
                call = self._arrivals.get(timeout=left)
            except Empty:
                break
            if call is None:
                return True
            try:
                call()
            except Exception as error:
                # Later events still come: they tell what becomes of what was begun. The first error counts.
                if self._raised is None:
                    self._raised = error
                    self._bridge.post(self.cancel)
        return False

    def get(self) -> T:
        if self._raised is not None:
            if self._error is None:
                self._raised.add_note("its call had succeeded by then: what that made is still there")
            for note in getattr(self._error, "__notes__", ()):  # what the core says that it left behind
                self._raised.add_note(note)
            self._error, self._raised = self._raised, None
        return super().get()

    def _arrive(self) -> None:
        self._arrivals.put(None)


class Steps(Generic[T, M]):
    """An async generator that other threads step, in one task from the first step to the end."""

    def __init__(self, bridge: Bridge, generator: AsyncGenerator[T, M]) -> None:
        self._bridge = bridge
        self._generator = generator
        self._asked: asyncio.Queue[tuple[Outcome[T], M]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._is_over = False

    def step(self, message: M) -> T:
        """Send `message` in and return what comes out; raises `StopAsyncIteration` when it is over."""
        if self._is_over:
            raise StopAsyncIteration
        outcome: Outcome[T] = Outcome()
        return self._bridge.wait(outcome, lambda: self._ask(outcome, message), self.cancel)

    def close(self) -> None:
        """End it, and wait until it has cleaned up."""
        self._bridge.run(self._end)

    def cancel(self) -> None:
        """Begin to end it; to be called on the loop."""
        self._is_over = True
        if self._task is not None:
            self._task.cancel()

    def _ask(self, outcome: Outcome[T], message: M) -> None:
        if self._is_over:
            outcome.fail(StopAsyncIteration())
            return
        if self._task is None:
            self._task = asyncio.create_task(self._serve())
        self._asked.put_nowait((outcome, message))

    async def _serve(self) -> None:
        try:
            is_open = True
            while is_open:
                outcome, message = await self._asked.get()
                is_open = await outcome.carry(self._generator.asend, message)
        finally:
            self._is_over = True
            while not self._asked.empty():
                self._asked.get_nowait()[0].fail(StopAsyncIteration())
            await self._generator.aclose()

    async def _end(self) -> None:
        self.cancel()
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()  # a clean-up that failed


class Items(Iterator[T]):
    """A plain iterator over an async one; `close` ends it early, as does letting go of it."""

    def __init__(self, bridge: Bridge, make: Callable[[], AsyncIterator[T]]) -> None:
        async def items() -> AsyncGenerator[T, None]:
            source = make()
            async with AsyncExitStack() as stack:
                if isinstance(source, AsyncGenerator):  # other iterators have nothing to clean up
                    await stack.enter_async_context(aclosing(cast("AsyncGenerator[T, None]", source)))
                async for item in source:
                    yield item

        self._steps = Steps(bridge, items())
        self._let_go = _when_let_go(self, bridge, self._steps)

    def __next__(self) -> T:
        try:
            return self._steps.step(None)
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """End the iteration, and wait until it has cleaned up behind itself."""
        self._steps.close()


class Held(AbstractContextManager[T]):
    """A plain context manager for an async one, entered once; letting go of it leaves it."""

    def __init__(self, bridge: Bridge, make: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        async def entered_then_left() -> AsyncGenerator[Any, BaseException | None]:
            async with AsyncExitStack() as stack:
                error = yield await stack.enter_async_context(make())
                if error is None:
                    yield await stack.__aexit__(None, None, None)
                else:
                    yield await stack.__aexit__(type(error), error, error.__traceback__)

        self._bridge = bridge
        self._steps = Steps(bridge, entered_then_left())
        self._let_go = _when_let_go(self, bridge, self._steps)

    def __enter__(self) -> T:
        return cast("T", self._steps.step(None))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Leave it; leaving it again, or in a forked child, does nothing."""
        if not self._bridge.is_of_this_process():
            return False
        try:
            return bool(self._steps.step(error))
        except StopAsyncIteration:
            return False
        finally:
            self._let_go()


def _when_let_go(owner: object, bridge: Bridge, steps: Steps[Any, Any]) -> weakref.finalize[Any, Any]:
    """End `steps` when `owner` is collected: on whatever thread that happens, nobody waits for it."""
    let_go = weakref.finalize(owner, bridge.post, steps.cancel)
    let_go.atexit = False
    return let_go


async def stepped_in_worker_threads(items: Iterable[T]) -> AsyncIterator[T]:
    """Make a plain iterable into an async one; its steps may block, and may use loops_sync."""
    iterator = iter(items)
    end = object()
    while (item := await asyncio.to_thread(next, iterator, end)) is not end:
        yield cast("T", item)


def current() -> Bridge:
    """Return the bridge of this process."""
    return _current


def _begin_anew_in_child() -> None:
    global _current
    inherited, _current = _current, Bridge()
    inherited.abandon()


_current = Bridge()

if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_begin_anew_in_child)


@atexit.register
def _stop() -> None:
    _current.stop()

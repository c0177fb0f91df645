"""Worker processes, which make calls and can be ended at any time."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import pickle
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from math import inf
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..errors import ClosedError, ConfigError, WorkerDiedError
from .outcomes import read

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

__all__ = ["KILL_SECONDS", "Call", "LocalProcess", "Process", "Processes", "log_here"]

IMPORTS: Final = (
    "Each process imports the program's main module, so that must be a file with an "
    '`if __name__ == "__main__":`, and not come from standard input'
)
"""Why a process may end before it is ready."""

KILL_SECONDS: Final = 5.0
"""How long a rollout that is cancelled may take to end."""

_numbers = itertools.count()


class Call(Future[Any]):
    """One call. Cancelling it also ends one that runs, and so does not wait for what hangs."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__()
        self.number: Final = next(_numbers)
        self.name: Final[str] = getattr(function, "__qualname__", repr(function))
        self.function = function
        self.args = args
        self.started: Future[None] = Future()
        """Done when a process that is ready has the call."""
        self._guard = threading.Lock()
        self._process: Process | None = None
        self._is_unwanted = False

    def cancel(self) -> bool:
        """Cancel the call; if it runs, end it."""
        if super().cancel():
            return True
        with self._guard:
            self._is_unwanted = True
            process = self._process
        if process is not None:
            process.cancel(self)
        return False

    def is_given_to(self, process: Process) -> bool:
        """Note the process that runs the call; return False if it is no longer wanted."""
        with self._guard:
            self._process = process
            return not self._is_unwanted

    def end(self, outcome: bytes | Exception) -> None:
        """Set the result or the error."""
        with self._guard:
            self._process = None
        try:
            value, error = (None, outcome) if isinstance(outcome, Exception) else read(outcome)
        except Exception as unreadable:
            value, error = None, unreadable
        if error is None:
            self.set_result(value)
        else:
            self.set_exception(error)


class Process(ABC):
    """A process that makes calls, several at the same time. All methods may be called in any thread.

    With `are_rollouts`, calls are of coroutine functions, which share an event loop; cancelling one ends the process
    only if it does not end by itself. Otherwise cancelling a call ends the process. `freed` is called whenever a call
    has ended.
    """

    def __init__(self, freed: Callable[[], None], *, are_rollouts: bool) -> None:
        self._are_rollouts = are_rollouts
        self._freed = freed
        self._running: dict[int, Call] = {}
        self._cancelled: dict[int, float] = {}
        """When those that were cancelled must have ended."""
        self._timer: threading.Timer | None = None
        self._is_ready = False
        self._reason = ""
        self.is_ending = False
        self._guard = threading.Condition()

    def run(self, call: Call) -> bool:
        """Begin a call, to which its end is told; return False if the process has ended.

        Raises:
            Exception: the call cannot be pickled.
        """
        function, args = self._pickled(call.function), self._pickled(call.args)
        with self._guard:
            if self.is_ending:
                return False
            self._running[call.number] = call
            if self._is_ready:
                call.started.set_result(None)
        self._begin(call.number, function, args)
        if not call.is_given_to(self):
            self.cancel(call)
        return True

    def cancel(self, call: Call) -> None:
        """End a call: by cancelling its coroutine, which has some time to end, or by ending the process."""
        if not self._are_rollouts:
            self.kill(f"{call.name} was cancelled", call.number)
            return
        with self._guard:
            if call.number not in self._running:
                return
            self._cancelled.setdefault(call.number, monotonic() + KILL_SECONDS)
            if self._timer is None:
                self._end_overdue_in(KILL_SECONDS)
        self._cancel(call.number)

    def kill(self, reason: str, number: int | None = None) -> None:
        """Begin to end the process, whatever it does; with a `number`, only if it runs the call of that number."""
        with self._guard:
            if number is not None and number not in self._running:
                return
            self._reason = self._reason or reason
            self.is_ending = True
        self._kill()

    def join(self) -> None:
        """Wait for the end of the process as far as it is told, and of all its calls."""
        with self._guard:
            self._guard.wait_for(lambda: not self._running)

    # --- what a kind of process does ---

    @abstractmethod
    def _pickled(self, value: Any) -> bytes:
        """Return a function or arguments as bytes."""

    @abstractmethod
    def _begin(self, number: int, function: bytes, args: bytes) -> None:
        """Send a call to the process."""

    @abstractmethod
    def _cancel(self, number: int) -> None:
        """Have the process cancel a coroutine."""

    @abstractmethod
    def _kill(self) -> None:
        """Kill the process."""

    # --- what it tells ---

    def _got_ready(self) -> None:
        """Note that the process takes calls."""
        with self._guard:
            self._is_ready = True
            started = list(self._running.values())
        for call in started:
            call.started.set_result(None)

    def _got(self, number: int, outcome: bytes | Exception) -> None:
        """Take what came of a call."""
        with self._guard:
            call = self._running.pop(number, None)
            self._cancelled.pop(number, None)
            if not self._cancelled:
                self._stop_timer()
            self._guard.notify_all()
        if call is not None:
            call.end(outcome)
            self._freed()

    def _got_end(self, error: Callable[[Call], Exception]) -> None:
        """Fail all calls, since the process has ended."""
        with self._guard:
            self.is_ending = True
            calls = list(self._running.values())
            self._running.clear()
            self._guard.notify_all()
            self._stop_timer()
        for call in calls:
            call.end(error(call))
            self._freed()

    def _end_overdue_in(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._end_overdue)
        self._timer.name, self._timer.daemon = "loops_async: cancelled rollouts", True
        self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_overdue(self) -> None:
        with self._guard:
            self._timer = None
            left = min(self._cancelled.values(), default=inf) - monotonic()
            if 0 < left < inf:
                self._end_overdue_in(left)
        if left <= 0:
            self.kill(f"a rollout that was cancelled did not end in {KILL_SECONDS:g} s")


Start: TypeAlias = Callable[[Callable[[], None]], Process]


class Processes:
    """Up to `count` processes with `places` calls at the same time in each; a call goes where the fewest run.

    `start` starts a process, given what to call whenever a call in it has ended.
    """

    def __init__(self, count: int, places: int, start: Start) -> None:
        self._count = count
        self._places = places
        self._start = start
        self._lanes: list[_Lane] = []
        self._waiting: deque[Call] = deque()
        self._lock = threading.Lock()
        self._is_closed = False

    def start(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Call:
        """Start a call as soon as there is a place; returns at once, in any thread.

        Raises:
            ClosedError: these are closed.
        """
        call = Call(function, args)
        with self._lock:
            if self._is_closed:
                raise ClosedError("this executor is closed")
            self._waiting.append(call)
        self._fill()
        return call

    def close(self) -> None:
        """End all calls and processes, and wait for their end."""
        with self._lock:
            self._is_closed = True
            waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            call.cancel()
        for lane in self._lanes:
            lane.close()
        for lane in self._lanes:
            lane.join()

    def _fill(self) -> None:
        """Give waiting calls to the lanes that have places."""
        with self._lock:
            while self._waiting:
                lane = min(self._lanes, key=lambda each: each.load, default=None)
                if (lane is None or lane.load) and len(self._lanes) < self._count:
                    lane = _Lane(self._start, self._freed)
                    self._lanes.append(lane)
                if lane is None or lane.load >= self._places:
                    return
                lane.load += 1
                lane.calls.put(self._waiting.popleft())

    def _freed(self, lane: _Lane) -> None:
        with self._lock:
            lane.load -= 1
        self._fill()


class _Lane:
    """Makes calls in one process at a time, which it starts anew when one has ended."""

    def __init__(self, start: Start, freed: Callable[[_Lane], None]) -> None:
        self.load = 0
        """The calls that were given to it and have not ended; guarded by the lock of its `Processes`."""
        self.calls: SimpleQueue[Call | None] = SimpleQueue()
        self._start = start
        self._freed = freed
        self._process: Process | None = None
        self._is_closed = False
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="loops_async: calls", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Begin to end the process, and all calls."""
        with self._guard:
            self._is_closed = True
            if self._process is not None:
                self._process.kill("the executor was closed")
        self.calls.put(None)

    def join(self) -> None:
        """Wait for the end of the thread and of the process."""
        self._thread.join()
        if self._process is not None:
            self._process.join()

    def _serve(self) -> None:
        while (call := self.calls.get()) is not None:
            if call.set_running_or_notify_cancel():
                self._give(call)
            else:
                self._freed(self)

    def _give(self, call: Call) -> None:
        try:
            while not self._usable_process().run(call):
                pass
        except Exception as error:  # it cannot be pickled, or no process can be started
            call.end(error)
            self._freed(self)

    def _usable_process(self) -> Process:
        with self._guard:
            if self._is_closed:
                raise ClosedError("this executor is closed")
            if self._process is None or self._process.is_ending:
                if self._process is not None:
                    self._process.join()
                self._process = self._start(lambda: self._freed(self))
            return self._process


class LocalProcess(Process):
    """A process on this machine, its connection, and the thread that reads from it."""

    def __init__(self, freed: Callable[[], None], *, are_rollouts: bool) -> None:
        from multiprocessing import get_context  # both take milliseconds, and few programs need them

        from .worker import serve_calls, serve_rollouts

        super().__init__(freed, are_rollouts=are_rollouts)
        self._sending = threading.Lock()
        spawn = get_context("spawn")  # a fork of a process with threads may hang
        self._connection: Connection
        self._connection, theirs = spawn.Pipe()
        level = logging.getLogger().getEffectiveLevel()
        serve = serve_rollouts if are_rollouts else serve_calls
        # Not daemonic: such a process may have none of its own, with which many graders limit what they run.
        self._process: SpawnProcess = spawn.Process(target=serve, args=(theirs, level))
        self._process.start()
        self._owner = os.getpid()
        atexit.register(self._kill_at_exit)  # before `multiprocessing` waits for it
        theirs.close()  # so that the end of the process is the end of the connection
        self._thread = threading.Thread(target=self._read, name="loops_async: outcomes", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the process, and of all its calls."""
        self._thread.join()

    def _pickled(self, value: Any) -> bytes:
        return pickle.dumps(value)

    def _begin(self, number: int, function: bytes, args: bytes) -> None:
        self._send(("run", number, function, args))

    def _cancel(self, number: int) -> None:
        self._send(("cancel", number, None, None))

    def _kill(self) -> None:
        self._process.kill()

    def _kill_at_exit(self) -> None:
        if os.getpid() == self._owner:  # not in a process that this one has forked
            self._process.kill()

    def _send(self, message: tuple[str, int, bytes | None, bytes | None]) -> None:
        try:
            with self._sending:
                self._connection.send_bytes(pickle.dumps(message))
        except OSError:  # it has ended, which its reader notices
            pass

    # --- in the thread of the process ---

    def _read(self) -> None:
        try:
            while True:
                self._receive(*pickle.loads(self._connection.recv_bytes()))  # noqa: S301 - from a worker of our own
        except (EOFError, OSError):
            pass
        self.is_ending = True
        self._process.join()
        atexit.unregister(self._kill_at_exit)
        self._connection.close()
        self._got_end(self._error)

    def _receive(self, kind: str, number: int, content: Any) -> None:
        if kind == "log":
            log_here(content)
        elif kind == "ready":
            self._got_ready()
        else:
            self._got(number, content)

    def _error(self, call: Call) -> Exception:
        worker = f"worker process {self._process.pid}"
        code = self._process.exitcode or 0
        ended = f"{worker}, which ran {call.name}, has ended with exit code {code}"
        if self._reason or self._is_ready or code < 0:  # of a signal
            return WorkerDiedError(f"{ended}{self._reason and f': {self._reason}'}", worker=worker)
        return ConfigError(
            f"a worker process ended with exit code {code} before it was ready. {IMPORTS}; or memory ran out"
        )


def log_here(record: logging.LogRecord) -> None:
    """Log what a worker has logged, if it is to be logged here."""
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)

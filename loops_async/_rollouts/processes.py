"""A pool of processes in which a call can be ended at any time."""

from __future__ import annotations

import os
import pickle
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from .._arguments import check_at_least
from ..errors import ClosedError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["ProcessPool"]

IMPORTS: Final = (
    "Each process imports the program's main module, so that must be a file with an "
    '`if __name__ == "__main__":`, and not come from standard input'
)
"""Why a process may end before its first answer."""


class ProcessPool:
    """Processes that run functions, e.g. graders; unlike those of `concurrent.futures`, a call that hangs can be ended.

    Cancelling a call kills its process, and the next call gets a new one. `RolloutContext.run` does so when the episode
    reaches its `episode_timeout`, is no longer needed, or the stream is left. As always with `multiprocessing`,
    functions, arguments and results are pickled, and the script needs ``if __name__ == "__main__":``.

    Args:
        processes: how many calls run at the same time; None is the number of cores.

    Raises:
        InputError: `processes` is not a whole number of at least 1.

    Example:
        ::

            with loops.ProcessPool(4) as pool:
                stream = trainer.rollouts(rollout, tasks, group_size=8, groups_per_step=4, executor=pool)
    """

    def __init__(self, processes: int | None = None) -> None:
        self._size = check_at_least(processes or os.cpu_count() or 1, 1, "processes")
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._calls: set[_Call] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Start ``fn(*args)`` in a process; cancelling the future that is returned also ends a call that runs.

        The future raises what `fn` raises, or `concurrent.futures.BrokenExecutor` if the process ends.

        Raises:
            ClosedError: the pool is closed.
        """
        call = _Call(fn, args)
        with self._lock:
            if self._is_closed:
                raise ClosedError("this ProcessPool is closed")
            self._calls.add(call)
            if len(self._threads) < self._size:
                thread = threading.Thread(target=self._serve, name="loops-process-pool", daemon=True)
                self._threads.append(thread)
                thread.start()
        call.add_done_callback(self._calls.discard)
        self._queue.put(call)
        return call

    def close(self) -> None:
        """End all calls and processes, and wait for their end."""
        with self._lock:
            self._is_closed = True
        for call in list(self._calls):
            call.cancel()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        """Run calls one after the other, in one process as long as that lives."""
        process: _Process | None = None
        while (call := self._queue.get()) is not None:
            if not call.set_running_or_notify_cancel():
                continue
            if process is None or process.is_killed:
                process = _Process()
            call.run_in(process)
        if process is not None:
            process.end()


class _Call(Future[Any]):
    """One call, and the process that runs it."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__()
        self._function = function
        self._args = args
        self._process: _Process | None = None
        self._is_unwanted = False
        self._guard = threading.Lock()

    def cancel(self) -> bool:
        """Cancel the call; if it runs, kill its process."""
        if super().cancel():
            return True
        with self._guard:
            self._is_unwanted = True
            if self._process is not None:
                self._process.kill()
        return False

    def run_in(self, process: _Process) -> None:
        """Run the call in a process, and set the outcome."""
        with self._guard:
            self._process = process
            if self._is_unwanted:
                process.kill()
        try:
            value = process.call(self._function, self._args)
        except BaseException as error:
            self._release()
            self.set_exception(error)
        else:
            self._release()
            self.set_result(value)

    def _release(self) -> None:
        """From now on the process may run another call, which must not be killed."""
        with self._guard:
            self._process = None


class _Process:
    """A process that makes one call after the other."""

    def __init__(self) -> None:
        from multiprocessing import get_context  # takes milliseconds, and few programs need it

        spawn = get_context("spawn")  # a fork of a process with threads may hang
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        self.is_killed = False
        self._has_answered = False

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return ``function(*args)``, or raise its error."""
        call = pickle.dumps((function, args))
        try:
            self._connection.send_bytes(call)
            answer = self._connection.recv_bytes()
        except (EOFError, OSError):
            name = getattr(function, "__qualname__", repr(function))
            hint = "" if self._has_answered else f". {IMPORTS}"
            raise BrokenExecutor(f"the process that ran {name} has ended with exit code {self.end()}{hint}") from None
        self._has_answered = True
        has_succeeded, outcome = pickle.loads(answer)  # noqa: S301 - from a process of our own
        if has_succeeded:
            return outcome
        raise outcome

    def kill(self) -> None:
        """Begin to end the process, whatever it does."""
        self.is_killed = True
        self._process.kill()

    def end(self) -> int | None:
        """End the process, and return its exit code."""
        self.kill()
        self._process.join()
        self._connection.close()
        return self._process.exitcode


# --- in the process ---


def _work(connection: Connection) -> None:
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_outcome(call))


def _outcome(call: bytes) -> bytes:
    """Make a call; return whether it succeeded, and its result or error."""
    try:
        function, args = pickle.loads(call)  # noqa: S301 - from the process that started this one
        return pickle.dumps((True, function(*args)))
    except BaseException as error:
        error.add_note(f"In the process:\n{traceback.format_exc()}")
        return _pickled_error(error)


def _pickled_error(error: BaseException) -> bytes:
    """Pickle an error; one that cannot be read again is replaced by its description."""
    try:
        pickled = pickle.dumps((False, error))
        pickle.loads(pickled)  # noqa: S301 - just made
    except Exception:
        return pickle.dumps((False, RuntimeError("".join(traceback.format_exception(error)))))
    return pickled

"""The side of the worker: a process that makes calls for the one that started it, and ends with it."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from .outcomes import failed, outcome_of, succeeded

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["Rollouts", "called", "serve_calls", "serve_rollouts"]

loaded: Final = lru_cache(maxsize=32)(pickle.loads)
"""Unpickles a function once, however often it is called: what it keeps, such as connections, lasts."""


class Rollouts:
    """The coroutines that run on one event loop, by the numbers of their calls."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._tasks: dict[int, asyncio.Task[Any]] = {}

    async def run(self, number: int, function: bytes, args: bytes) -> bytes:
        """Run the coroutine function of a call, and return the outcome, also when it is cancelled."""
        self._tasks[number] = asyncio.create_task(_run(function, args), name=f"loops_async: rollout {number}")
        try:
            await asyncio.wait([self._tasks[number]])
            return succeeded(self._tasks[number].result())
        except BaseException as error:
            self._tasks[number].cancel()
            return failed(error, self._worker)
        finally:
            del self._tasks[number]

    def cancel(self, number: int) -> None:
        """Cancel a call, if it still runs; in any thread."""
        task = self._tasks.get(number)
        if task is not None:
            task.get_loop().call_soon_threadsafe(task.cancel)


async def _run(function: bytes, args: bytes) -> Any:
    return await loaded(function)(*pickle.loads(args))  # noqa: S301 - from the process that started this one


def serve_calls(connection: Connection, level: int) -> None:
    """Make one call after the other in the main thread, where alarms and signals work."""
    channel = _Channel(connection, level)
    for kind, number, function, args in channel.messages():
        if kind == "run":
            channel.send(("ended", number, outcome_of(channel.worker, called, function, args)))


def called(function: bytes, args: bytes) -> Any:
    """Make a call."""
    return loaded(function)(*pickle.loads(args))  # noqa: S301 - from the process that started this one


def serve_rollouts(connection: Connection, level: int) -> None:
    """Run coroutines beside one another on one event loop."""
    asyncio.run(_serve_rollouts(_Channel(connection, level)))


async def _serve_rollouts(channel: _Channel) -> None:
    rollouts = Rollouts(channel.worker)
    running: set[asyncio.Task[None]] = set()
    messages: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    channel.receive_with(lambda message: loop.call_soon_threadsafe(messages.put_nowait, message))

    async def run(number: int, function: bytes, args: bytes) -> None:
        channel.send(("ended", number, await rollouts.run(number, function, args)))

    while True:
        kind, number, function, args = await messages.get()
        if kind == "cancel":
            rollouts.cancel(number)
            continue
        task = asyncio.create_task(run(number, function, args))
        running.add(task)
        task.add_done_callback(running.discard)


class _Channel:
    """The connection to the process that started this one. When that ends, so does this one, whatever it does."""

    def __init__(self, connection: Connection, level: int) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.worker: Final = f"worker process {os.getpid()}"
        self._logs = _SendLogs(self)
        root = logging.getLogger()
        root.setLevel(level)
        root.addHandler(self._logs)
        # Ctrl-C in a terminal reaches every process; what is to end here, the process that started this one ends.
        # Not SIG_IGN, which programs that a call starts would inherit.
        signal.signal(signal.SIGINT, _go_on)
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._leave)
        self.send(("ready", 0, None))

    def _leave(self) -> None:
        """Give up what belongs to the worker, in a process that a call has forked.

        Its connection would stay open there after the end of the worker, which nothing would notice then.
        """
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logging.getLogger().removeHandler(self._logs)
        self._connection.close()

    def send(self, message: tuple[str, int, Any]) -> None:
        """Send a message; safe in any thread."""
        with self._sending:
            self._connection.send_bytes(pickle.dumps(message))

    def receive_with(self, receive: Callable[[Any], object]) -> None:
        """Pass each message that comes to `receive`, in a thread of its own."""
        threading.Thread(target=self._receive, args=(receive,), name="loops_async: messages", daemon=True).start()

    def messages(self) -> Iterator[Any]:
        """Yield each message that comes."""
        queue: SimpleQueue[Any] = SimpleQueue()
        self.receive_with(queue.put)
        while True:
            yield queue.get()

    def _receive(self, receive: Callable[[Any], object]) -> None:
        try:
            while True:
                receive(pickle.loads(self._connection.recv_bytes()))  # noqa: S301 - from the process that started this one
        except (EOFError, OSError):
            os._exit(0)


def _go_on(_number: int, _frame: object) -> None:
    pass


class _SendLogs(QueueHandler):
    """Sends log records to the process that started this one, which has the handlers of the program."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__(queue=None)  # type: ignore[arg-type] # `enqueue` is the only method that uses it
        self._channel = channel

    def enqueue(self, record: logging.LogRecord) -> None:
        self._channel.send(("log", 0, record))

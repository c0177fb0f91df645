"""The thread of a journal: it does what it is given in order, and all that has come meanwhile in one transaction."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, TypeVar

from .._tasks import take_exception
from ..errors import ClosedError, JournalError
from .file import JournalFile, journal_error

T = TypeVar("T")

log = logging.getLogger("loops_async")

MOST_AT_ONCE: Final = 1024
"""The most jobs of one transaction."""


class _Job(Generic[T]):
    def __init__(self, work: Callable[[JournalFile], T], future: asyncio.Future[T] | None) -> None:
        self.work = work
        self.future = future
        self.result: T | None = None
        self.error: BaseException | None = None

    def settle(self) -> None:
        """Tell the outcome; on the event loop."""
        if self.future is None or self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)  # type: ignore[arg-type]  # it is T: there is no error
        else:
            self.future.set_exception(self.error)


class JournalThread:
    """Opens a journal and works on it in a thread of its own, until it is closed.

    Jobs that wait share one transaction, so that many concurrent ones cost one write to disk. A job that refuses with
    a `JournalError` has written nothing. When the file cannot be written, that job and all later ones fail.
    """

    def __init__(self, open_file: Callable[[], JournalFile]) -> None:
        self._open_file = open_file
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._opened: asyncio.Future[JournalFile] = self._loop.create_future()
        self._opened.add_done_callback(take_exception)  # a caller that was cancelled does not wait for it
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._is_closing = False
        self._broken: BaseException | None = None
        # It never keeps a program from ending: what it has written is complete at any time.
        threading.Thread(target=self._work, name="loops-journal", daemon=True).start()

    async def opened(self) -> JournalFile:
        """Wait until the file is open; only its constants may be read here."""
        return await asyncio.shield(self._opened)

    def check(self) -> None:
        """Raise why nothing is recorded any longer, if that is so."""
        if self._broken is not None:
            raise self._broken

    def run(self, work: Callable[[JournalFile], T]) -> asyncio.Future[T]:
        """Do `work`, and return its result when it is on disk.

        Raises:
            ClosedError: the journal is closed.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if self._is_closing:
            future.set_exception(ClosedError("the client is closed, and so is its journal"))
        else:
            self._queue.put(_Job(work, future))
        return future

    def post(self, work: Callable[[JournalFile], object]) -> None:
        """Do `work` before all that is asked for later, which fails if this does."""
        if not self._is_closing:
            self._queue.put(_Job(work, None))

    async def close(self) -> None:
        """Do what was asked for before, and end."""
        if not self._is_closing:
            self._is_closing = True
            self._queue.put(None)
        await asyncio.shield(self._ended)

    # --- in the thread ---

    def _work(self) -> None:
        try:
            try:
                file = self._open_file()
            except BaseException as error:
                self._tell(_fail, self._opened, error)
                return
            self._tell(_succeed, self._opened, file)
            try:
                while self._run_some(file):
                    pass
            finally:
                file.close()
        finally:
            self._tell(_succeed, self._ended, None)

    def _run_some(self, file: JournalFile) -> bool:
        """Do what waits; return whether there will be more."""
        jobs, is_last = self._waiting()
        try:
            if self._broken is None:
                with file.transaction():
                    for job in jobs:
                        _run(job, file)
        except BaseException as error:
            self._break(journal_error(file.path, error))
        if self._broken is not None:
            for job in jobs:
                job.error = self._broken
        if any(job.future is not None for job in jobs):
            self._tell(_settle, jobs)
        return not is_last

    def _waiting(self) -> tuple[list[_Job[Any]], bool]:
        first, jobs = self._queue.get(), list[_Job[Any]]()
        while first is not None and len(jobs) < MOST_AT_ONCE:
            jobs.append(first)
            try:
                first = self._queue.get_nowait()
            except Empty:
                return jobs, False
        if first is not None:
            jobs.append(first)
        return jobs, first is None

    def _break(self, error: BaseException) -> None:
        self._broken = error
        log.error("the journal ends here, and with it all that would be recorded: %s", error)

    def _tell(self, how: Callable[..., None], *values: Any) -> None:
        with suppress(RuntimeError):  # the loop was closed before its client
            self._loop.call_soon_threadsafe(how, *values)


def _run(job: _Job[Any], file: JournalFile) -> None:
    try:
        job.result = job.work(file)
    except JournalError as refusal:
        job.error = refusal


def _settle(jobs: Sequence[_Job[Any]]) -> None:
    for job in jobs:
        job.settle()


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)

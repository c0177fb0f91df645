"""What comes of a call that one thread makes and the event loop of another thread runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, ParamSpec, TypeVar

__all__ = ["Outcome", "without_first_frame"]

P = ParamSpec("P")
T = TypeVar("T")

SUCCEEDED: Final = "its call had already succeeded: the objects that it created still exist"


def without_first_frame(error: BaseException) -> BaseException:
    """Return an error of another thread without the frame that caught it there, which tells a reader nothing."""
    traceback = error.__traceback__
    return error.with_traceback(traceback.tb_next if traceback else None)


class Outcome(Generic[T]):
    """The result or error of a call: set on the loop's thread, waited for on another."""

    __slots__ = ("_error", "_pending", "_value", "is_known", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.is_known: bool = False
        self._error: BaseException | None = None
        self._pending = threading.Lock()
        self._pending.acquire()

    def start(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Start a task that captures the outcome of `function`; must be called on the loop."""
        self.task = asyncio.create_task(self.capture(function, *args, **kwargs))
        self.task.add_done_callback(self._fail_if_not_begun)

    def _fail_if_not_begun(self, task: asyncio.Task[bool]) -> None:
        if task.cancelled():  # before its first step, so `capture` did not see it
            self.fail(asyncio.CancelledError())

    async def capture(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Run `function` and keep its outcome; return whether that is a result."""
        try:
            self._value = await function(*args, **kwargs)
        except BaseException as error:
            self.fail(error)
            return False
        self._end()
        return True

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._end()

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def wait(self, timeout: float) -> bool:
        """Wait for up to `timeout` seconds; return whether the outcome is known."""
        return self._pending.acquire(timeout=timeout)

    @property
    def notes(self) -> list[str]:
        """What a caller must know who gets another error instead of the outcome, e.g. what could not be deactivated."""
        return [SUCCEEDED] if self._error is None else list(getattr(self._error, "__notes__", ()))

    def get(self) -> T:
        if self._error is None:
            return self._value
        error, self._error = self._error, None
        try:
            raise without_first_frame(error)
        finally:
            del error  # its traceback refers to this frame, which refers to it

    def _end(self) -> None:
        self.is_known = True
        self._notify()

    def _notify(self) -> None:
        self._pending.release()

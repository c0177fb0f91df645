"""Turns, so that operations are sent in the order of the calls."""

from __future__ import annotations

import asyncio

from ..errors import UnfinishedSubmission


class Turn:
    """A place in the order: `wait` until all previous turns have ended, then `end` to start the next one.

    A turn that ends before its start is skipped: the next one still waits for the previous ones.
    """

    def __init__(self, previous: asyncio.Future[None] | None) -> None:
        self._previous = previous
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait(self) -> None:
        """Wait until all previous turns have ended."""
        if self._previous is not None:
            await asyncio.wait([self._previous])

    def end(self) -> None:
        """Start the next turn, now or as soon as all previous turns have ended."""
        if self._previous is None or self._previous.done():
            self._finish()
        else:
            self._previous.add_done_callback(lambda _: self._finish())

    def _finish(self) -> None:
        self._previous = None  # otherwise a long chain of turns would stay in memory
        if not self.done.done():
            self.done.set_result(None)


class Turns:
    """Turns in the order in which they are taken. Only the holder of the current turn changes the public fields."""

    def __init__(self) -> None:
        self.sent = 0
        self.place = 0
        """The place of the next operation in the journal."""
        self.latest: str | None = None
        """The first idempotency key of the operation that was sent last."""
        self.unfinished: UnfinishedSubmission | None = None
        """That operation, if it is unfinished."""
        self._last: asyncio.Future[None] | None = None

    def take(self) -> Turn:
        """Take the next turn; the caller must end it."""
        turn = Turn(self._last)
        self._last = turn.done
        return turn

"""Turns: what was asked first is sent first."""

from __future__ import annotations

import asyncio


class Turn:
    """A place in the order: `wait` for everybody before, then `end` to let the next one in.

    A turn that ends before it came is skipped: the next one still waits for those before.
    """

    def __init__(self, previous: asyncio.Future[None] | None) -> None:
        self._previous = previous
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait(self) -> None:
        """Wait until everybody before is done."""
        if self._previous is not None:
            await asyncio.wait([self._previous])

    def end(self) -> None:
        """Let the next one in, now or as soon as everybody before is done."""
        if self._previous is None or self._previous.done():
            self._finish()
        else:
            self._previous.add_done_callback(lambda _: self._finish())

    def _finish(self) -> None:
        self._previous = None  # a long chain of turns must not keep itself alive
        if not self.over.done():
            self.over.set_result(None)


class Turns:
    """Gives out turns in the order in which they are taken. `sent` is what whoever has the turn counts with it."""

    def __init__(self) -> None:
        self.sent = 0
        self._last: asyncio.Future[None] | None = None

    def take(self) -> Turn:
        """Take the next turn; whoever takes it must end it."""
        turn = Turn(self._last)
        self._last = turn.over
        return turn

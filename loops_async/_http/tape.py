"""The seam where exchanges are recorded, or answered in the place of the network: see `loops_async.testing`.

Without a tape, all of this costs one comparison for each request.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TypeAlias

from msgspec import Struct

if TYPE_CHECKING:
    from .messages import Answer, Request
    from .settings import Settings

Send: TypeAlias = "Callable[[Request], Awaitable[Answer]]"
Open: TypeAlias = "Callable[[Request], AbstractAsyncContextManager[OpenAnswer]]"


class Pieces(Protocol):
    """A body that is read piece by piece."""

    def iter_chunked(self, n: int) -> AsyncIterator[bytes]:
        """Yield pieces of at most `n` bytes."""
        ...


class OpenAnswer(Struct, gc=False):
    """An answer whose body is still to be read."""

    status: int
    headers: Mapping[str, str]
    content: Pieces


class Tape(ABC):
    """What stands between a program and the network."""

    is_playing: bool
    """Whether nothing is sent, so that no pause is needed and no key."""

    @abstractmethod
    async def exchange(self, request: Request, settings: Settings, send: Send) -> Answer:
        """Return the answer to a request; `send` sends it."""

    @abstractmethod
    def opened(self, request: Request, settings: Settings, open_: Open) -> AbstractAsyncContextManager[OpenAnswer]:
        """Do the same for an answer that is read piece by piece."""

    @abstractmethod
    async def before_pause(self) -> None:
        """Be called before a pause, which need not come to its end: see `gave_up`."""

    @abstractmethod
    def gave_up(self) -> None:
        """Be called when the running task stops waiting: after its last exchange, or during it."""


current: Tape | None = None
"""The tape of this process, if there is one."""


def is_playing() -> bool:
    """Whether requests are answered by a tape."""
    return current is not None and current.is_playing


async def pause(seconds: float, sleep: Callable[[float], Awaitable[object]] | None = None) -> None:
    """Sleep between two requests for the same thing; not at all while a tape is played."""
    if current is not None:
        await current.before_pause()
    with waiting():
        await (sleep or asyncio.sleep)(0.0 if is_playing() else seconds)


@contextmanager
def waiting() -> Generator[None]:
    """Tell the tape when the block is cancelled."""
    try:
        yield
    except asyncio.CancelledError:
        if current is not None:
            current.gave_up()
        raise

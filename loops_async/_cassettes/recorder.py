"""Recording: requests go to the service, and what it answers is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

from .._http.messages import Answer, Request
from .._http.redaction import Redactor
from .._http.settings import Settings
from .._http.tape import Open, OpenAnswer, Pieces, Send, Tape
from ..errors import ClosedError, LoopsError
from .file import Cassette, Recorded, RecordedAnswer, RecordedError
from .requests import recorded


class Recorder(Tape):
    """Keeps every exchange; of a file's content, at most `largest_file` bytes."""

    is_playing = False

    def __init__(self, largest_file: int) -> None:
        self._largest_file = largest_file
        self._exchanges: list[Recorded] = []
        self._base_url = ""
        self._latest: WeakKeyDictionary[asyncio.Task[object], Recorded] = WeakKeyDictionary()

    @property
    def cassette(self) -> Cassette:
        """What was recorded; what is still under way was given up."""
        for each in self._exchanges:
            each.gave_up = each.gave_up or (each.answer is None and each.error is None)
        return Cassette(base_url=self._base_url, exchanges=self._exchanges)

    async def exchange(self, request: Request, settings: Settings, send: Send) -> Answer:
        redactor = Redactor.of(settings)
        entry = self._begin(request, settings, redactor)
        try:
            answer = await send(request)
        except LoopsError as error:
            self._fail(entry, error, redactor)
            raise
        entry.answer = RecordedAnswer.of(answer.status, redactor.headers(answer.headers))
        try:
            entry.answer.put_json(redactor.text(answer.body.decode()))
        except UnicodeDecodeError:
            entry.answer.put(answer.body)
        return answer

    @asynccontextmanager
    async def opened(self, request: Request, settings: Settings, open_: Open) -> AsyncGenerator[OpenAnswer]:
        redactor = Redactor.of(settings)
        entry = self._begin(request, settings, redactor)
        copy: _Copy | None = None
        try:
            async with open_(request) as answer:
                entry.answer = RecordedAnswer.of(answer.status, redactor.headers(answer.headers))
                copy = _Copy(answer.content, self._largest_file)
                yield OpenAnswer(answer.status, answer.headers, copy)
        except LoopsError as error:
            self._fail(entry, error, redactor)
            raise
        finally:
            if entry.answer is not None and copy is not None:
                copy.keep_in(entry.answer)

    async def before_pause(self) -> None:
        return

    def gave_up(self) -> None:
        entry = self._latest.get(_this_task())
        if entry is not None:
            entry.gave_up = True

    def _begin(self, request: Request, settings: Settings, redactor: Redactor) -> Recorded:
        self._base_url = self._base_url or settings.base_url
        entry = Recorded(request=recorded(request, redactor))
        self._exchanges.append(entry)
        self._latest[_this_task()] = entry
        return entry

    def _fail(self, entry: Recorded, error: LoopsError, redactor: Redactor) -> None:
        if not isinstance(error, ClosedError):  # the program's own doing, which it will repeat
            entry.error = RecordedError.of(error, redactor.text(str(error)))


class _Copy:
    """Passes a body on and keeps it, unless it is too large."""

    def __init__(self, content: Pieces, most: int) -> None:
        self._content = content
        self._most = most
        self._kept: list[bytes] = []
        self._size = 0

    async def iter_chunked(self, n: int) -> AsyncIterator[bytes]:
        async for piece in self._content.iter_chunked(n):
            self._size += len(piece)
            self._kept.append(piece)
            if self._size > self._most:
                self._kept.clear()
            yield piece

    def keep_in(self, answer: RecordedAnswer) -> None:
        if self._size > self._most:
            answer.omitted = self._size
        else:
            answer.put(b"".join(self._kept))


def _this_task() -> asyncio.Task[object]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("requests are made in tasks")
    return task

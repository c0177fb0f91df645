"""Playing: the recorded answers come at once, and nothing is sent."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NoReturn
from weakref import WeakKeyDictionary

import msgspec

from .. import _waiting
from .._http.messages import Answer, Request
from .._http.redaction import Redactor
from .._http.settings import Settings
from .._http.tape import Open, OpenAnswer, Send, Tape
from ..errors import NotRecordedError
from .file import Cassette, Recorded, RecordedAnswer, RecordedRequest
from .requests import Rules, Signature, ids_in, nearest, recorded, shown

MOST_REPETITIONS: Final = 500
"""How often the last failure of a request comes again: more often than any retry asks."""

RETRIED: Final = frozenset({429, 500, 502, 503, 504})

ADVICE: Final = "If the program is meant to ask this, record again: with testing.record, or pytest --loops-record."

QUIET_SECONDS: Final = 0.01
QUIET_TURNS: Final = 50
"""When nothing was played for so long, the program waits for what will not come."""


class Player(Tape):
    """Answers each request as it was answered when the cassette was recorded."""

    is_playing = True

    def __init__(self, cassette: Cassette, path: Path) -> None:
        self._path = path
        self._exchanges = cassette.exchanges
        given = "\n".join(json.dumps(msgspec.to_builtins(each.answer)) for each in cassette.exchanges)
        self._rules = Rules(cassette.base_url, frozenset(ids_in(given)))
        self._signatures = [self._rules.signature(each.request, cassette.base_url) for each in cassette.exchanges]
        self._indexes: defaultdict[str, list[int]] = defaultdict(list)
        for index, signature in enumerate(self._signatures):
            self._indexes[signature.text].append(index)
        self._played: Counter[int] = Counter()
        self._latest: WeakKeyDictionary[asyncio.Task[object], Recorded] = WeakKeyDictionary()
        self._lock = threading.Lock()
        """Clients of several threads may ask at the same moment."""
        self.refused: list[NotRecordedError] = []

    async def exchange(self, request: Request, settings: Settings, send: Send) -> Answer:
        entry = await self._next(request, settings)
        if entry.error is not None:
            raise entry.error.error()
        if entry.answer is None:
            await self._never()
        return Answer(entry.answer.status, Headers(entry.answer.headers), entry.answer.raw)

    @asynccontextmanager
    async def opened(self, request: Request, settings: Settings, open_: Open) -> AsyncGenerator[OpenAnswer]:
        entry = await self._next(request, settings)
        answer = entry.answer
        if answer is not None:
            if answer.omitted is not None:
                raise self._refusal(
                    f"{request.what}: its {answer.omitted:,} bytes are not in {self._path}, since they are more than "
                    "largest_file: record again with a larger one"
                )
            yield OpenAnswer(answer.status, Headers(answer.headers), _Content(answer))
        if entry.error is not None:
            raise entry.error.error()
        if answer is None:
            await self._never()

    async def before_pause(self) -> None:
        task = asyncio.current_task()
        latest = self._latest.get(task) if task is not None else None
        if latest is not None and latest.gave_up:
            await self._never()

    def gave_up(self) -> None:
        return

    async def _next(self, request: Request, settings: Settings) -> Recorded:
        await asyncio.sleep(0)  # as a real answer, it lets others go first
        with self._lock:
            entry = self._exchanges[self._take(request, settings)]
        task = asyncio.current_task()
        if task is not None:
            self._latest[task] = entry
        return entry

    def _take(self, request: Request, settings: Settings) -> int:
        """Return the index of the exchange that answers a request, and count it as played."""
        asked = recorded(request, Redactor.of(settings))
        signature = self._rules.signature(asked, settings.base_url)
        fitting = [each for each in self._indexes[signature.text] if self._fits(signature, each)]
        # A request that was sent again has the ids of its first try.
        own = [each for each in fitting if self._signatures[each].ids == signature.ids] or fitting
        index = next((each for each in own if not self._played[each]), None)
        if index is None and own and self._may_repeat(own[-1]):
            index = own[-1]
        if index is None:
            raise self._refusal(
                f"{_named(request)} was recorded {_times(len(own))} in {self._path}, and is asked once more. {ADVICE}"
                if own
                else f"{_named(request)} was not recorded in {self._path}.{self._nearest(asked, settings)} {ADVICE}"
            )
        self._played[index] += 1
        self._rules.learn(signature, self._signatures[index])
        return index

    def _fits(self, signature: Signature, index: int) -> bool:
        return self._rules.fits(signature, self._signatures[index])

    def _may_repeat(self, index: int) -> bool:
        """Whether it is a failure: retries may ask more often than they did, since their pauses are random."""
        entry = self._exchanges[index]
        is_failure = entry.error is not None or (entry.answer is not None and entry.answer.status in RETRIED)
        return is_failure and self._played[index] < MOST_REPETITIONS

    def _nearest(self, asked: RecordedRequest, settings: Settings) -> str:
        found = nearest(asked, [each.request for each in self._exchanges], self._rules, settings.base_url)
        if found is None:
            return " Nothing was."
        index, differences = found
        request = self._exchanges[index].request
        where = f"the nearest is in line {index + 2}, {request.method} {request.url.partition('?')[0]}"
        return f"\n  Of what was, {where}:\n{shown(differences)}\n "

    def _refusal(self, message: str) -> NotRecordedError:
        error = NotRecordedError(message)
        self.refused.append(error)
        return error

    async def _never(self) -> NoReturn:
        """Wait until the program gives up, as it did: its time limit expires as soon as nothing else happens."""
        while True:
            played = self._played.total()
            await asyncio.sleep(QUIET_SECONDS)
            for _ in range(QUIET_TURNS):
                await asyncio.sleep(0)
            if played == self._played.total():
                self._expire()

    def _expire(self) -> None:
        """Let the next time limit expire: of this task, or else of one that waits for it."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        running = [limit for limit in _waiting.running_limits or () if limit.task.get_loop() is loop]
        own = [limit for limit in running if limit.task is task]
        limit = min(own or running, key=lambda limit: limit.seconds_left, default=None)
        if limit is not None:
            limit.expire()


class Headers(Mapping[str, str]):
    """Headers, whose names may be written in any case."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = {name.lower(): value for name, value in headers.items()}

    def __getitem__(self, name: str) -> str:
        return self._headers[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


class _Content:
    """The body of a recorded file."""

    def __init__(self, answer: RecordedAnswer) -> None:
        self._raw = answer.raw

    async def iter_chunked(self, n: int) -> AsyncIterator[bytes]:
        for start in range(0, len(self._raw), n):
            yield self._raw[start : start + n]


def _named(request: Request) -> str:
    return f"{request.what} ({request.method} {request.url.partition('?')[0]})"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"

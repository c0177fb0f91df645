"""The registry of work: one entry for each call that is under way, updated in place.

The event loop alone writes it; any thread, and any signal handler, may read it at any moment. So nothing here takes a
lock, and what is read may be one step older than what is true.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import weakref
from asyncio import current_task
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, Final, Protocol

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from .._waiting import HELD_SECONDS, hold_warning
from ..errors import LoopsError, without_quote
from ..types import InFlight, Usage, WaitingFor, WorkKind
from .budget import Budget, check_budget
from .usage import Counts, Up, total_of, usage_of

BEAT_SECONDS: Final = 0.25
"""How often the event loop shows that it runs, while anything is under way."""


class Observer(Protocol):
    """What is told of all work, on the event loop, e.g. to trace it. It must return quickly and raise nothing."""

    def begun(self, entry: Entry) -> None:
        """Hear that an entry begins."""
        ...

    def event(self, entry: Entry, name: str) -> None:
        """Hear what happened to an entry: ``accepted``, ``retry``, or a stage of provisioning or of a download."""
        ...

    def ended(self, entry: Entry, error: BaseException | None) -> None:
        """Hear that an entry ended, by itself or with an error."""
        ...


class Watcher(Protocol):
    """What is told of each attempt of a request, on the event loop, e.g. the request log; otherwise as `Observer`."""

    def request(self, method: str, url: str, headers: dict[str, str], body: Any, /, *, has_signed_url: bool) -> Any:
        """Hear of a request that is about to be sent; return what the other methods get. It may add headers."""
        ...

    def response(self, sent: Any, ms: float, status: int, headers: Mapping[str, str], body: bytes | None, /) -> None:
        """Hear of its answer; `body` is None for that of a file."""
        ...

    def error(self, sent: Any, ms: float, error: BaseException, /) -> None:
        """Hear that it ended without a complete answer."""
        ...


class Entry(Struct, eq=False):
    """One thing that is under way; `InFlight` explains the fields.

    As a context, it is that of which the requests in the block, and in tasks that are started there, are a part; its
    end is that of the block.
    """

    work: Work
    kind: WorkKind
    what: str
    counts: Counts
    """The counters of its run, which it increments."""
    id: str | None = None
    run_id: str | None = None
    sampler_id: str | None = None
    subject: Any = None
    """What was asked for, e.g. the body of a sample or an `Operation`, for observers."""
    endpoint: Any = None
    """The `Endpoint` that is asked, for observers."""
    encoded: Any = None
    """An operation as it is sent, `Encoded`, for observers."""
    result: Any = None
    """What came of it, e.g. a `SampleResponse`, for observers."""
    waiting_for: WaitingFor | None = None
    goal: WaitingFor = "answer"
    """What a request waits for once it has a connection."""
    attempt: int = 1
    last_status: int | None = None
    stage: str | None = None
    """The status of a deployment."""
    last_error: str | None = None
    next_try: float | None = None
    is_over: bool = False
    is_counted: bool = True
    """Whether it counts as usage; what provisioning does by itself does not."""
    task: asyncio.Task[Any] | None = None
    """The task of the call, while it lasts."""
    reserved: Counts | None = None
    """What it may still use, as far as a budget counts it."""
    outer: Entry | None = None
    began: float = msgspec.field(default_factory=monotonic)

    def __enter__(self) -> Entry:
        self.outer = CURRENT.get()
        CURRENT.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.outer is not None:
            CURRENT.set(self.outer)
            self.outer = None  # entries must not form a chain
        self.end(error)

    def end(self, error: BaseException | None = None) -> None:
        """End it; to end it again does nothing."""
        if not self.is_over:
            self.is_over = True
            self.task = None  # which refers to this
            self.work.entries.pop(self, None)
            if self.reserved is not None:
                self.release()
            for observer in self.work.observers:
                observer.ended(self, error)

    def release(self) -> None:
        """Count what it was admitted for no longer as under way, since it is counted as used or will not be."""
        if self.reserved is not None:
            self.work.reserved.add(self.reserved, -1)
            self.reserved = None

    def turn_to(self, goal: WaitingFor) -> None:
        """Wait for `goal` from now on, also while requests ask for it."""
        self.waiting_for = self.goal = goal

    def retrying(self, error: LoopsError, pause: float) -> None:
        """Record that an attempt failed, and when the next one follows."""
        self.last_error = without_quote(error)
        self.waiting_for = "retry"
        self.next_try = monotonic() + pause
        self.counts.retries += 1
        self.tell("retry")

    def trying(self, attempt: int) -> None:
        """Record the number of the attempt that begins."""
        self.attempt = attempt
        self.next_try = None
        self.waiting_for = self.goal

    def staged(self, stage: str) -> None:
        """Record the state of the deployment that it waits for."""
        if stage != self.stage and not self.is_over:
            self.stage = stage
            self.tell(stage)

    def accepted(self, id_: str) -> None:
        """Record the id under which the service has accepted it; its outcome is waited for."""
        self.id = id_
        self.turn_to("outcome")
        self.tell("accepted")

    def tell(self, event: str) -> None:
        """Tell observers what happened."""
        for observer in self.work.observers:
            observer.event(self, event)

    def shown(self, now: float) -> InFlight:
        """Return it as users see it."""
        next_try = self.next_try
        return InFlight(
            kind=self.kind,
            what=self.what,
            id=self.id,
            run_id=self.run_id,
            sampler_id=self.sampler_id,
            age=now - self.began,
            attempt=self.attempt,
            last_status=self.stage or self.last_status,
            last_error=self.last_error,
            waiting_for=self.waiting_for,
            next_try_in=None if next_try is None else max(0.0, next_try - now),
        )


class Work:
    """What one client has under way, and the event loop in which it does that.

    `clean` returns a text of the service as it may be shown, without secrets.
    """

    def __init__(self, clean: Callable[[str], str] = str) -> None:
        self.entries: dict[Entry, None] = {}
        """The oldest first."""
        self.observers: list[Observer] = []
        self.counts: dict[str | None, Counts] = {}
        """What was used, by run."""
        self.up: Callable[[], Sequence[Up]] = tuple
        """For how long what was created has been there; called in any thread."""
        self.budget: Budget | None = None
        self.reserved: Counts = Counts()
        """What calls that are under way may use."""
        self.watchers: list[Watcher] = []
        self.clean: Callable[[str], str] = clean
        self.facts: dict[str, Callable[[], str]] = {}
        """What else is worth knowing, by its name; called in any thread."""
        self.client: str = "a client without a session"
        """How dumps call the client."""
        self.on_busy: Callable[[], object] | None = None
        """Called when something begins and nothing was under way."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread_id: int | None = None
        """The event loop and its thread, while anything is under way."""
        self._timer: asyncio.TimerHandle | None = None
        self._beats_at = 0.0
        self._key = next(_numbers)
        _open[self._key] = weakref.ref(self, partial(_forget, self._key))
        for instrument in _instruments:
            instrument(self)

    def begin(self, kind: WorkKind, what: str, **fields: Any) -> Entry:
        """Begin an entry, which a ``with`` block or `Entry.end` ends."""
        entry = Entry(self, kind, what, self._counts_of(fields.get("run_id")), task=current_task(), **fields)
        self.entries[entry] = None
        if self._timer is None:
            self._start()
        for observer in self.observers:
            observer.begun(entry)
        return entry

    def within(self, kind: WorkKind, what: str, **fields: Any) -> Entry | Part:
        """Return a context for what is a part of the present entry, or else an entry of its own."""
        present = CURRENT.get()
        if present.is_over or present.work is not self:
            return self.begin(kind, what, **fields)
        return Part(present)

    def admit(self, entry: Entry, asked: Counts, *, most_completions: int = 0) -> None:
        """Check that the budget allows `asked`, and count it as under way until `entry` ends.

        `most_completions` is how many tokens it may generate.

        Raises:
            BudgetExceededError: it does not.
        """
        if self.budget is None or not entry.is_counted:
            return
        used = total_of([*self.counts.values(), self.reserved], self.up())
        check_budget(self.budget, used, asked, entry.what)
        entry.reserved = replace(asked, completion_tokens=max(asked.completion_tokens, most_completions))
        self.reserved.add(entry.reserved)

    def usage(self) -> Usage:
        """Return a snapshot of what was used; in any thread."""
        return usage_of(self.counts, self.up())

    def _counts_of(self, run_id: str | None) -> Counts:
        counts = self.counts.get(run_id)
        if counts is None:
            counts = self.counts[run_id] = Counts()
        return counts

    def all(self) -> list[Entry]:
        """Return what is under way, the oldest first; in any thread."""
        while True:
            try:
                return list(self.entries)
            except RuntimeError:  # it changed meanwhile
                continue

    @property
    def lag(self) -> float:
        """For how many seconds the event loop has not run, as far as that is known; 0.0 while nothing is under way."""
        return max(0.0, monotonic() - self._beats_at) if self._timer is not None else 0.0

    def close(self) -> None:
        """Forget everything."""
        if self._timer is not None:
            self._timer.cancel()
            self._rest()
        self.entries.clear()
        _open.pop(self._key, None)

    def _start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._wait_for_beat(self.loop)
        self.thread_id = threading.get_ident()
        if self.on_busy is not None:
            self.on_busy()

    def _wait_for_beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self._beats_at = monotonic() + BEAT_SECONDS
        self._timer = loop.call_later(BEAT_SECONDS, self._beat, loop)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        late = monotonic() - self._beats_at
        if late >= HELD_SECONDS:
            hold_warning.say(late)
        if self.entries:
            self._wait_for_beat(loop)
        else:
            self._rest()

    def _rest(self) -> None:
        self._timer = self.loop = self.thread_id = None


class Part:
    """A context for what is a part of an entry, which goes on behind it."""

    __slots__ = ("_entry", "_goal")

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._goal: WaitingFor = entry.goal

    def __enter__(self) -> Entry:
        return self._entry

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entry.goal = self._goal


_numbers: Final = itertools.count()

_instruments: Final[list[Callable[[Work], None]]] = []

_open: Final[dict[int, weakref.ref[Work]]] = {}
"""The work of every open client. No `WeakSet`: what iterates over it is not safe in a signal handler."""


def _forget(key: int, _: object) -> None:
    _open.pop(key, None)


def instrument_all(instrument: Callable[[Work], None]) -> None:
    """Call `instrument` with the work of every client, now or when it is made; e.g. to add an observer to it."""
    _instruments.append(instrument)
    for work in open_works():
        instrument(work)


def open_works() -> list[Work]:
    """Return the work of every open client, the oldest first; in any thread."""
    while True:
        try:
            found = [ref() for ref in list(_open.values())]
        except RuntimeError:  # it changed meanwhile
            continue
        return [work for work in found if work is not None]


def _nothing() -> Entry:
    work = Work()
    work.close()
    return Entry(work, "request", "nothing", Counts(), is_over=True)


NOTHING: Final = _nothing()

CURRENT: Final[ContextVar[Entry]] = ContextVar("loops_async: work", default=NOTHING)
"""The entry of which requests in this context are a part; one that is over stands for none."""

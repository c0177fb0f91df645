"""What the journal is told of the operations of one run, and what it answers in their place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import Struct

from .._journal.journal import Journal
from ..errors import ApiError, LoopsError, RemoteOpError, UnknownRequestError
from .operation import Encoded
from .poller import Decode
from .turns import Turns
from .unfinished import Part

T = TypeVar("T")


class _Failure(Struct):
    """What a `RemoteOpError` is made of."""

    message: str
    error_class: str | None
    operation_id: str


class Recording(Protocol):
    """The records of one run's operations. Those of a turn are changed by its holder only."""

    async def begin(self, encoded: Encoded[Any], parts: Sequence[Part]) -> None:
        """Record an operation that is about to be sent; complete its parts with what is recorded in its place.

        Raises:
            JournalError: it may not be sent; see `Journal.begin`.
        """
        ...

    def accepted(self, part: Part) -> None:
        """Record that a part was accepted."""
        ...

    def not_accepted(self, error: LoopsError) -> None:
        """Record that the operation of this turn was certainly not accepted."""
        ...

    async def result(self, part: Part, name: str, poll: Callable[[Decode[T]], Awaitable[T]], decode: Decode[T]) -> T:
        """Return the recorded result of a part, or that of `poll`, and record it."""
        ...


class NoRecording:
    """Records nothing."""

    async def begin(self, encoded: Encoded[Any], parts: Sequence[Part]) -> None: ...

    def accepted(self, part: Part) -> None: ...

    def not_accepted(self, error: LoopsError) -> None: ...

    async def result(self, part: Part, name: str, poll: Callable[[Decode[T]], Awaitable[T]], decode: Decode[T]) -> T:
        return await poll(decode)


class RunRecording:
    """Records the operations of a run in a journal, in the order of its turns.

    An operation that was certainly not accepted gives its place back, since the program makes the same call again, in
    this process or the next. Only what was refused keeps it: it is refused again, and what follows has the next place.
    """

    def __init__(self, journal: Journal, run_id: str, turns: Turns) -> None:
        self._journal = journal
        self._run_id = run_id
        self._turns = turns
        self._current: int | None = None
        """The place of the operation of this turn, unless it repeats an earlier one."""

    async def begin(self, encoded: Encoded[Any], parts: Sequence[Part]) -> None:
        repeats = any(part.may_be_accepted for part in parts)
        place = self._turns.place
        keys = [part.key for part in parts]
        found = await self._journal.begin(self._run_id, place, encoded.content, keys, repeats=repeats)
        self._current = found.place if found.place == place else None
        if self._current is not None:
            self._turns.place += 1
        for part, recorded in zip(parts, found.parts, strict=True):
            part.key, part.operation_id = recorded.key, recorded.operation_id
            part.outcome, part.failure = recorded.outcome, recorded.failure
            part.may_be_accepted = part.may_be_accepted or (found.is_earlier and not found.is_refused)

    def accepted(self, part: Part) -> None:
        self._journal.accepted(self._run_id, part.key, str(part.operation_id))

    def not_accepted(self, error: LoopsError) -> None:
        if self._current is None:
            return
        if isinstance(error, ApiError) and not error.retryable:
            self._journal.refused(self._run_id, self._current)
        else:
            self._journal.withdrawn(self._run_id, self._current)
            self._turns.place = self._current

    async def result(self, part: Part, name: str, poll: Callable[[Decode[T]], Awaitable[T]], decode: Decode[T]) -> T:
        if part.outcome is not None:
            return await decode(msgspec.Raw(part.outcome))
        if part.failure is not None:
            raise self._failure(name, part.failure)

        async def keep(raw: msgspec.Raw) -> T:
            result = await decode(raw)
            self._journal.done(self._run_id, part.key, bytes(raw))
            return result

        try:
            return await poll(keep)
        except RemoteOpError as error:
            failure = _Failure(str(error), error.error_class, error.operation_id)
            self._journal.failed(self._run_id, part.key, msgspec.json.encode(failure))
            raise
        except UnknownRequestError as error:
            error.add_note(
                f"The journal {self._journal.path} has it as accepted, and no outcome. To go on, begin a new journal "
                "from the last saved state: `loops journal show` names it."
            )
            raise

    def _failure(self, name: str, recorded: bytes) -> RemoteOpError:
        failure = msgspec.json.decode(recorded, type=_Failure)
        error = RemoteOpError(
            "",
            operation_id=failure.operation_id,
            operation=name,
            run_id=self._run_id,
            error_class=failure.error_class,
        )
        error.args = (failure.message,)
        return error

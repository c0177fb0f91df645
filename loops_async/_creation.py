"""Creating runs so that a lost answer never leads to two of them.

The service has no key that makes a repeated creation harmless. But a session belongs to the client that opened it, so
a run of its session that no answer named is one whose answer was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from msgspec import UNSET

from . import _retry
from .errors import LoopsError, LostAnswerError
from .types import CreateRunRequest, CreateTrainerRequest, Run

NewRun: TypeAlias = CreateRunRequest | CreateTrainerRequest
Listing: TypeAlias = Callable[[], Awaitable[list[Run]]]

SEEK_SECONDS: Final = 10.0
"""How long a run is looked for: the service may still be making it."""


class SessionRuns:
    """The runs of one session that is ours alone.

    Invariant: while the run of a lost answer is sought, nothing is under way whose run could be taken for it. So a
    creation begins only when nobody seeks, and seeking begins when every creation has been answered or lost.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._unanswered: list[NewRun] = []
        self._under_way = 0
        self._seekers = 0
        self._changed = asyncio.Event()
        self._one_seeks = asyncio.Lock()

    async def create(self, request: NewRun, post: Callable[[], Awaitable[Run]], find: Listing) -> Run:
        """Return the run that `post` makes; if its answer is lost, the one that `find` lists and nobody knows.

        Raises:
            LostAnswerError: the answer was lost, and the run was not found or could be another request's.
        """
        while self._seekers:
            await self._changed.wait()
        self._under_way += 1
        try:
            run = await post()
        except BaseException as error:
            # Cancelled under way, too: a run may come of it that nobody will claim.
            if not isinstance(error, LoopsError) or _retry.answer_was_lost(error):
                self._unanswered.append(request)
            if not isinstance(error, LoopsError) or not _retry.answer_was_lost(error):
                raise
            lost = error
            self._seekers += 1
        else:
            self._known.add(run.id)
            return run
        finally:
            self._under_way -= 1
            self._tell()
        try:
            return await self._seek(request, find, lost)
        finally:
            self._seekers -= 1
            self._tell()

    async def _seek(self, request: NewRun, find: Listing, lost: LoopsError) -> Run:
        while self._under_way:
            await self._changed.wait()
        async with self._one_seeks:
            candidates = await self._candidates(request, find)
            # Runs of equal requests are as good as each other; those of different requests cannot be told apart.
            rivals = [other for other in self._unanswered if other != request]
            if not candidates or any(_may_be(other, run) for other in rivals for run in candidates):
                raise lost_run(request, lost, candidates) from lost
            self._unanswered.remove(request)
            self._known.add(candidates[0].id)
            return candidates[0]

    async def _candidates(self, request: NewRun, find: Listing) -> list[Run]:
        async def look() -> list[Run] | None:
            listed = [run for run in await find() if run.id not in self._known and _may_be(request, run)]
            return sorted(listed, key=lambda run: run.created_at) or None

        try:
            return await _retry.until(look, seconds=SEEK_SECONDS, longest_pause=2.0) or []
        except LoopsError:
            return []

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _may_be(request: NewRun, run: Run) -> bool:
    is_named = request.name is not UNSET and request.name is not None
    return (
        run.session_id == request.session_id
        and run.base_model == request.base_model
        and (not is_named or run.name in (None, request.name))
    )


def lost_run(request: NewRun, lost: LoopsError, candidates: list[Run]) -> LostAnswerError:
    """Make the error that says what may exist and how to find it."""
    ids = tuple(run.id for run in candidates)
    found = f"It may be one of {', '.join(ids)}. " if ids else ""
    return LostAnswerError(
        f"{lost} The run may have been made all the same and cost money, so it is not asked for again. {found}List the "
        f"runs of {request.base_model} (control_plane.list_runs, or `loops runs list`), look for session "
        f"{request.session_id}, and deactivate what you do not want.",
        candidates=ids,
    )

"""Creating runs so that a lost answer never leads to two of them.

The service has no key that makes a repeated creation harmless. But a session belongs to the client that opened it, so
a run of its session that no answer named is one whose answer was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeAlias

from msgspec import UNSET

from ._http.retry import answer_was_lost, until
from .errors import LoopsError, LostAnswerError
from .types import CreateRunRequest, CreateTrainerRequest, Run

NewRun: TypeAlias = CreateRunRequest | CreateTrainerRequest
Listing: TypeAlias = Callable[[], Awaitable[list[Run]]]

SEEK_SECONDS: Final = 10.0
"""How long runs are looked for: the service may still be making them."""


class _Lost:
    """A request whose answer was lost: its run, if that was found, and those that it may be."""

    def __init__(self, request: NewRun) -> None:
        self.request = request
        self.run: Run | None = None
        self.candidates: list[Run] = []
        self.is_settled = False


class SessionRuns:
    """The runs of one session that is ours alone.

    Invariant: while the runs of lost answers are sought, nothing is under way whose run could be taken for one. So a
    creation begins only when nobody seeks, and seeking begins when every creation has been answered or lost.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._unanswered: list[NewRun] = []
        self._lost: list[_Lost] = []
        self._under_way = 0
        self._changed = asyncio.Event()
        self._one_seeks = asyncio.Lock()

    async def create(self, request: NewRun, post: Callable[[], Awaitable[Run]], find: Listing) -> Run:
        """Return the run that `post` makes; if its answer is lost, the one that `find` lists and nobody knows.

        Raises:
            LostAnswerError: the answer was lost, and the run was not found or could be another request's.
        """
        while self._lost:
            await self._changed.wait()
        self._under_way += 1
        try:
            run = await post()
            self._known.add(run.id)
            return run
        except LoopsError as error:
            if not answer_was_lost(error):
                raise
            failure, lost = error, _Lost(request)
            self._lost.append(lost)
        except asyncio.CancelledError:
            # A run may come of it that nobody will ever claim.
            self._unanswered.append(request)
            raise
        finally:
            self._under_way -= 1
            self._tell()
        try:
            await self._settle(lost, find)
        finally:
            self._lost.remove(lost)
            if lost.run is None:
                self._unanswered.append(request)
            self._tell()
        if lost.run is None:
            raise lost_run(request, failure, lost.candidates) from failure
        return lost.run

    async def _settle(self, lost: _Lost, find: Listing) -> None:
        while self._under_way:
            await self._changed.wait()
        async with self._one_seeks:
            if not lost.is_settled:
                await self._seek(find)

    async def _seek(self, find: Listing) -> None:
        """Find the runs of all lost answers at once, so that a service that is down is not waited for by each."""
        sought = list(self._lost)

        async def look() -> bool | None:
            listed = sorted(await find(), key=lambda run: run.created_at)
            for lost in sought:
                self._match(lost, listed)
            return True if all(lost.run or lost.candidates for lost in sought) else None

        with suppress(LoopsError):  # what cannot be listed is not found
            await until(look, seconds=SEEK_SECONDS, longest_pause=2.0)
        for lost in sought:
            lost.is_settled = True

    def _match(self, lost: _Lost, listed: list[Run]) -> None:
        if lost.run is not None:
            return
        candidates = [run for run in listed if run.id not in self._known and _may_be(lost.request, run)]
        rivals = [*self._unanswered, *(other.request for other in self._lost if other.run is None)]
        # Runs of equal requests are as good as each other; those of different requests cannot be told apart.
        if any(rival != lost.request and _may_be(rival, run) for rival in rivals for run in candidates):
            lost.candidates = candidates
        elif candidates:
            lost.run = candidates[0]
            self._known.add(candidates[0].id)

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

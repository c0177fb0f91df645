"""Sessions, runs and samplers that the journal has: a program that is started again gets the same ones."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Coroutine
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar

import msgspec
from msgspec.structs import replace

from .._http.retry import may_have_acted, until
from .._journal.journal import Journal
from .._journal.records import Creation
from ..control_plane import NewRun, lost_run, lost_sampler
from ..errors import LoopsError, LostAnswerError, NotFoundError, ProvisioningError
from ..types import CreateRunRequest, CreateSamplerRequest, CreateSessionRequest, Run, Sampler
from . import lost_runs
from .lost_runs import lost_run_among, may_be_sampler
from .runtime import Runtime

T = TypeVar("T", Run, Sampler)

EARLIER_START: Final = "An earlier start of this program ended before its request was answered."


class RecordedCreation(Generic[T]):
    """A creation as the journal has it. Without a journal, or at the first start, nothing is `existing`."""

    def __init__(self, journal: Journal | None, creation: Creation | None, existing: T | None) -> None:
        self._journal = journal
        self._creation = creation
        self.existing: T | None = existing

    async def kept(self, creation: Coroutine[Any, Any, T]) -> T:
        """Record what `creation` makes, or that it certainly made nothing."""
        try:
            made = await creation
        except LoopsError as error:
            if not isinstance(error, LostAnswerError) and not may_have_acted(error):
                await self.forget()
            raise
        if self._journal is not None and self._creation is not None:
            await self._journal.created(self._creation, made.id)
        return made

    async def forget(self) -> None:
        """Let the next start create it again."""
        if self._journal is not None and self._creation is not None:
            await self._journal.forget(self._creation)

    async def ready(self, wait: Awaitable[None]) -> None:
        """Wait for what exists.

        Raises:
            JournalError: it has ended.
        """
        try:
            await wait
        except ProvisioningError as error:
            if self._journal is None or self._creation is None:
                raise
            raise await self._journal.gone(self._creation, f"has ended ({error.status})") from error


class RecordedCreations:
    """The creations of one client."""

    def __init__(self, runtime: Runtime, team_id: str | None) -> None:
        self._runtime = runtime
        self._control_plane = runtime.control_plane
        self._journal = runtime.journal
        self._team_id = team_id
        self._has_restored = False

    async def run(self, request: NewRun) -> RecordedCreation[Run]:
        """Return the record of a run, which exists if an earlier process has created it."""
        if self._journal is None:
            return RecordedCreation(None, None, None)
        creation = await self._journal.creation("run", request)
        if not creation.is_earlier:
            return RecordedCreation(self._journal, creation, None)
        await self._restore_ledger(self._journal)
        if creation.id is None:
            lost = await self._lost_run(self._journal, creation, request)
            return RecordedCreation(self._journal, replace(creation, id=lost and lost.id), lost)
        run = await self._found(self._journal, creation, self._control_plane.get_run(creation.id))
        self._runtime.ledger.created(run)
        return RecordedCreation(self._journal, creation, run)

    async def sampler(self, request: CreateSamplerRequest) -> RecordedCreation[Sampler]:
        """Return the record of a sampler, which exists if an earlier process has created it.

        Raises:
            LostAnswerError: that process ended before the answer came, and there is one that may be it.
        """
        if self._journal is None:
            return RecordedCreation(None, None, None)
        creation = await self._journal.creation("sampler", request)
        if not creation.is_earlier:
            return RecordedCreation(self._journal, creation, None)
        if creation.id is None:
            await self._refuse_lost_sampler(self._journal, creation, request)
            return RecordedCreation(self._journal, creation, None)
        sampler = await self._found(self._journal, creation, self._control_plane.get_sampler(creation.id))
        self._runtime.running.add(sampler)
        return RecordedCreation(self._journal, creation, sampler)

    async def _found(self, journal: Journal, creation: Creation, found: Awaitable[T]) -> T:
        try:
            return await found
        except NotFoundError as error:
            raise await journal.gone(creation, "no longer exists") from error

    async def _restore_ledger(self, journal: Journal) -> None:
        """Tell the ledger of the runs that the journal has, once: none of them is one whose answer was lost."""
        if self._has_restored:
            return
        recorded = [each for each in await journal.creations("run") if each.is_earlier]
        if not self._has_restored:  # by another creation, meanwhile
            self._has_restored = True
            lost = (msgspec.json.decode(each.request, type=CreateRunRequest) for each in recorded if each.id is None)
            self._runtime.ledger.restore((each.id for each in recorded if each.id is not None), lost)

    async def _lost_run(self, journal: Journal, creation: Creation, request: NewRun) -> Run | None:
        """Return the run that an earlier process asked for without seeing the answer; None if there is none.

        Raises:
            LostAnswerError: there are some that may be it.
        """
        ledger = self._runtime.ledger
        if request not in ledger.unanswered:
            ledger.unanswered.append(request)
        candidates: list[Run] = []

        async def look() -> Run | None:
            nonlocal candidates
            listed = await self._control_plane.list_runs(team_id=self._team_id)
            found, candidates = lost_run_among(listed, request, ledger)
            return found

        run: Run | None = None
        since = time.time() - creation.begun
        if since < lost_runs.SEARCH_SECONDS:  # the service may still be creating it
            run = await until(look, seconds=lost_runs.SEARCH_SECONDS - since, longest_pause=2.0)
        run = run or await look()
        if run is None and candidates:
            raise lost_run(request, EARLIER_START, candidates)
        if run is None:
            ledger.unanswered.remove(request)
            return None
        await journal.created(creation, run.id)
        return run

    async def _refuse_lost_sampler(self, journal: Journal, creation: Creation, request: CreateSamplerRequest) -> None:
        known = {each.id for each in await journal.creations("sampler")}
        started = datetime.fromtimestamp(creation.begun, UTC)
        listed = await self._control_plane.list_samplers(team_id=self._team_id)
        candidates = [
            each
            for each in listed
            if each.id not in known and may_be_sampler(request, each, started) and each.status.name != "INACTIVE"
        ]
        if candidates:
            raise lost_sampler(EARLIER_START, candidates)


async def recorded_session(runtime: Runtime, request: CreateSessionRequest, create: Coroutine[Any, Any, str]) -> str:
    """Return the id of the journal's session, or of that of `create`, and record it.

    Raises:
        JournalError: the session no longer exists.
    """
    journal = runtime.journal
    if journal is None:
        return await create
    try:
        creation = await journal.creation("session", request)
        if creation.id is None:
            id_ = await create
            await journal.created(creation, id_)
            return id_
        try:
            return (await runtime.control_plane.get_session(creation.id)).id
        except NotFoundError as error:
            raise await journal.gone(creation, "no longer exists") from error
    finally:
        create.close()

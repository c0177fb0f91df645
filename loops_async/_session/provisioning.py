"""Creating runs and samplers, waiting until they are ready, and deactivating them on failure or cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar

import anyio
from msgspec import Struct
from msgspec.structs import force_setattr

from .._arguments import check_positive
from .._http.endpoint import Endpoint
from .._progress import stage_line
from .._work.registry import CURRENT, Entry
from ..control_plane import NewRun, lost_sampler
from ..errors import LoopsError, LostAnswerError, UnsupportedError
from ..types import CreateRunRequest, CreateSamplerRequest, CreateTrainerRequest, ProvisioningEvent, Run, Sampler
from .deactivation import problem_of_deactivating
from .lost_runs import find_lost_run, may_be_sampler
from .readiness import OnStatus, wait_for_trainer
from .recorded import RecordedCreation, RecordedCreations
from .requests import trainer_request
from .runtime import Runtime

T = TypeVar("T", Run, Sampler)

Stage: TypeAlias = Literal["created", "waiting", "ready", "failed", "deactivated"]

log = logging.getLogger("loops_async.provisioning")

DEACTIVATE_SECONDS: Final = 10.0
"""The longest delay of a failure or a cancellation while the new run or sampler is deactivated."""


class ProvisioningOptions(Struct, frozen=True):
    """Options for provisioning one run or sampler."""

    ready_timeout: float = 3600.0
    """Time limit for becoming ready, in seconds."""
    keep_on_failure: bool = False
    on_progress: Callable[[ProvisioningEvent], object] | None = None
    with_sampler: bool = True
    """Whether a run is created with its paired sampler."""

    def __post_init__(self) -> None:
        force_setattr(self, "ready_timeout", check_positive(self.ready_timeout, "ready_timeout"))


class ProgressReporter:
    """Reports each change of state of a run or sampler that is being provisioned, once."""

    def __init__(self, kind: Literal["run", "sampler"], options: ProvisioningOptions) -> None:
        self.kind: Literal["run", "sampler"] = kind
        self._on_progress = options.on_progress
        self._started = monotonic()
        self._entry = CURRENT.get()
        self._last: tuple[Stage, str | None] | None = None

    def report(self, created: Run | Sampler, stage: Stage, status: str | None = None) -> None:
        """Report a stage, with the status of the deployment if it is known."""
        if self._last == (stage, status):
            return
        self._last = stage, status
        self._entry.staged(status or stage)
        seconds = monotonic() - self._started
        event = ProvisioningEvent(kind=self.kind, id=created.id, stage=stage, status=status, seconds=seconds)
        if stage != "deactivated":  # `Running` logs that, since it may also happen later
            log.info("%s", stage_line(event))
        if self._on_progress is not None:
            self._on_progress(event)

    def waiting(self, created: Run | Sampler) -> Callable[[str | None], None]:
        """Return the function that reports each status during the wait for `created`."""
        return lambda status: self.report(created, "waiting", status)


class Provisioner(Protocol):
    """Provides a service client with runs and samplers."""

    def run(self, request: CreateRunRequest, options: ProvisioningOptions) -> AbstractAsyncContextManager[Run]:
        """Yield a new run whose trainer is ready; deactivate it if the wait or the block fails."""
        ...

    async def existing_run(self, run_id: str, options: ProvisioningOptions) -> Run:
        """Return a run when its trainer is ready; never deactivate it."""
        ...

    async def sampler(self, request: CreateSamplerRequest, options: ProvisioningOptions) -> Sampler:
        """Return a new sampler when it is ready; deactivate it if the wait fails."""
        ...

    async def existing_sampler(
        self, options: ProvisioningOptions, *, sampler_id: str | None, run_id: str | None
    ) -> Sampler:
        """Return a sampler, or that of a run, when it is ready; never deactivate it."""
        ...

    async def paired_sampler(self, run: Run) -> Sampler:
        """Return the sampler of a run, which is created if there is none, and may not be ready yet."""
        ...


class ServiceProvisioner:
    """Provisions runs and samplers on a service, for the session and the team of one client."""

    def __init__(self, runtime: Runtime, session_id: str, team_id: str | None) -> None:
        self._runtime = runtime
        self._control_plane = runtime.control_plane
        self._session_id = session_id
        self._team_id = team_id
        self._recorded = RecordedCreations(runtime, team_id)

    @asynccontextmanager
    async def run(self, request: CreateRunRequest, options: ProvisioningOptions) -> AsyncGenerator[Run]:
        with self._entry(f"run of {request.base_model}", request) as entry:
            progress = ProgressReporter("run", options)
            asked = request if options.with_sampler else trainer_request(request)
            recorded = await self._recorded.run(asked)
            if recorded.existing is not None:  # never deactivated: what it has learned would be lost
                entry.id = entry.run_id = recorded.existing.id
                await recorded.ready(wait_until_ready(self._runtime, recorded.existing, options, progress))
                yield recorded.existing
                return
            creation = recorded.kept(self._create_run(asked))
            search = partial(self._abandoned_run, asked)
            async with self._deactivated_on_failure(creation, options, progress, recorded, search) as run:
                entry.id = entry.run_id = run.id
                await wait_until_ready(self._runtime, run, options, progress)
                yield run

    async def existing_run(self, run_id: str, options: ProvisioningOptions) -> Run:
        with self._runtime.transport.work.begin("readiness", f"run {run_id}", id=run_id, run_id=run_id):
            run = await self._control_plane.get_run(run_id)
            await wait_until_ready(self._runtime, run, options, ProgressReporter("run", options))
            return run

    async def sampler(self, request: CreateSamplerRequest, options: ProvisioningOptions) -> Sampler:
        with self._entry(f"sampler of {request.base_model}", request) as entry:
            progress = ProgressReporter("sampler", options)
            recorded = await self._recorded.sampler(request)
            if recorded.existing is not None:
                entry.id = entry.sampler_id = recorded.existing.id
                await recorded.ready(self._wait_for_sampler(recorded.existing, options, progress))
                return recorded.existing
            creation = recorded.kept(self._create_sampler(request))
            async with self._deactivated_on_failure(creation, options, progress, recorded) as sampler:
                entry.id = entry.sampler_id = sampler.id
                await self._wait_for_sampler(sampler, options, progress)
                return sampler

    async def existing_sampler(
        self, options: ProvisioningOptions, *, sampler_id: str | None, run_id: str | None
    ) -> Sampler:
        ids = {"run_id": run_id, "sampler_id": sampler_id}
        what = f"sampler {sampler_id}" if run_id is None else f"sampler of run {run_id}"
        with self._runtime.transport.work.begin("readiness", what, id=sampler_id, **ids):
            sampler = await self._existing_sampler(sampler_id, run_id)
            await self._wait_for_sampler(sampler, options, ProgressReporter("sampler", options))
            return sampler

    async def _existing_sampler(self, sampler_id: str | None, run_id: str | None) -> Sampler:
        if run_id is None:
            return await self._control_plane.get_sampler(str(sampler_id))
        run = await self._control_plane.get_run(run_id)
        if run.sampler is None:
            raise UnsupportedError(f"run {run_id} has no paired sampler; give the `sampler_id` of another one")
        return run.sampler

    async def _wait_for_sampler(
        self, sampler: Sampler, options: ProvisioningOptions, progress: ProgressReporter
    ) -> None:
        gate = self._runtime.gate(Endpoint.of_sampler(sampler, service_url=self._runtime.settings.base_url))
        if gate is not None:
            with _failing_alone(progress.waiting(sampler)) as on_status:
                await gate.wait(options.ready_timeout, on_status)
        progress.report(sampler, "ready")

    def _entry(self, what: str, request: CreateRunRequest | CreateSamplerRequest) -> Entry:
        return self._runtime.transport.work.begin("provisioning", what, subject=request)

    async def paired_sampler(self, run: Run) -> Sampler:
        request = CreateSamplerRequest(session_id=run.session_id, run_id=run.id)
        return await self._control_plane.create_sampler(request, team_id=self._team_id)

    async def _create_run(self, request: NewRun) -> Run:
        try:
            if isinstance(request, CreateTrainerRequest):
                return await self._control_plane.create_trainer(request, team_id=self._team_id)
            return await self._control_plane.create_run(request, team_id=self._team_id)
        except LostAnswerError as lost:
            if request.session_id != self._session_id:  # other clients may create runs in that session
                raise
            return await self._find_lost_run(request, lost)

    async def _find_lost_run(self, request: NewRun, lost: LostAnswerError) -> Run:
        return await find_lost_run(
            request, lost, self._runtime.ledger, lambda: self._control_plane.list_runs(team_id=self._team_id)
        )

    async def _abandoned_run(self, request: NewRun) -> Run | None:
        """Return the run of a request that was cancelled before it was answered, if it can be found."""
        if request.session_id != self._session_id:
            return None
        with suppress(LostAnswerError):
            return await self._find_lost_run(request, LostAnswerError("a cancelled request was not answered"))
        return None

    async def _create_sampler(self, request: CreateSamplerRequest) -> Sampler:
        started = datetime.now(UTC)
        try:
            return await self._control_plane.create_sampler(request, team_id=self._team_id)
        except LostAnswerError as lost:
            # A sampler does not say which session it belongs to, so it is named, and neither taken nor deactivated.
            candidates: list[Sampler] = []
            with suppress(LoopsError):
                listed = await self._control_plane.list_samplers(team_id=self._team_id)
                candidates = [each for each in listed if may_be_sampler(request, each, started)]
            if not candidates:
                raise
            raise lost_sampler(lost.__cause__, candidates) from lost.__cause__

    @asynccontextmanager
    async def _deactivated_on_failure(
        self,
        creation: Coroutine[Any, Any, T],
        options: ProvisioningOptions,
        progress: ProgressReporter,
        recorded: RecordedCreation[T],
        search: Callable[[], Awaitable[T | None]] | None = None,
    ) -> AsyncGenerator[T]:
        """Yield the result of `creation`; deactivate it if the block fails or is cancelled.

        `search` finds what was created by a creation that is not answered in time.
        """
        task = asyncio.create_task(creation, name=f"loops_async: create a {progress.kind}")
        try:
            created = await asyncio.shield(task)
            progress.report(created, "created")
            yield created
        except BaseException as failure:
            with anyio.CancelScope(shield=True):
                abandoned = await _settle(task, progress.kind, search, failure)
                if abandoned is not None and await self._clean_up(abandoned, options, progress, failure):
                    await recorded.forget()
            raise

    async def _clean_up(
        self,
        created: Run | Sampler,
        options: ProvisioningOptions,
        progress: ProgressReporter,
        failure: BaseException,
    ) -> bool:
        """Deactivate what did not become ready, unless it is to be kept; return whether it is gone."""
        name = f"{progress.kind} {created.id}"
        # A callback that fails must not stop the cleanup.
        with suppress(BaseException):
            progress.report(created, "failed")
        if options.keep_on_failure:
            self._runtime.running.leave(created.id)
            failure.add_note(f"{name} was kept (keep_on_failure) and costs money until it is deactivated")
            return False
        problem = await problem_of_deactivating(self._control_plane, created, DEACTIVATE_SECONDS)
        if problem is not None:
            failure.add_note(f"{name} could not be deactivated and may still cost money: {problem}")
            log.warning("%s could not be deactivated and may still cost money: %s", name, problem)
            return False
        self._runtime.running.deactivated(created.id, progress.kind)
        with suppress(BaseException):
            progress.report(created, "deactivated")
        return True


@contextmanager
def _failing_alone(callback: OnStatus) -> Generator[OnStatus]:
    """Give a form of `callback` for a task that other callers share: what it raises ends this block, not that task."""
    task = asyncio.current_task()
    failures: list[BaseException] = []

    def guarded(status: str | None) -> None:
        try:
            callback(status)
        except BaseException as failure:
            if not failures and task is not None:
                failures.append(failure)
                task.cancel()

    try:
        yield guarded
    except asyncio.CancelledError:
        if not failures or task is None or task.uncancel() > 0:
            raise
        raise failures[0] from None


async def wait_until_ready(
    runtime: Runtime, run: Run, options: ProvisioningOptions, progress: ProgressReporter
) -> None:
    """Wait until the trainer of a run is ready."""
    trainer = Endpoint.of_run(run, ready_timeout=options.ready_timeout)
    await wait_for_trainer(trainer, runtime.transport, runtime.control_plane, on_status=progress.waiting(run))
    progress.report(run, "ready")


async def _settle(
    creation: asyncio.Task[T],
    kind: str,
    search: Callable[[], Awaitable[T | None]] | None,
    failure: BaseException,
) -> T | None:
    """Wait for a creation whose caller has failed or was cancelled, since what it creates costs money all the same.

    Returns:
        What it created, None if that is nothing, or nothing that can be found.
    """
    await asyncio.wait([creation], timeout=DEACTIVATE_SECONDS)
    if creation.done() and not creation.cancelled():
        error = creation.exception()
        if isinstance(error, LostAnswerError) and error is not failure:
            log.warning("%s", error)
        return creation.result() if error is None else None
    creation.cancel()
    await asyncio.wait([creation])
    found = None if search is None else await search()
    if found is None:
        log.warning("a cancelled creation was not answered in time: an unused %s may exist and cost money", kind)
    return found

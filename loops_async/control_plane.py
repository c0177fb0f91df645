"""The control plane, one method for each route."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from functools import cache
from typing import Annotated, Any, Final, TypeAlias, TypeVar
from urllib.parse import urlencode

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ._arguments import check, check_request
from ._copies import SameWhenCopied
from ._http.messages import Request
from ._http.retry import CREATION, READ, Call, may_have_acted, retry
from ._http.transport import Transport
from ._other_names import KnowsOtherNames
from ._running import Running
from .errors import ConfigError, InputError, LoopsError, LostAnswerError, NotFoundError
from .protocol import CheckpointUri, encode, segment
from .types import (
    Checkpoint,
    CheckpointFilesResponse,
    CheckpointSource,
    CreateRunRequest,
    CreateSamplerRequest,
    CreateSessionRequest,
    CreateTrainerRequest,
    Deactivated,
    DebugArchiveFilesResponse,
    DeployCheckpointsRequest,
    DeployedModel,
    Deployment,
    DeploymentMetrics,
    LogLevel,
    LogLine,
    Run,
    Sampler,
    Scope,
    ServerCapabilities,
    Session,
    SortDirection,
    Status,
    Team,
    UseCase,
    UserConfig,
)

__all__ = ["ControlPlane"]

T = TypeVar("T")

NewRun: TypeAlias = CreateRunRequest | CreateTrainerRequest

CREATE_SECONDS: Final = 300.0
READ_SECONDS: Final = 60.0
STATUS_SECONDS: Final = 30.0

CALLS_AT_ONCE: Final = 64
"""Requests in flight at once; further callers wait."""

LOG_WINDOW_MILLIS: Final = 7 * 24 * 3600 * 1000

_Count = Annotated[int, Meta(ge=1)]
_Offset = Annotated[int, Meta(ge=0)]
_PageSize = Annotated[int, Meta(ge=1, le=1000)]


class _Scoped(Struct, kw_only=True):
    scope: Scope | None = None


class _RunFilter(_Scoped, kw_only=True):
    run_id: str | None = None
    base_model: str | None = None


class _FilesPage(Struct, kw_only=True):
    page_size: _Count
    page_token: _Offset


class _Validated(Struct):
    id: str | None = None


class _ArchivePage(Struct, kw_only=True):
    page_size: _PageSize
    page_token: str | None


class _CapabilityFilter(Struct, kw_only=True):
    model: str | None
    use_case: UseCase | None
    max_seq_len: _Count | None


class _MetricsQuery(Struct, kw_only=True):
    start_epoch_millis: _Offset | None
    end_epoch_millis: _Offset | None
    step_seconds: _Count | None
    time_divisor_seconds: _Count | None


class _LogQuery(Struct, kw_only=True):
    start_epoch_millis: _Offset | None
    end_epoch_millis: _Offset | None
    direction: SortDirection | None
    limit: Annotated[int, Meta(ge=1, le=1000)] | None
    min_level: LogLevel | None


class _UserConfigPatch(Struct, kw_only=True):
    trainer_accelerator_priority: Annotated[list[str], Meta(min_length=1)] | None | UnsetType = UNSET
    sampler_accelerator_priority: Annotated[list[str], Meta(min_length=1)] | None | UnsetType = UNSET


class _ModelDeployment(Struct):
    status: Status | str | None = None


class ControlPlane(SameWhenCopied, KnowsOtherNames):
    """The REST API under ``/v1/loops``, typed.

    Any number of calls may be made concurrently; at most 64 requests are in flight at once. A call that is safe to
    repeat is retried when the connection breaks or the service answers 408, 429, 502, 503 or 504, with growing pauses
    or after its ``Retry-After``. A call that creates a run or a sampler or deploys a model is retried only when the
    service certainly did not act on it, since it would cost money twice.

    With `team_id`, the route of that team is used; without it, the organization's.

    Example:
        ::

            runs = await service.control_plane.list_runs(base_model="Qwen/Qwen3-0.6B")
    """

    def __init__(self) -> None:
        raise TypeError("a control plane is created by a ServiceClient: use `ServiceClient.control_plane`")

    def _set_up(self, transport: Transport, base_url: str, ledger: RunLedger, running: Running) -> None:
        self._transport = transport
        self._ledger = ledger
        self._running = running
        self._root = f"{base_url}/v1"
        self._loops = f"{self._root}/loops"
        self._slots = asyncio.Semaphore(CALLS_AT_ONCE)

    def __repr__(self) -> str:
        return f"<ControlPlane at {self._loops}>"

    # --- sessions ---

    async def create_session(self, *, training_project_id: str | None = None, team_id: str | None = None) -> Session:
        """Create a session, in the given project or the default one."""
        body = CreateSessionRequest(training_project_id=UNSET if training_project_id is None else training_project_id)
        url = f"{self._team(team_id)}/sessions"
        # A session costs nothing, so it does no harm if a retry creates a second one.
        what = "create a session"
        return await self._post(url, body, Session, what, within="session", timeout=CREATE_SECONDS)

    async def get_session(self, session_id: str) -> Session:
        """Return a session."""
        url = f"{self._loops}/sessions/{_id(session_id, 'session_id')}"
        return await self._get(url, Session, f"get session {session_id}", within="session")

    # --- runs ---

    async def create_run(self, request: CreateRunRequest, *, team_id: str | None = None) -> Run:
        """Create a run: a trainer and its paired sampler. Neither is ready when this returns.

        Raises:
            InputError: a field of `request` is invalid; nothing was sent.
            LostAnswerError: the answer was lost. The run may exist; `ServiceClient.provision_run` searches for it.
        """
        return await self._create_run(request, CreateRunRequest, "runs", team_id)

    async def create_trainer(self, request: CreateTrainerRequest, *, team_id: str | None = None) -> Run:
        """Create a run without a sampler; newer services only. Errors are those of `create_run`."""
        return await self._create_run(request, CreateTrainerRequest, "trainers", team_id)

    async def list_runs(
        self,
        *,
        run_id: str | None = None,
        base_model: str | None = None,
        scope: Scope | None = None,
        team_id: str | None = None,
    ) -> list[Run]:
        """Return the runs that match all given filters."""
        query = _RunFilter(run_id=run_id, base_model=base_model, scope=scope)
        return await self._get(f"{self._team(team_id)}/runs", list[Run], "list runs", query, within="runs")

    async def get_run(self, run_id: str) -> Run:
        """Return a run."""
        return await self._get(f"{self._loops}/runs/{_id(run_id, 'run_id')}", Run, f"get run {run_id}", within="run")

    async def deactivate_run(self, run_id: str) -> Deactivated:
        """Deactivate a run and its paired sampler; newer services only. Repeating the call is harmless."""
        url = f"{self._loops}/runs/{_id(run_id, 'run_id')}/deactivate"
        deactivated = await self._post(url, {}, Deactivated, f"deactivate run {run_id}")
        self._running.deactivated(run_id, "run")
        return deactivated

    # --- samplers ---

    async def create_sampler(self, request: CreateSamplerRequest, *, team_id: str | None = None) -> Sampler:
        """Create a sampler: of a base model, of a checkpoint, or paired with a run. It is not ready when this returns.

        Raises:
            InputError: a field of `request` is invalid; nothing was sent.
            LostAnswerError: the answer was lost, and `request` names no run. The sampler may exist.
        """
        request = check_request(request, CreateSamplerRequest)
        if request.model_path is not None:
            CheckpointUri.parse(request.model_path, kind="sampler_weights", path="model_path")
        is_harmless = request.run_id is not UNSET and request.run_id is not None
        try:
            sampler = await self._post(
                f"{self._team(team_id)}/samplers",
                request,
                Sampler,
                f"create a sampler in session {request.session_id}",
                within="sampler",
                timeout=CREATE_SECONDS,
                call=READ if is_harmless else CREATION,
            )
        except LoopsError as error:
            if is_harmless or not may_have_acted(error):
                raise
            raise lost_sampler(error, []) from error
        if not is_harmless:  # a paired one ends with its run
            self._running.add(sampler)
        return sampler

    async def list_samplers(self, *, scope: Scope | None = None, team_id: str | None = None) -> list[Sampler]:
        """Return all samplers, the newest first."""
        url = f"{self._team(team_id)}/samplers"
        return await self._get(url, list[Sampler], "list samplers", _Scoped(scope=scope), within="samplers")

    async def get_sampler(self, sampler_id: str) -> Sampler:
        """Return a sampler."""
        url = f"{self._loops}/samplers/{_id(sampler_id, 'sampler_id')}"
        return await self._get(url, Sampler, f"get sampler {sampler_id}", within="sampler")

    async def deactivate_sampler(self, sampler_id: str) -> Deactivated:
        """Deactivate a sampler that is not paired with a run; newer services only. Repeating the call is harmless."""
        url = f"{self._loops}/samplers/{_id(sampler_id, 'sampler_id')}/deactivate"
        deactivated = await self._post(url, {}, Deactivated, f"deactivate sampler {sampler_id}")
        self._running.deactivated(sampler_id, "sampler")
        return deactivated

    async def get_model_deployment_status(self, model_id: str, deployment_id: str) -> str | None:
        """Return the state of a sampler's deployment, e.g. ``ACTIVE``."""
        url = f"{self._root}/models/{_id(model_id, 'model_id')}/deployments/{_id(deployment_id, 'deployment_id')}"
        what = f"get the status of deployment {deployment_id}"
        answer = await self._get(url, _ModelDeployment, what, timeout=STATUS_SECONDS)
        return answer.status.name if isinstance(answer.status, Status) else answer.status

    # --- checkpoints ---

    async def list_checkpoints(
        self, *, run_id: str | None = None, base_model: str | None = None, checkpoint_path: str | None = None
    ) -> list[Checkpoint]:
        """Return the checkpoints of a run, of a base model, or at a path; exactly one filter must be given."""
        given = {"run_id": run_id, "base_model": base_model, "checkpoint_path": checkpoint_path}
        query = {name: value for name, value in given.items() if value is not None}
        if len(query) != 1:
            raise InputError("run_id", f"give exactly one of {', '.join(given)}; got {query or 'none'}")
        if checkpoint_path is not None:
            CheckpointUri.parse(checkpoint_path, path="checkpoint_path")
        try:
            url = f"{self._loops}/checkpoints"
            return await self._get(url, list[Checkpoint], "list checkpoints", query, within="checkpoints")
        except NotFoundError:
            if checkpoint_path is None:
                raise
            return []

    async def validate_checkpoint(self, checkpoint_path: str, *, run_id: str | None = None) -> str | None:
        """Raise `BadRequestError` unless a sampler can load the checkpoint at this ``bt://`` path.

        `run_id` names the run whose sampler will load it; the service then compares their LoRA settings, too. Returns
        the id of the checkpoint that has this path now, which the embedded service tells, else None.
        """
        CheckpointUri.parse(checkpoint_path, kind="sampler_weights", path="checkpoint_path")
        body = {"checkpoint_path": checkpoint_path} | ({} if run_id is None else {"run_id": run_id})
        url = f"{self._loops}/checkpoints/validate"
        return (await self._post(url, body, _Validated, f"validate {checkpoint_path}")).id

    async def get_checkpoint_files(
        self, checkpoint_id: str, *, page_size: int = 1000, page_token: int = 0
    ) -> CheckpointFilesResponse:
        """Return one page of a checkpoint's files; `page_token` is an offset."""
        url = f"{self._loops}/checkpoints/{_id(checkpoint_id, 'checkpoint_id')}/files"
        query = _FilesPage(page_size=page_size, page_token=page_token)
        return await self._get(url, CheckpointFilesResponse, f"list the files of checkpoint {checkpoint_id}", query)

    async def get_checkpoint_source(self, checkpoint_id: str) -> CheckpointSource:
        """Return where a checkpoint's files are; newer services only."""
        url = f"{self._loops}/checkpoints/{_id(checkpoint_id, 'checkpoint_id')}/source"
        return await self._get(url, CheckpointSource, f"get the source of checkpoint {checkpoint_id}", within="source")

    async def deploy_checkpoints(self, request: DeployCheckpointsRequest) -> DeployedModel:
        """Create a model from sampler checkpoints of one team, and deploy it; newer services only.

        Raises:
            InputError: a field of `request` is invalid; nothing was sent.
            LostAnswerError: the answer was lost. The model may exist.
        """
        request = check_request(request, DeployCheckpointsRequest)
        what = f"deploy {len(request.checkpoint_ids)} checkpoints as {request.model_name}"
        url = f"{self._loops}/checkpoints/deploy"
        try:
            return await self._post(url, request, DeployedModel, what, timeout=CREATE_SECONDS, call=CREATION)
        except LoopsError as error:
            if not may_have_acted(error):
                raise
            raise LostAnswerError(
                f"{error} The model may still have been deployed, so the request was not repeated. Look for "
                f"{request.model_name!r} among the workspace's models."
            ) from error

    # --- capabilities, preferences and teams ---

    async def get_capabilities(
        self, *, model: str | None = None, use_case: UseCase | None = None, max_seq_len: int | None = None
    ) -> ServerCapabilities:
        """Return the base models that the service supports; the filters are for newer services."""
        query = _CapabilityFilter(model=model, use_case=use_case, max_seq_len=max_seq_len)
        return await self._get(f"{self._loops}/capabilities", ServerCapabilities, "get capabilities", query)

    async def get_user_config(self) -> UserConfig:
        """Return your preferences."""
        return await self._get(f"{self._loops}/user_config", UserConfig, "get the user config", within="user_config")

    async def update_user_config(
        self,
        *,
        trainer_accelerator_priority: list[str] | None | UnsetType = UNSET,
        sampler_accelerator_priority: list[str] | None | UnsetType = UNSET,
    ) -> UserConfig:
        """Change your preferences, and return all of them; None clears one, and an omitted one keeps its value."""
        patch = check(
            _UserConfigPatch(
                trainer_accelerator_priority=trainer_accelerator_priority,
                sampler_accelerator_priority=sampler_accelerator_priority,
            )
        )
        url = f"{self._loops}/user_config"
        return await self._call("PATCH", url, UserConfig, "change the user config", patch, within="user_config")

    async def list_teams(self) -> list[Team]:
        """Return the organization's teams."""
        return await self._get(f"{self._root}/teams", list[Team], "list teams", within="teams")

    # --- deployments of trainers ---

    async def list_deployments(self, *, scope: Scope | None = None) -> list[Deployment]:
        """Return the deployments of trainers, in all states."""
        url = f"{self._loops}/deployments"
        return await self._get(url, list[Deployment], "list deployments", _Scoped(scope=scope), within="deployments")

    async def get_deployment(self, deployment_id: str) -> Deployment:
        """Return a trainer's deployment."""
        url = self._deployment(deployment_id)
        return await self._get(url, Deployment, f"get deployment {deployment_id}", within="deployment")

    async def deactivate_deployment(self, deployment_id: str) -> Deactivated:
        """Deactivate a trainer's deployment. Repeating the call is harmless."""
        url = f"{self._deployment(deployment_id)}/deactivate"
        deactivated = await self._post(url, {}, Deactivated, f"deactivate deployment {deployment_id}")
        self._running.deployment_deactivated(deployment_id)
        return deactivated

    async def get_deployment_metrics(
        self,
        deployment_id: str,
        *,
        start_epoch_millis: int | None = None,
        end_epoch_millis: int | None = None,
        step_seconds: int | None = None,
        time_divisor_seconds: int | None = None,
    ) -> DeploymentMetrics:
        """Return the metrics of a deployment, with a value every `step_seconds`."""
        query = check(
            _MetricsQuery(
                start_epoch_millis=start_epoch_millis,
                end_epoch_millis=end_epoch_millis,
                step_seconds=step_seconds,
                time_divisor_seconds=time_divisor_seconds,
            )
        )
        _check_window(start_epoch_millis, end_epoch_millis)
        url = f"{self._deployment(deployment_id)}/metrics"
        what = f"get the metrics of deployment {deployment_id}"
        return await self._post(url, _without_none(query), DeploymentMetrics, what, within="metrics")

    async def get_deployment_logs(
        self,
        deployment_id: str,
        *,
        start_epoch_millis: int | None = None,
        end_epoch_millis: int | None = None,
        direction: SortDirection | None = None,
        limit: int | None = None,
        min_level: LogLevel | None = None,
    ) -> list[LogLine]:
        """Return lines of a deployment's log: of the last 30 minutes, or of a given window of at most 7 days.

        Args:
            deployment_id: the deployment.
            start_epoch_millis: the start of the window, in milliseconds since 1970.
            end_epoch_millis: the end of the window, in the same unit.
            direction: ``asc`` returns the oldest line first.
            limit: the largest number of lines, 1 to 1000; the service's default is 500.
            min_level: leave out less serious lines, and those without a level.
        """
        query = _LogQuery(
            start_epoch_millis=start_epoch_millis,
            end_epoch_millis=end_epoch_millis,
            direction=direction,
            limit=limit,
            min_level=min_level,
        )
        _check_window(start_epoch_millis, end_epoch_millis, longest=LOG_WINDOW_MILLIS)
        url = f"{self._deployment(deployment_id)}/logs"
        return await self._get(url, list[LogLine], f"get the logs of deployment {deployment_id}", query, within="logs")

    async def get_debug_archive_files(
        self, deployment_id: str, *, page_size: int = 1000, page_token: str | None = None
    ) -> DebugArchiveFilesResponse:
        """Return one page of the debug files of a failed deployment; newer services only."""
        query = _ArchivePage(page_size=page_size, page_token=page_token)
        url = f"{self._deployment(deployment_id)}/debug_archive/files"
        what = f"list the debug archive of deployment {deployment_id}"
        return await self._get(url, DebugArchiveFilesResponse, what, query)

    # --- internals ---

    async def _create_run(self, request: NewRun, kind: type[NewRun], route: str, team_id: str | None) -> Run:
        request = check_request(request, kind)
        if request.path is not None:
            CheckpointUri.parse(request.path, kind="weights")
        url = f"{self._team(team_id)}/{route}"
        what = f"create a run of {request.base_model} in session {request.session_id}"
        post = self._post(url, request, Run, what, within="run", timeout=CREATE_SECONDS, call=CREATION)
        return await self._ledger.record(request, post)

    def _team(self, team_id: str | None) -> str:
        return self._loops if team_id is None else f"{self._root}/teams/{_id(team_id, 'team_id')}/loops"

    def _deployment(self, deployment_id: str) -> str:
        return f"{self._loops}/deployments/{_id(deployment_id, 'deployment_id')}"

    async def _get(
        self, url: str, kind: type[T], what: str, query: Struct | dict[str, str] | None = None, **others: Any
    ) -> T:
        given = _without_none(check(query)) if isinstance(query, Struct) else query
        return await self._call("GET", f"{url}?{urlencode(given)}" if given else url, kind, what, None, **others)

    async def _post(self, url: str, body: object, kind: type[T], what: str, **others: Any) -> T:
        return await self._call("POST", url, kind, what, body, **others)

    async def _call(
        self,
        method: str,
        url: str,
        kind: type[T],
        what: str,
        body: object,
        *,
        within: str | None = None,
        timeout: float = READ_SECONDS,
        call: Call = READ,
    ) -> T:
        """Return the answer's body, or only its field `within`."""
        encoded = None if body is None else encode(body)
        # A connection that was idle may break under a request, and then it is not known whether it was executed.
        request = Request(
            method=method, url=url, what=what, body=encoded, timeout=timeout, new_connection=call is CREATION
        )

        hashable: Any = kind  # every type is, but mypy does not know that
        sent = kind if within is None else _envelope(within, hashable)

        async def fetch() -> T:
            entry.waiting_for = "admission"
            async with self._slots:
                body: Any = await self._transport.fetch(request, sent)
            found: T = body if within is None else getattr(body, within)
            return found

        with self._transport.work.within("request", what) as entry:
            return await retry(fetch, call, what=what, budget=self._transport.retry_budget)


def control_plane(transport: Transport, base_url: str, ledger: RunLedger, running: Running) -> ControlPlane:
    """Return the control plane of the service at `base_url`."""
    plane = ControlPlane.__new__(ControlPlane)
    # Our constructor.
    plane._set_up(transport, base_url, ledger, running)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    return plane


class RunLedger:
    """The runs that this client created, and its requests to create one whose answer is missing.

    A run of the session that is not in `known` was created by a request whose answer was lost or is still in flight:
    see `_session.lost_runs`.
    """

    def __init__(self, running: Running) -> None:
        self.known: set[str] = set()
        self.in_flight: list[NewRun] = []
        self.unanswered: list[NewRun] = []
        """Requests whose answer was lost, or whose caller was cancelled before the answer came."""
        self._running = running

    async def record(self, request: NewRun, creation: Awaitable[Run]) -> Run:
        """Record the outcome of `creation`, which sends `request`, and return its run.

        Raises:
            LostAnswerError: the answer was lost.
        """
        self.in_flight.append(request)
        try:
            run = await creation
        except LoopsError as error:
            if not may_have_acted(error):
                raise
            self.unanswered.append(request)
            raise lost_run(request, error, []) from error
        except asyncio.CancelledError:
            self.unanswered.append(request)
            raise
        finally:
            self.in_flight.remove(request)
        self.created(run)
        return run

    def restore(self, known: Iterable[str], unanswered: Iterable[NewRun]) -> None:
        """Add what an earlier process has created, or has asked for without an answer."""
        self.known.update(known)
        self.unanswered += unanswered

    def resolve(self, request: NewRun, run: Run) -> None:
        """Record that an unanswered request created this run."""
        self.unanswered.remove(request)
        self.created(run)

    def created(self, run: Run) -> None:
        """Record a run that this client created, in this process or an earlier one."""
        self.known.add(run.id)
        self._running.add(run)


def lost_run(request: NewRun, cause: object, candidates: list[Run]) -> LostAnswerError:
    """Return the error that says which run may exist and how to find it."""
    ids = tuple(run.id for run in candidates)
    found = f"It may be one of {', '.join(ids)}. " if ids else ""
    return LostAnswerError(
        f"{cause} The run may have been made all the same and cost money, so the request was not repeated. {found}List "
        f"the runs of {request.base_model} (control_plane.list_runs, or `loops runs list`), look for session "
        f"{request.session_id}, and deactivate those that you do not need.",
        candidates=ids,
    )


def lost_sampler(cause: object, candidates: list[Sampler]) -> LostAnswerError:
    """Return the error that says which sampler may exist and how to find it."""
    ids = tuple(sampler.id for sampler in candidates)
    found = f"It may be one of {', '.join(ids)}. " if ids else ""
    return LostAnswerError(
        f"{cause} The sampler may have been made all the same and cost money, so the request was not repeated. {found}"
        "List the samplers, the newest first (control_plane.list_samplers, or `loops samplers list`), and deactivate "
        "those that you do not need.",
        candidates=ids,
    )


async def resolve_team(control_plane: ControlPlane, team: str) -> str:
    """Return the id of the team of this name or id.

    Raises:
        ConfigError: there is no such team.
    """
    teams = await control_plane.list_teams()
    for each in teams:
        if team in (each.id, each.name):
            return each.id
    names = ", ".join(sorted(each.name for each in teams))
    raise ConfigError(f"there is no team {team!r}; known teams: {names or 'none'}")


@cache
def _envelope(name: str, kind: Any) -> type[Struct]:
    return msgspec.defstruct("Envelope", [(name, kind)])


def _without_none(query: Struct) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(query)
    return {name: value for name, value in fields.items() if value is not None}


def _check_window(start: int | None, end: int | None, *, longest: int | None = None) -> None:
    if start is None or end is None:
        return
    if start >= end:
        raise InputError("start_epoch_millis", f"must be before end_epoch_millis={end}; got {start}")
    if longest is not None and end - start > longest:
        raise InputError("start_epoch_millis", f"must be at most 7 days before end_epoch_millis={end}; got {start}")


def _id(value: str, path: str) -> str:
    # Escaping does not change dots, and a segment "." or ".." of a URL would lead to another route.
    if not isinstance(value, str) or value in ("", ".", ".."):
        raise InputError(path, f"must be a non-empty string that is not '.' or '..'; got {value!r}")
    return segment(value)

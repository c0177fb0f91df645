"""The control plane, one coroutine for each route."""

from __future__ import annotations

from typing import Any, TypeVar
from urllib.parse import urlencode

import msgspec
from msgspec import UNSET, Struct, UnsetType

from . import _retry
from ._inputs import check
from ._transport import Transport
from .errors import InputError
from .protocol import CheckpointUri, segment
from .types import (
    Checkpoint,
    CheckpointFilesResponse,
    CreateRunRequest,
    CreateSamplerRequest,
    CreateSessionRequest,
    Deployment,
    Run,
    Sampler,
    ServerCapabilities,
    Session,
    Status,
)

__all__ = ["ControlPlane"]

T = TypeVar("T")

CREATE_SECONDS = 300.0
READ_SECONDS = 60.0


class _SessionBody(Struct):
    session: Session


class _RunBody(Struct):
    run: Run


class _RunsBody(Struct):
    runs: list[Run]


class _SamplerBody(Struct):
    sampler: Sampler


class _SamplersBody(Struct):
    samplers: list[Sampler]


class _CheckpointsBody(Struct):
    checkpoints: list[Checkpoint]


class _DeploymentBody(Struct):
    deployment: Deployment


class _DeploymentsBody(Struct):
    deployments: list[Deployment]


class _ModelDeployment(Struct):
    status: Status | str | None = None


class ControlPlane:
    """The REST API under ``/v1/loops``, typed.

    Reading is tried again (four times, with growing pauses) when the connection breaks or the service says 429, 502,
    503 or 504. Creating a run or sampler is not, since it costs money twice.

    Example:
        ::

            runs = await service.control_plane.list_runs(base_model="Qwen/Qwen3-0.6B")
    """

    def __init__(self, transport: Transport, base_url: str) -> None:
        self._transport = transport
        self._root = base_url
        self._loops = f"{base_url}/v1/loops"

    # --- sessions ---

    async def create_session(self, *, training_project_id: str | None = None) -> Session:
        """Create a session, in the given project or the organization's default one."""
        body = CreateSessionRequest(training_project_id=UNSET if training_project_id is None else training_project_id)

        async def create() -> Session:
            answer = await self._post("/sessions", body, _SessionBody, "create a session")
            return answer.session

        # A session costs nothing, so one that was made without our knowing does no harm.
        return await _retry.retrying(create, _retry.CONTROL, what="no session yet")

    async def get_session(self, session_id: str) -> Session:
        """Return a session."""
        path = f"/sessions/{_id(session_id, 'session_id')}"
        return (await self._get(path, _SessionBody, f"get session {session_id}")).session

    # --- runs ---

    async def create_run(self, request: CreateRunRequest) -> Run:
        """Create a run: a trainer and its paired sampler. Neither is ready yet.

        Raises:
            InputError: a field of `request` breaks its rule; nothing was sent.
            TransportError: the answer was lost. A run may have been made: look for it with `list_runs`.
        """
        check(request)
        if request.path is not None:
            CheckpointUri.parse(request.path, kind="weights")
        what = f"create a run of {request.base_model} in session {request.session_id}"
        answer = await _retry.retrying(
            lambda: self._post("/runs", request, _RunBody, what),
            _retry.CONTROL,
            what="no run yet",
            when=_retry.was_not_sent,
        )
        return answer.run

    async def list_runs(self, *, run_id: str | None = None, base_model: str | None = None) -> list[Run]:
        """Return the runs that match every given filter."""
        answer = await self._get("/runs", _RunsBody, "list runs", run_id=run_id, base_model=base_model)
        return answer.runs

    async def get_run(self, run_id: str) -> Run:
        """Return a run."""
        return (await self._get(f"/runs/{_id(run_id, 'run_id')}", _RunBody, f"get run {run_id}")).run

    # --- samplers ---

    async def create_sampler(self, request: CreateSamplerRequest) -> Sampler:
        """Create a standalone sampler. It is not ready yet."""
        check(request)
        if request.model_path is not None:
            CheckpointUri.parse(request.model_path, kind="sampler_weights", path="model_path")
        what = f"create a sampler in session {request.session_id}"
        answer = await _retry.retrying(
            lambda: self._post("/samplers", request, _SamplerBody, what),
            _retry.CONTROL,
            what="no sampler yet",
            when=_retry.was_not_sent,
        )
        return answer.sampler

    async def list_samplers(self) -> list[Sampler]:
        """Return all samplers, the newest first."""
        return (await self._get("/samplers", _SamplersBody, "list samplers")).samplers

    async def get_sampler(self, sampler_id: str) -> Sampler:
        """Return a sampler."""
        path = f"/samplers/{_id(sampler_id, 'sampler_id')}"
        return (await self._get(path, _SamplerBody, f"get sampler {sampler_id}")).sampler

    async def get_model_deployment_status(self, model_id: str, deployment_id: str) -> str | None:
        """Return the state of a sampler's deployment, such as ``ACTIVE``."""
        path = f"{self._root}/v1/models/{_id(model_id, 'model_id')}/deployments/{_id(deployment_id, 'deployment_id')}"
        what = f"get the status of deployment {deployment_id}"
        answer = await self._transport.get(path, _ModelDeployment, what=what, timeout=30.0)
        return answer.status.name if isinstance(answer.status, Status) else answer.status

    # --- checkpoints ---

    async def list_checkpoints(
        self, *, run_id: str | None = None, base_model: str | None = None, checkpoint_path: str | None = None
    ) -> list[Checkpoint]:
        """Return the checkpoints of a run, of a base model, or at a path; exactly one filter must be given."""
        given = {"run_id": run_id, "base_model": base_model, "checkpoint_path": checkpoint_path}
        chosen = [name for name, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise InputError(
                "list_checkpoints", f"give exactly one of run_id, base_model, checkpoint_path; got {chosen or 'none'}"
            )
        answer = await self._get("/checkpoints", _CheckpointsBody, "list checkpoints", **given)
        return answer.checkpoints

    async def validate_checkpoint(self, checkpoint_path: str) -> None:
        """Raise `BadRequestError` unless a sampler can load the checkpoint at this ``bt://`` path."""
        CheckpointUri.parse(checkpoint_path, kind="sampler_weights", path="checkpoint_path")
        body = {"checkpoint_path": checkpoint_path}

        async def validate() -> None:
            await self._post("/checkpoints/validate", body, msgspec.Raw, f"validate {checkpoint_path}")

        await _retry.retrying(validate, _retry.CONTROL, what="not validated yet")

    async def get_checkpoint_files(
        self, checkpoint_id: str, *, page_size: int = 1000, page_token: int = 0
    ) -> CheckpointFilesResponse:
        """Return one page of a checkpoint's files; `page_token` is an offset."""
        if page_size < 1:
            raise InputError("page_size", f"must be at least 1; got {page_size}")
        if page_token < 0:
            raise InputError("page_token", f"must be at least 0; got {page_token}")
        path = f"/checkpoints/{_id(checkpoint_id, 'checkpoint_id')}/files"
        what = f"list the files of checkpoint {checkpoint_id}"
        return await self._get(path, CheckpointFilesResponse, what, page_size=page_size, page_token=page_token)

    # --- capabilities and deployments ---

    async def get_capabilities(self) -> ServerCapabilities:
        """Return the base models that the service supports."""
        return await self._get("/capabilities", ServerCapabilities, "get capabilities")

    async def list_deployments(self) -> list[Deployment]:
        """Return the deployments of trainers, in all states."""
        return (await self._get("/deployments", _DeploymentsBody, "list deployments")).deployments

    async def get_deployment(self, deployment_id: str) -> Deployment:
        """Return a trainer's deployment."""
        path = f"/deployments/{_id(deployment_id, 'deployment_id')}"
        return (await self._get(path, _DeploymentBody, f"get deployment {deployment_id}")).deployment

    async def deactivate_deployment(self, deployment_id: str) -> None:
        """Shut a trainer's deployment down; doing it twice is harmless."""
        path = f"/deployments/{_id(deployment_id, 'deployment_id')}/deactivate"

        async def deactivate() -> None:
            await self._post(path, {}, msgspec.Raw, f"deactivate deployment {deployment_id}")

        await _retry.retrying(deactivate, _retry.CONTROL, what="not deactivated yet")

    async def _get(self, path: str, kind: type[T], what: str, **query: str | int | UnsetType | None) -> T:
        given = {name: value for name, value in query.items() if value is not None and value is not UNSET}
        url = f"{self._loops}{path}" + (f"?{urlencode(given)}" if given else "")
        return await _retry.retrying(
            lambda: self._transport.get(url, kind, what=what, timeout=READ_SECONDS), _retry.CONTROL, what=what
        )

    async def _post(self, path: str, body: Any, kind: type[T], what: str) -> T:
        return await self._transport.post(f"{self._loops}{path}", body, kind, what=what, timeout=CREATE_SECONDS)


def _id(value: str, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(path, f"must be a non-empty string; got {value!r}")
    return segment(value)

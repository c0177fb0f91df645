"""The control plane: sessions, runs, samplers, deployments, checkpoints. Source: control-plane reference 2."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from aiohttp import web

from loops_async import types
from loops_async.errors import InputError
from loops_async.protocol import CheckpointUri

from .files import Files
from .records import CheckpointRecord
from .registry import Registry
from .web import HttpError, decode, invalid, json_answer

__all__ = ["ROOT", "ControlPlane"]

ROOT = "/v1/loops"

_SESSION = msgspec.json.Decoder(types.CreateSessionRequest)
_RUN = msgspec.json.Decoder(types.CreateRunRequest)
_SAMPLER = msgspec.json.Decoder(types.CreateSamplerRequest)


class _Validate(msgspec.Struct):
    checkpoint_path: str


_VALIDATE = msgspec.json.Decoder(_Validate)


class ControlPlane:
    """The handlers of the control plane's routes."""

    def __init__(self, registry: Registry, files: Files) -> None:
        self._registry = registry
        self._files = files

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [
            web.post(f"{ROOT}/sessions", self.create_session),
            web.get(f"{ROOT}/sessions/{{session_id}}", self.get_session),
            web.post(f"{ROOT}/runs", self.create_run),
            web.get(f"{ROOT}/runs", self.list_runs),
            web.get(f"{ROOT}/runs/{{run_id}}", self.get_run),
            web.post(f"{ROOT}/samplers", self.create_sampler),
            web.get(f"{ROOT}/samplers", self.list_samplers),
            web.get(f"{ROOT}/samplers/{{sampler_id}}", self.get_sampler),
            web.get(f"{ROOT}/checkpoints", self.list_checkpoints),
            web.post(f"{ROOT}/checkpoints/validate", self.validate_checkpoint),
            web.get(f"{ROOT}/checkpoints/{{checkpoint_id}}/files", self.list_files),
            web.get(f"{ROOT}/capabilities", self.capabilities),
            web.get(f"{ROOT}/deployments", self.list_deployments),
            web.get(f"{ROOT}/deployments/{{deployment_id}}", self.get_deployment),
            web.post(f"{ROOT}/deployments/{{deployment_id}}/deactivate", self.deactivate_deployment),
            web.get("/v1/models/{model_id}/deployments/{deployment_id}", self.get_model_deployment),
        ]

    async def create_session(self, request: web.Request) -> web.Response:
        body = await request.read()
        decode(body or b"{}", _SESSION)
        session = await self._registry.create_session()
        return json_answer({"session": types.Session(id=session.id)})

    async def get_session(self, request: web.Request) -> web.Response:
        session = self._registry.session(request.match_info["session_id"])
        return json_answer({"session": types.Session(id=session.id)})

    async def create_run(self, request: web.Request) -> web.Response:
        run = await self._registry.create_run(decode(await request.read(), _RUN))
        return json_answer({"run": self._registry.show_run(run)})

    async def list_runs(self, request: web.Request) -> web.Response:
        run_id, base_model = request.query.get("run_id"), request.query.get("base_model")
        runs = [
            self._registry.show_run(run)
            for run in self._registry.runs()
            if run_id in (None, run.record.id) and base_model in (None, run.record.base_model)
        ]
        return json_answer({"runs": runs})

    async def get_run(self, request: web.Request) -> web.Response:
        run = self._registry.run(request.match_info["run_id"])
        return json_answer({"run": self._registry.show_run(run)})

    async def create_sampler(self, request: web.Request) -> web.Response:
        sampler = await self._registry.create_sampler(decode(await request.read(), _SAMPLER))
        return json_answer({"sampler": self._registry.show_sampler(sampler)})

    async def list_samplers(self, _request: web.Request) -> web.Response:
        samplers = [self._registry.show_sampler(sampler) for sampler in self._registry.samplers()]
        return json_answer({"samplers": samplers})

    async def get_sampler(self, request: web.Request) -> web.Response:
        sampler = self._registry.sampler(request.match_info["sampler_id"])
        return json_answer({"sampler": self._registry.show_sampler(sampler)})

    async def list_checkpoints(self, request: web.Request) -> web.Response:
        filters = {name: request.query[name] for name in _CHECKPOINT_FILTERS if name in request.query}
        if len(filters) != 1:
            raise invalid("query", f"provide exactly one of {', '.join(_CHECKPOINT_FILTERS)}; got {len(filters)}")
        found = await self._filtered(**filters)
        return json_answer({"checkpoints": [show_checkpoint(record) for record in found]})

    async def _filtered(
        self, *, run_id: str | None = None, base_model: str | None = None, checkpoint_path: str | None = None
    ) -> list[CheckpointRecord]:
        if checkpoint_path is not None:
            try:
                uri = CheckpointUri.parse(checkpoint_path, path="checkpoint_path")
            except InputError as error:
                raise HttpError(400, "VALIDATION_ERROR", str(error), details={"field": "checkpoint_path"}) from error
            return [await self._registry.checkpoints.at(uri)]
        if run_id is not None:
            self._registry.any_run(run_id)
        return await self._registry.checkpoints.of(run_id=run_id, base_model=base_model)

    async def validate_checkpoint(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), _VALIDATE)
        await self._registry.sampler_checkpoint(body.checkpoint_path)
        return json_answer({})

    async def list_files(self, request: web.Request) -> web.Response:
        record = await self._registry.checkpoints.get(request.match_info["checkpoint_id"])
        return json_answer(await self._files.page(record, request))

    async def capabilities(self, _request: web.Request) -> web.Response:
        supported = [
            types.SupportedModel(model_name=host.name, max_context_length=host.max_seq_len)
            for host in self._registry.models.hosts
        ]
        return json_answer(types.ServerCapabilities(supported_models=supported))

    async def list_deployments(self, _request: web.Request) -> web.Response:
        deployments = [self._registry.show_deployment(run) for run in self._registry.runs()]
        return json_answer({"deployments": deployments})

    async def get_deployment(self, request: web.Request) -> web.Response:
        run = self._registry.trainer_deployment(request.match_info["deployment_id"])
        return json_answer({"deployment": self._registry.show_deployment(run)})

    async def deactivate_deployment(self, request: web.Request) -> web.Response:
        run = self._registry.trainer_deployment(request.match_info["deployment_id"])
        await self._registry.stop_run(run)
        answer = {"id": run.record.deployment_id, "base_model": run.record.base_model, "user": types.User()}
        return json_answer(answer)

    async def get_model_deployment(self, request: web.Request) -> web.Response:
        model_id, deployment_id = request.match_info["model_id"], request.match_info["deployment_id"]
        deployment = self._registry.model_deployment(model_id, deployment_id)
        return json_answer({"id": deployment_id, "model_id": model_id, "status": deployment.status})


_CHECKPOINT_FILTERS = ("run_id", "base_model", "checkpoint_path")


def show_checkpoint(record: CheckpointRecord) -> types.Checkpoint:
    """Return a checkpoint as the control plane shows it."""
    return types.Checkpoint(
        id=record.id,
        run_id=record.run_id,
        checkpoint_id=record.name,
        checkpoint_type="lora",
        created_at=record.created_at,
        base_model=record.base_model,
        lora_adapter_config=types.LoraAdapterConfig(rank=record.rank),
        size_bytes=record.size_bytes,
        target=record.target,
    )

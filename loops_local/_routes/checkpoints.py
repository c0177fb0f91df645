"""Checkpoints on the control plane. Source: control-plane reference 2, rows 12 to 16."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from aiohttp import web
from msgspec import Struct

from loops_async import types
from loops_async.errors import InputError
from loops_async.protocol import CheckpointUri

from .._http.openapi import described, object_with
from .._http.parsing import decode_body
from .._http.paths import CONTROL_PLANE
from .._http.responses import json_response
from .._resources.lifecycle import Lifecycle
from .._resources.registry import Registry
from .._storage.records import CheckpointRecord
from .files import PAGE_QUERY, FileRoutes
from .representations import represent_checkpoint

__all__ = ["CheckpointRoutes"]

_ROOT = f"{CONTROL_PLANE}/checkpoints"
_FILTERS = ("run_id", "base_model", "checkpoint_path")


class _Validate(Struct):
    checkpoint_path: str
    run_id: str | None = None


_Checkpoints = object_with("ListCheckpointsResponse", checkpoints=list[types.Checkpoint])
_Source = object_with("CheckpointSourceResponse", source=types.CheckpointSource)
_Validated = object_with("ValidateCheckpointResponse", id=str)
_VALIDATE = msgspec.json.Decoder(_Validate)
_DEPLOY = msgspec.json.Decoder(types.DeployCheckpointsRequest)


class CheckpointRoutes:
    """The handlers of these routes."""

    def __init__(self, registry: Registry, lifecycle: Lifecycle, files: FileRoutes) -> None:
        self._registry = registry
        self._lifecycle = lifecycle
        self._files = files

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [
            web.get(_ROOT, self.list_checkpoints),
            web.post(f"{_ROOT}/validate", self.validate),
            web.post(f"{_ROOT}/deploy", self.deploy),
            web.get(f"{_ROOT}/{{checkpoint_id}}/files", self.list_files),
            web.get(f"{_ROOT}/{{checkpoint_id}}/source", self.source),
        ]

    @described("List checkpoints", _Checkpoints, query=dict.fromkeys(_FILTERS, str))
    async def list_checkpoints(self, request: web.Request) -> web.Response:
        filters = {name: request.query[name] for name in _FILTERS if name in request.query}
        if len(filters) != 1:
            raise InputError("query", f"provide exactly one of {', '.join(_FILTERS)}; got {len(filters)}")
        found = await self._filtered(**filters)
        return json_response({"checkpoints": [represent_checkpoint(record) for record in found]})

    async def _filtered(
        self, *, run_id: str | None = None, base_model: str | None = None, checkpoint_path: str | None = None
    ) -> list[CheckpointRecord]:
        if checkpoint_path is not None:
            uri = CheckpointUri.parse(checkpoint_path, path="checkpoint_path")
            return [await self._registry.checkpoints.at(uri)]
        if run_id is not None:
            self._registry.any_run(run_id)
        return await self._registry.checkpoints.select(run_id=run_id, base_model=base_model)

    @described("Check that a checkpoint can be loaded", _Validated, body=_Validate)
    async def validate(self, request: web.Request) -> web.Response:
        # Beyond the hosted route: a client that asks is going to sample this checkpoint, and gets the id of exactly it.
        body = await decode_body(request, _VALIDATE)
        checkpoint = await self._registry.checkpoints.argument(
            body.checkpoint_path, kind="sampler_weights", field="checkpoint_path"
        )
        if body.run_id is not None:
            trained = self._registry.run(body.run_id).record.base_model
            if checkpoint.base_model != trained:
                problem = f"was made with {checkpoint.base_model!r}; run {body.run_id!r} trains {trained!r}"
                raise InputError("checkpoint_path", problem)
        await self._registry.checkpoints.pin(checkpoint, checkpoint.run_id)
        return json_response({"id": checkpoint.id})

    @described("Deploy checkpoints", types.DeployedModel, body=types.DeployCheckpointsRequest)
    async def deploy(self, request: web.Request) -> web.Response:
        deployment = await self._lifecycle.deploy_checkpoints(await decode_body(request, _DEPLOY))
        record = deployment.record
        return json_response(types.DeployedModel(model_id=record.model_id, deployment_id=record.id))

    @described("List the files of a checkpoint", types.CheckpointFilesResponse, query=PAGE_QUERY)
    async def list_files(self, request: web.Request) -> web.Response:
        record = await self._registry.checkpoints.get(request.match_info["checkpoint_id"])
        return json_response(await self._files.page(record, request))

    @described("Get where the files of a checkpoint are", _Source)
    async def source(self, request: web.Request) -> web.Response:
        await self._registry.checkpoints.get(request.match_info["checkpoint_id"])
        # To clients, "s3" means that the files are behind signed URLs.
        return json_response({"source": types.CheckpointSource(kind="s3")})

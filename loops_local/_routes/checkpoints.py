"""Checkpoints on the control plane. Source: control-plane reference 2, rows 12 to 16."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from aiohttp import web
from msgspec import Struct

from loops_async import types
from loops_async.errors import InputError
from loops_async.protocol import CheckpointUri

from .control_plane import ROOT
from .files import Files
from .making import Maker
from .records import CheckpointRecord
from .registry import Registry
from .views import show_checkpoint
from .web import HttpError, decode, invalid, json_answer

__all__ = ["CheckpointRoutes"]

_FILTERS = ("run_id", "base_model", "checkpoint_path")


class _Validate(Struct):
    checkpoint_path: str
    run_id: str | None = None


_VALIDATE = msgspec.json.Decoder(_Validate)
_DEPLOY = msgspec.json.Decoder(types.DeployCheckpointsRequest)


class CheckpointRoutes:
    """The handlers of these routes."""

    def __init__(self, registry: Registry, maker: Maker, files: Files) -> None:
        self._registry = registry
        self._maker = maker
        self._files = files

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [
            web.get(f"{ROOT}/checkpoints", self.list_checkpoints),
            web.post(f"{ROOT}/checkpoints/validate", self.validate),
            web.post(f"{ROOT}/checkpoints/deploy", self.deploy),
            web.get(f"{ROOT}/checkpoints/{{checkpoint_id}}/files", self.list_files),
            web.get(f"{ROOT}/checkpoints/{{checkpoint_id}}/source", self.source),
        ]

    async def list_checkpoints(self, request: web.Request) -> web.Response:
        filters = {name: request.query[name] for name in _FILTERS if name in request.query}
        if len(filters) != 1:
            raise invalid("query", f"provide exactly one of {', '.join(_FILTERS)}; got {len(filters)}")
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

    async def validate(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), _VALIDATE)
        checkpoint = await self._registry.sampler_checkpoint(body.checkpoint_path)
        if body.run_id is not None:
            trained = self._registry.run(body.run_id).record.base_model
            if checkpoint.base_model != trained:
                rule = f"was made with {checkpoint.base_model!r}; run {body.run_id!r} trains {trained!r}"
                raise invalid("checkpoint_path", rule)
        return json_answer({})

    async def deploy(self, request: web.Request) -> web.Response:
        deployment = await self._maker.deploy_checkpoints(decode(await request.read(), _DEPLOY))
        record = deployment.record
        return json_answer(types.DeployedModel(model_id=record.model_id, deployment_id=record.id))

    async def list_files(self, request: web.Request) -> web.Response:
        record = await self._registry.checkpoints.get(request.match_info["checkpoint_id"])
        return json_answer(await self._files.page(record, request))

    async def source(self, request: web.Request) -> web.Response:
        # Its files are behind URLs, which is what this word means to clients.
        await self._registry.checkpoints.get(request.match_info["checkpoint_id"])
        return json_answer({"source": types.CheckpointSource(kind="s3")})

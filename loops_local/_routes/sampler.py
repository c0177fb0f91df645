"""The sampler's data plane. Source: data-plane reference 3."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec
from aiohttp import web
from msgspec import UNSET, Struct

from loops_async import protocol as wire
from loops_async.errors import InputError
from loops_async.protocol import CheckpointUri

from .._errors import HttpError, deactivated, not_found
from .._execution.models import ModelHost
from .._http.openapi import FILE, described, object_with
from .._http.parsing import decode_body, integer
from .._http.paths import LOCAL_SAMPLER, SAMPLERS
from .._http.responses import json_response, request_id_header
from .._resources.activity import Activity
from .._resources.deployment import Deployment
from .._resources.registry import Registry
from .._resources.run import BASE_WEIGHTS, Run, Weights
from ..engine import RefusedError
from .completions import completions, refused, sample_job

__all__ = ["SAMPLER", "SamplerRoutes", "Source", "WeightsRequest", "decode_sample"]

SAMPLER = f"{SAMPLERS}/{{sampler_id}}"

_SAMPLE_HEADERS: Final = (wire.RUN_ID, wire.CHECKPOINT_PATH, wire.CHECKPOINT_ID, wire.MIN_POLICY_VERSION)
_Woken = object_with("WakeResponse", status=str)
_TokenizerFiles = object_with("TokenizerFilesResponse", files=list[str])
_SAMPLE = msgspec.json.Decoder(wire.SampleBody)


class Source(Struct, frozen=True):
    """The model, run or checkpoint that a request samples from."""

    host: ModelHost
    run: Run | None
    checkpoint: CheckpointUri | None = None
    checkpoint_id: str | None = None
    deployment: Deployment | None = None
    max_seq_len: int | None = None
    local: bool = False


class WeightsRequest(Struct, frozen=True):
    """The weights that a request asks for: a checkpoint's, or those of a version or newer.

    With both, those of the version if it is served already, else the checkpoint's. An id says which of the checkpoints
    that have had the path; without one it is the newest.
    """

    checkpoint_path: str | None = None
    min_version: int | None = None
    checkpoint_id: str | None = None

    @classmethod
    def of(cls, request: web.Request, body: wire.SampleBody) -> WeightsRequest:
        """Read the headers; without one of a path, the body may have it."""
        version = request.headers.get(wire.MIN_POLICY_VERSION, "0")
        min_version = integer(wire.MIN_POLICY_VERSION, version, minimum=0)
        path, checkpoint_id = (request.headers.get(name) for name in (wire.CHECKPOINT_PATH, wire.CHECKPOINT_ID))
        return cls(path or body.checkpoint_path, min_version or None, checkpoint_id)


async def decode_sample(request: web.Request) -> wire.SampleBody:
    """Decode the body of a sample request."""
    return await decode_body(request, _SAMPLE)


class SamplerRoutes:
    """The handlers of samplers, both those of the control plane and that of local mode."""

    def __init__(self, registry: Registry, activity: Activity, *, version_wait_seconds: float) -> None:
        self._registry = registry
        self._activity = activity
        self._version_wait_seconds = version_wait_seconds

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        direct = (f"{SAMPLER}/sync", LOCAL_SAMPLER)
        any_form = (f"{SAMPLER}/{{form:sync|queue}}", LOCAL_SAMPLER)
        return [
            web.post(f"{SAMPLER}/wake", self.wake),
            *(web.post(f"{root}/sample", self.sample) for root in direct),
            *(web.get(f"{root}/trainers_policy_version", self.policy_version) for root in direct),
            *(web.get(f"{root}/v1/models", self.models) for root in any_form),
            *(
                route
                for root in (*any_form, f"{LOCAL_SAMPLER}/{{model}}")
                for route in (
                    web.get(f"{root}/tokenizer", self.list_tokenizer),
                    web.get(f"{root}/tokenizer/{{name}}", self.get_tokenizer),
                )
            ),
        ]

    @described("Sample", wire.Completions, body=wire.SampleBody, headers=_SAMPLE_HEADERS)
    async def sample(self, request: web.Request) -> web.Response:
        body = await decode_sample(request)
        source = self._source(request, body)
        if source.deployment is None:
            return await self._sample(request, source, body)
        source.deployment.check()
        with source.deployment.in_use():
            await source.deployment.active_engine()
            return await self._sample(request, source, body)

    async def _sample(self, request: web.Request, source: Source, body: wire.SampleBody) -> web.Response:
        answer, version = await self.complete(source, body, WeightsRequest.of(request, body))
        headers = request_id_header()
        if version is not None:
            headers[wire.POLICY_VERSION] = str(version)
        return json_response(answer, headers=headers)

    async def complete(
        self, source: Source, body: wire.SampleBody, wanted: WeightsRequest
    ) -> tuple[wire.Completions, int | None]:
        """Generate the completions; return them with the version of their weights, None for a checkpoint's."""
        with self._activity.sample():
            return await self._complete(source, body, wanted)

    async def _complete(
        self, source: Source, body: wire.SampleBody, wanted: WeightsRequest
    ) -> tuple[wire.Completions, int | None]:
        sampler = await source.host.sampler()
        weights = await self._weights(source, wanted)
        job = sample_job(body, weights.adapter, await _max_seq_len(source))
        try:
            outcome = await asyncio.wrap_future(sampler.submit(job))
        except RefusedError as error:
            if source.deployment is not None:
                source.deployment.log.write("WARNING", f"a sample was refused: {error}")
            raise refused(str(error)) from error
        return completions(body, job, outcome), weights.version

    @described("List the models that are served", wire.ServedModels, headers=(wire.RUN_ID,))
    async def models(self, request: web.Request) -> web.Response:
        source = self._source(request, None)
        served = [wire.ServedModel(id=source.host.name, tokenizer="tokenizer")]
        if source.local and source.run is None:
            others = [host.name for host in self._registry.models.hosts if host is not source.host]
            served += [wire.ServedModel(id=name, tokenizer=f"{wire.segment(name)}/tokenizer") for name in others]
        live = source.run.record.live if source.run is not None else None
        if source.run is not None and live is not None:
            uri = CheckpointUri(source.run.record.id, "sampler_weights", live.name)
            served.append(wire.ServedModel(id=str(uri), parent=source.host.name))
        if source.checkpoint is not None:
            served.append(wire.ServedModel(id=str(source.checkpoint), parent=source.host.name))
        return json_response(wire.ServedModels(served))

    @described("Get the version that is served", wire.PolicyVersion, headers=(wire.RUN_ID,))
    async def policy_version(self, request: web.Request) -> web.Response:
        run = self._source(request, None).run
        return json_response(wire.PolicyVersion(policy_version=None if run is None else run.published_version))

    @described("Start a sampler that is scaled to zero", _Woken, status=202)
    async def wake(self, request: web.Request) -> web.Response:
        deployment = self._registry.sampler(request.match_info["sampler_id"]).deployment
        if deployment.record.stopped:
            raise deactivated("sampler")
        deployment.keep_active()
        return json_response({"status": deployment.status}, status=202)

    @described("List the files of the tokenizer", _TokenizerFiles, headers=(wire.RUN_ID,))
    async def list_tokenizer(self, request: web.Request) -> web.Response:
        directory = await self._source(request, None).host.tokenizer()
        return json_response({"files": sorted(path.name for path in directory.iterdir())})

    @described("Download a file of the tokenizer", FILE, headers=(wire.RUN_ID,))
    async def get_tokenizer(self, request: web.Request) -> web.StreamResponse:
        directory = await self._source(request, None).host.tokenizer()
        name = request.match_info["name"]
        if name not in {path.name for path in directory.iterdir()}:
            raise not_found("tokenizer file", name)
        return web.FileResponse(directory / name)

    def _source(self, request: web.Request, body: wire.SampleBody | None) -> Source:
        model = None if body is None or body.model is UNSET else body.model
        local = "sampler_id" not in request.match_info
        source = self._local_source(request, model) if local else self.source_of_sampler(request)
        if model not in (None, source.host.name):
            raise not_found("model", str(model))
        return source

    def source_of_sampler(self, request: web.Request) -> Source:
        """Return what the sampler in the request's path serves."""
        sampler = self._registry.sampler(request.match_info["sampler_id"])
        run_id = request.headers.get(wire.RUN_ID)
        if sampler.run is not None and run_id not in (None, sampler.run.record.id):
            raise InputError(wire.RUN_ID, f"this sampler serves run {sampler.run.record.id!r}; got {run_id!r}")
        return Source(
            sampler.deployment.host,
            sampler.run,
            sampler.checkpoint,
            sampler.record.checkpoint_id,
            sampler.deployment,
            sampler.record.max_seq_length,
        )

    def _local_source(self, request: web.Request, model: str | None) -> Source:
        """Return the run that the header names, else the base model that the body or the path names."""
        models = self._registry.models
        if (run_id := request.headers.get(wire.RUN_ID)) is not None:
            run = self._registry.local_run(run_id)
            return Source(run.host, run, local=True)
        name = model or request.match_info.get("model") or models.default
        if not models.offers(name):
            raise not_found("model", name)
        return Source(models.host(name), None, local=True)

    async def _weights(self, source: Source, wanted: WeightsRequest) -> Weights:
        """Choose the weights. Source: data-plane reference 3.6."""
        path, min_version = wanted.checkpoint_path, wanted.min_version
        served = source.run.published_version or 0 if source.run is not None else 0
        if path is not None and (min_version is None or served < min_version):
            return await self._weights_of_checkpoint(path, wanted.checkpoint_id, source)
        if min_version is not None and source.run is not None:
            await source.run.wait_for_version(min_version, self._version_wait_seconds)
        weights = await self._served_weights(source)
        if (weights.version or 0) < (min_version or 0):
            message = f"the sampler does not serve version {min_version} yet; it serves {weights.version or 0}"
            raise HttpError(408, "VERSION_NOT_SERVED", message, error=message)
        return weights

    async def _served_weights(self, source: Source) -> Weights:
        if source.run is not None:
            return await source.run.weights(await source.host.engine())
        if source.checkpoint is not None:
            return await self._weights_of_checkpoint(str(source.checkpoint), None, source)
        return BASE_WEIGHTS

    async def _weights_of_checkpoint(self, path: str, checkpoint_id: str | None, source: Source) -> Weights:
        engine = await source.host.engine()
        field, checkpoints = wire.CHECKPOINT_PATH, self._registry.checkpoints
        if checkpoint_id is None and source.checkpoint is not None and path == str(source.checkpoint):
            checkpoint_id = source.checkpoint_id  # what the sampler was created of
        if checkpoint_id is None:
            record = await checkpoints.argument(path, kind="sampler_weights", field=field)
        else:
            record = await checkpoints.pinned(path, checkpoint_id, field=field)
        if source.local and not record.local:
            raise InputError(field, f"local mode has no checkpoint {path!r}")
        if record.base_model != source.host.name:
            problem = f"{path!r} belongs to {record.base_model!r}, this sampler is of {source.host.name!r}"
            raise InputError(field, problem)
        # Without a pause since the look-up, so that the checkpoint cannot be replaced in between.
        return Weights(await checkpoints.pinned_adapter(record, engine), None)


async def _max_seq_len(source: Source) -> int:
    engine = await source.host.engine()
    return min(source.max_seq_len or engine.model.max_seq_len, engine.model.max_seq_len)

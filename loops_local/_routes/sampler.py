"""The sampler's data plane. Source: data-plane reference 3."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiohttp import web
from msgspec import UNSET, Struct

from loops_async import protocol as wire
from loops_async.protocol import CheckpointUri

from .completions import completions, decode_sample, make_job, refusal
from .engine import RefusedError
from .engine.base import Adapter
from .models import ModelHost
from .provisioning import Deployment
from .registry import Registry
from .runs import LiveRun
from .web import HttpError, bad_request, deactivated, json_answer, not_found

__all__ = ["LOCAL_SAMPLER", "SAMPLERS", "SamplerRoutes", "Source", "Wanted"]

SAMPLERS = "/samplers/{sampler_id}"
LOCAL_SAMPLER = "/local/sampler"


class Source(Struct, frozen=True):
    """What a request samples from."""

    host: ModelHost
    run: LiveRun | None
    checkpoint: CheckpointUri | None = None
    deployment: Deployment | None = None
    max_seq_len: int | None = None
    local: bool = False


class Wanted(Struct, frozen=True):
    """Which weights a request asks for: a checkpoint's, a version and newer, both (then as soon as it is served)."""

    pinned: str | None = None
    floor: int | None = None

    @classmethod
    def of(cls, request: web.Request) -> Wanted:
        """Read the headers."""
        text = request.headers.get(wire.MIN_POLICY_VERSION, "0")
        if not text.isascii() or not text.isdigit() or len(text) > 15:
            raise bad_request(f"{wire.MIN_POLICY_VERSION}: must be an integer of at least 1; got {text!r}")
        return cls(request.headers.get(wire.CHECKPOINT_PATH), int(text) or None)


class _Weights(Struct, frozen=True):
    """The weights that answer; `version` is None for those of a checkpoint."""

    adapter: Adapter | None
    version: int | None


class SamplerRoutes:
    """The handlers of the samplers' routes, of the control plane's samplers and of local mode's."""

    def __init__(self, registry: Registry, *, version_wait_seconds: float) -> None:
        self._registry = registry
        self._version_wait_seconds = version_wait_seconds

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [
            web.post(f"{SAMPLERS}/wake", self.wake),
            *(
                route
                for root in (f"{SAMPLERS}/sync", LOCAL_SAMPLER)
                for route in (
                    web.post(f"{root}/sample", self.sample),
                    web.get(f"{root}/trainers_policy_version", self.policy_version),
                )
            ),
            *(web.get(f"{root}/v1/models", self.models) for root in (f"{SAMPLERS}/{{form:sync|queue}}", LOCAL_SAMPLER)),
            *(
                route
                for root in (f"{SAMPLERS}/{{form:sync|queue}}", LOCAL_SAMPLER, f"{LOCAL_SAMPLER}/{{model}}")
                for route in (
                    web.get(f"{root}/tokenizer", self.list_tokenizer),
                    web.get(f"{root}/tokenizer/{{name}}", self.get_tokenizer),
                )
            ),
        ]

    async def sample(self, request: web.Request) -> web.Response:
        body = decode_sample(await request.read())
        source = self._source(request, body)
        if source.deployment is None:
            return await self._sample(request, source, body)
        source.deployment.check()
        with source.deployment.in_use():
            await source.deployment.risen()
            return await self._sample(request, source, body)

    async def _sample(self, request: web.Request, source: Source, body: wire.SampleBody) -> web.Response:
        answer, version = await self.complete(source, body, Wanted.of(request))
        headers = None if version is None else {wire.POLICY_VERSION: str(version)}
        return json_answer(answer, headers=headers)

    async def complete(
        self, source: Source, body: wire.SampleBody, wanted: Wanted
    ) -> tuple[wire.Completions, int | None]:
        """Generate what is asked for; also tell the version that did, None for a checkpoint."""
        sampler = await source.host.sampler()
        weights = await self._weights(source, wanted)
        job = make_job(body, weights.adapter, await _limit(source))
        try:
            outcome = await asyncio.wrap_future(sampler.submit(job))
        except RefusedError as refused:
            if source.deployment is not None:
                source.deployment.log.write("WARNING", f"a sample was refused: {refused}")
            raise refusal(str(refused)) from refused
        return completions(body, job, outcome), weights.version

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
        return json_answer(wire.ServedModels(served))

    async def policy_version(self, request: web.Request) -> web.Response:
        run = self._source(request, None).run
        return json_answer(wire.PolicyVersion(policy_version=None if run is None else run.live_version))

    async def wake(self, request: web.Request) -> web.Response:
        deployment = self._registry.sampler(request.match_info["sampler_id"]).deployment
        if deployment.record.stopped:
            raise deactivated("sampler")
        deployment.wake()
        return json_answer({"status": deployment.status}, status=202)

    async def list_tokenizer(self, request: web.Request) -> web.Response:
        directory = await self._source(request, None).host.tokenizer()
        return json_answer({"files": sorted(path.name for path in directory.iterdir())})

    async def get_tokenizer(self, request: web.Request) -> web.StreamResponse:
        directory = await self._source(request, None).host.tokenizer()
        name = request.match_info["name"]
        if name not in {path.name for path in directory.iterdir()}:
            raise not_found("tokenizer file", name)
        return web.FileResponse(directory / name)

    def _source(self, request: web.Request, body: wire.SampleBody | None) -> Source:
        model = None if body is None or body.model is UNSET else body.model
        local = "sampler_id" not in request.match_info
        source = self._local_source(request, model) if local else self.own_source(request)
        if model not in (None, source.host.name):
            raise not_found("model", str(model))
        return source

    def own_source(self, request: web.Request) -> Source:
        """Return what the sampler that the path names serves."""
        sampler = self._registry.sampler(request.match_info["sampler_id"])
        named = request.headers.get(wire.RUN_ID)
        if sampler.run is not None and named not in (None, sampler.run.record.id):
            raise bad_request(f"{wire.RUN_ID}: this sampler serves run {sampler.run.record.id!r}; got {named!r}")
        return Source(
            sampler.deployment.host,
            sampler.run,
            sampler.checkpoint,
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

    async def _weights(self, source: Source, wanted: Wanted) -> _Weights:
        """Choose the weights. Source: data-plane reference 3.6."""
        floor, pinned = wanted.floor, wanted.pinned
        live = source.run.live_version or 0 if source.run is not None else 0
        if pinned is not None and (floor is None or live < floor):
            return _Weights(await self._pinned(pinned, source), None)
        if floor is not None and not await self._reaches(source.run, floor):
            message = f"the sampler does not serve version {floor} yet; it serves {live}"
            raise HttpError(408, "VERSION_NOT_SERVED", message, error=message)
        engine = await source.host.engine()
        if source.run is not None:
            return _Weights(*await source.run.live_weights(engine))
        if source.checkpoint is not None:
            return _Weights(await self._pinned(str(source.checkpoint), source), None)
        return _Weights(None, 0)

    async def _reaches(self, run: LiveRun | None, floor: int) -> bool:
        return run is not None and await run.wait_for_version(floor, self._version_wait_seconds)

    async def _pinned(self, path: str, source: Source) -> Adapter:
        try:
            record = await self._registry.sampler_checkpoint(path, field=wire.CHECKPOINT_PATH)
        except HttpError as problem:
            raise bad_request(str(problem)) from problem
        if source.local and not record.local:
            raise bad_request(f"{wire.CHECKPOINT_PATH}: local mode has no checkpoint {path!r}")
        if record.base_model != source.host.name:
            raise bad_request(
                f"{wire.CHECKPOINT_PATH}: {path!r} belongs to {record.base_model!r}, this sampler is of "
                f"{source.host.name!r}"
            )
        return await self._registry.checkpoints.adapter(record.run_id, record.id, await source.host.engine())


async def _limit(source: Source) -> int:
    engine = await source.host.engine()
    return min(source.max_seq_len or engine.model.max_seq_len, engine.model.max_seq_len)

"""The data plane of serverless samplers: samples wait in a queue. Source: data-plane reference 3.3 and 3.7."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web
from msgspec import UNSET
from msgspec.structs import replace

from loops_async import protocol as wire
from loops_async.errors import InputError
from loops_async.protocol import CheckpointUri

from .completions import decode_sample
from .provisioning import Deployment
from .registry import Registry
from .sample_queue import SampleQueue
from .sampler_routes import SAMPLERS, SamplerRoutes, Source, Wanted
from .web import FINAL, HttpError, bad_request, deactivated, json_answer, not_found, raw_answer

__all__ = ["QUEUES", "QueueRoutes"]

QUEUES = f"{SAMPLERS}/queue"


class QueueRoutes:
    """The handlers of samplers in their serverless form; which form is used is up to the control plane."""

    def __init__(self, registry: Registry, samplers: SamplerRoutes, queue: SampleQueue, *, hold_seconds: float) -> None:
        self._registry = registry
        self._samplers = samplers
        self._queue = queue
        self._hold_seconds = hold_seconds

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [
            web.post(f"{QUEUES}/sample", self.hand_in),
            web.get(f"{QUEUES}/operations/{{operation_id}}", self.poll),
            web.post(f"{QUEUES}/operations/{{operation_id}}/cancel", self.cancel),
        ]

    async def hand_in(self, request: web.Request) -> web.Response:
        body = decode_sample(await request.read())
        source, deployment = self._named(request)
        operation_id = request.headers.get(wire.IDEMPOTENCY_KEY)
        if not operation_id:
            raise bad_request(f"{wire.IDEMPOTENCY_KEY}: a queued sample needs one")
        if body.model not in (UNSET, None, source.host.name):
            raise not_found("model", str(body.model))
        if deployment.record.stopped:
            raise deactivated("sampler")
        pinned = request.headers.get(wire.CHECKPOINT_PATH) or (None if body.lora is UNSET else body.lora)

        async def generate() -> wire.Completions:
            with deployment.in_use():
                await deployment.risen()
                # There is no current version here: without a checkpoint, it is the base model.
                completions, _ = await self._samplers.complete(replace(source, run=None), body, Wanted(pinned))
                return completions

        self._queue.submit(request.match_info["sampler_id"], operation_id, generate)
        return json_answer(wire.Accepted(operation_id=operation_id), status=202)

    async def poll(self, request: web.Request) -> web.Response:
        self._named(request)
        sampler_id, operation_id = request.match_info["sampler_id"], request.match_info["operation_id"]
        try:
            answer = await self._queue.answer(sampler_id, operation_id, hold_seconds=self._hold_seconds)
        except KeyError:
            raise not_found("operation", operation_id) from None
        if answer is None:
            raise HttpError(408, "PENDING", "the sample is still under way; poll again")
        return raw_answer(answer)

    async def cancel(self, request: web.Request) -> web.Response:
        self._named(request)
        sampler_id, operation_id = request.match_info["sampler_id"], request.match_info["operation_id"]
        try:
            cancelled = self._queue.cancel(sampler_id, operation_id)
        except KeyError:
            raise not_found("operation", operation_id) from None
        if not cancelled:
            raise HttpError(409, "NOT_CANCELLED", "the sample is done already")
        return json_answer({"status": "cancelled"})

    def _named(self, request: web.Request) -> tuple[Source, Deployment]:
        """Return the sampler, which a gateway wants to be named in exactly one way."""
        path, run_id = request.headers.get(wire.CHECKPOINT_PATH), request.headers.get(wire.RUN_ID)
        if path is not None and run_id not in (None, _run_of(path)):
            raise bad_request(f"{wire.CHECKPOINT_PATH}: {path!r} is not of run {run_id!r}")
        if (path is None and run_id is None) == (wire.SAMPLER_ID not in request.headers):
            message = f"send exactly one of {wire.RUN_ID} (or {wire.CHECKPOINT_PATH}) and {wire.SAMPLER_ID}"
            raise HttpError(400, "run_or_sampler_required", message, headers=FINAL, error=message)
        if request.headers.get(wire.SAMPLER_ID, request.match_info["sampler_id"]) != request.match_info["sampler_id"]:
            raise bad_request(f"{wire.SAMPLER_ID}: is not the sampler that the path names")
        return self._samplers.own_source(request), self._registry.sampler(request.match_info["sampler_id"]).deployment


def _run_of(path: str) -> str:
    try:
        return CheckpointUri.parse(path, path=wire.CHECKPOINT_PATH).run_id
    except InputError as error:
        raise bad_request(str(error)) from error

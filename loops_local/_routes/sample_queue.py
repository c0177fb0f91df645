"""The data plane of serverless samplers, which queue samples. Source: data-plane reference 3.3 and 3.7."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aiohttp import web
from msgspec import UNSET
from msgspec.structs import replace

from loops_async import protocol as wire
from loops_async.errors import InputError
from loops_async.protocol import CheckpointUri

from .._errors import FINAL, HttpError, deactivated, not_found
from .._execution.sample_queue import SampleQueue
from .._http.openapi import Outcome, described, object_with
from .._http.responses import json_response, poll_response, request_id_header
from .._resources.deployment import Deployment
from .._resources.registry import Registry
from .sampler import SAMPLER, SamplerRoutes, Source, WeightsRequest, decode_sample

__all__ = ["SampleQueueRoutes"]

_HEADERS: Final = (wire.SAMPLER_ID, wire.RUN_ID, wire.CHECKPOINT_PATH)
_SUBMIT_HEADERS: Final = (wire.IDEMPOTENCY_KEY, *_HEADERS)
_Cancelled = object_with("CancelledResponse", status=str)
_QUEUE = f"{SAMPLER}/queue"


class SampleQueueRoutes:
    """The handlers of samplers in their serverless form; the control plane decides which form a client uses."""

    def __init__(self, registry: Registry, samplers: SamplerRoutes, queue: SampleQueue, *, hold_seconds: float) -> None:
        self._registry = registry
        self._samplers = samplers
        self._queue = queue
        self._hold_seconds = hold_seconds

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [
            web.post(f"{_QUEUE}/sample", self.submit),
            web.get(f"{_QUEUE}/operations/{{operation_id}}", self.poll),
            web.post(f"{_QUEUE}/operations/{{operation_id}}/cancel", self.cancel),
        ]

    @described("Submit a sample", wire.Accepted, body=wire.SampleBody, status=202, headers=_SUBMIT_HEADERS)
    async def submit(self, request: web.Request) -> web.Response:
        body = await decode_sample(request)
        source, deployment = self._sampler(request)
        operation_id = request.headers.get(wire.IDEMPOTENCY_KEY)
        if not operation_id:
            raise InputError(wire.IDEMPOTENCY_KEY, "a queued sample needs one")
        if body.model not in (UNSET, None, source.host.name):
            raise not_found("model", str(body.model))
        if deployment.record.stopped:
            raise deactivated("sampler")
        path = request.headers.get(wire.CHECKPOINT_PATH) or body.checkpoint_path
        weights = WeightsRequest(path, checkpoint_id=request.headers.get(wire.CHECKPOINT_ID))

        async def generate() -> wire.Completions:
            with deployment.in_use():
                await deployment.active_engine()
                # A queue serves no current version: without a checkpoint, it samples the base model.
                completions, _ = await self._samplers.complete(replace(source, run=None), body, weights)
                return completions

        self._queue.submit(request.match_info["sampler_id"], operation_id, generate)
        return json_response(wire.Accepted(operation_id=operation_id), status=202, headers=request_id_header())

    @described("Get the outcome of a sample", Outcome, headers=_HEADERS)
    async def poll(self, request: web.Request) -> web.Response:
        self._sampler(request)
        sampler_id, operation_id = request.match_info["sampler_id"], request.match_info["operation_id"]
        outcome = self._queue.outcome(sampler_id, operation_id, hold_seconds=self._hold_seconds)
        return await poll_response(outcome, operation_id)

    @described("Cancel a sample", _Cancelled, headers=_HEADERS)
    async def cancel(self, request: web.Request) -> web.Response:
        self._sampler(request)
        sampler_id, operation_id = request.match_info["sampler_id"], request.match_info["operation_id"]
        try:
            cancelled = self._queue.cancel(sampler_id, operation_id)
        except KeyError:
            raise not_found("operation", operation_id) from None
        if not cancelled:
            raise HttpError(409, "NOT_CANCELLED", "the sample has ended already")
        return json_response({"status": "cancelled"})

    def _sampler(self, request: web.Request) -> tuple[Source, Deployment]:
        """Return the sampler in the path; the hosted gateway wants one more header that names it."""
        sampler_id = request.match_info["sampler_id"]
        path, run_id = request.headers.get(wire.CHECKPOINT_PATH), request.headers.get(wire.RUN_ID)
        if path is not None and run_id not in (None, CheckpointUri.parse(path, path=wire.CHECKPOINT_PATH).run_id):
            raise InputError(wire.CHECKPOINT_PATH, f"{path!r} is not of run {run_id!r}")
        if (path is None and run_id is None) == (wire.SAMPLER_ID not in request.headers):
            message = f"send exactly one of {wire.RUN_ID} (or {wire.CHECKPOINT_PATH}) and {wire.SAMPLER_ID}"
            raise HttpError(400, "run_or_sampler_required", message, headers=FINAL, error=message)
        if request.headers.get(wire.SAMPLER_ID, sampler_id) != sampler_id:
            raise InputError(wire.SAMPLER_ID, "is not the sampler that the path names")
        return self._samplers.source_of_sampler(request), self._registry.sampler(sampler_id).deployment

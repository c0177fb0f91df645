"""The trainer's data plane. Source: data-plane reference 1 and 2.

A trainer that is still starting answers submissions with 400 and ``{"error": "... is deploying ..."}``, which clients
repeat; to them, 503 would mean that it shuts down.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import quote

import msgspec
from aiohttp import web

from loops_async import protocol as wire
from loops_async.errors import InputError

from .._errors import HttpError, deactivated
from .._execution.operations import Operations
from .._http.openapi import Outcome, described, object_with
from .._http.parsing import decode_body
from .._http.paths import LOCAL_TRAINER, TRAINERS
from .._http.responses import json_response, poll_response
from .._resources.lifecycle import LOCAL_RUN_ID, Lifecycle
from .._resources.registry import Registry
from .._resources.run import Run

__all__ = ["TrainerRoutes"]

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Save: TypeAlias = wire.SaveStateBody | wire.SaveWeightsForSamplerBody
B = TypeVar("B", bound=wire.ForwardBody | wire.OptimStepBody | wire.LoadStateBody | _Save)

_MAX_KEY_LENGTH = 255
_MAX_TTL_SECONDS = 100 * 366 * 24 * 3600

_HEADERS: Final = (wire.IDEMPOTENCY_KEY, wire.RUN_ID)
_Health = object_with("HealthResponse", status=str)
_Kept = object_with("MetricsResponse", steps=int)
_INIT = msgspec.json.Decoder(wire.InitTrainerServerBody)
_METRICS = msgspec.json.Decoder(wire.OwnMetricsBody)


class TrainerRoutes:
    """The handlers of trainers, both those of the control plane's runs and that of local mode."""

    def __init__(
        self, registry: Registry, lifecycle: Lifecycle, operations: Operations, *, hold_seconds: float, serverless: bool
    ) -> None:
        self._registry = registry
        self._lifecycle = lifecycle
        self._operations = operations
        self._hold_seconds = hold_seconds
        self._serverless = serverless

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        operations = {
            "init_trainer_server": self.init_trainer_server,
            "forward": self._operation(wire.ForwardBody, partial(Run.forward, backward=False), _check_forward),
            "forward_backward": self._operation(wire.ForwardBody, partial(Run.forward, backward=True), _check_forward),
            "optim_step": self._operation(wire.OptimStepBody, Run.optim_step),
            "save_state": self._operation(wire.SaveStateBody, Run.save_state, _check_save),
            "save_weights_for_sampler": self._operation(
                wire.SaveWeightsForSamplerBody, Run.save_weights_for_sampler, _check_save
            ),
            "load_state": self._operation(wire.LoadStateBody, partial(Run.load_state, optimizer=False)),
            "load_state_with_optimizer": self._operation(wire.LoadStateBody, partial(Run.load_state, optimizer=True)),
        }
        return [
            route
            for root in (f"{TRAINERS}/{{run_id}}", LOCAL_TRAINER)
            for route in (
                *(web.post(f"{root}/{name}", handler) for name, handler in operations.items()),
                web.get(f"{root}/operations/{{operation_id}}", self.poll),
                web.get(f"{root}/health", self.health),
                web.get(f"{root}/policy_version", self.policy_version),
                web.post(f"{root}/metrics", self.add_metrics),
            )
        ]

    @described("Start to train", wire.Accepted, body=wire.InitTrainerServerBody, status=202, headers=_HEADERS)
    async def init_trainer_server(self, request: web.Request) -> web.Response:
        body = await decode_body(request, _INIT)
        if "run_id" not in request.match_info:
            run_id = _run_id(request, body.run_id) or LOCAL_RUN_ID
            await self._lifecycle.get_or_create_local_run(run_id, body.base_model, body.lora_rank)
        run = self._run(request, body.run_id)
        run.check()
        if body.base_model != run.record.base_model:
            raise InputError("base_model", f"this run trains {run.record.base_model!r}; got {body.base_model!r}")
        return self._submit(request, run, partial(run.init_trainer_server, body))

    def _operation(
        self,
        kind: type[B],
        work: Callable[[Run, B], Awaitable[Any]],
        check: Callable[[B, Run], None] = lambda body, run: None,
    ) -> Handler:
        """Return the handler that submits an operation with a body of this kind."""
        decoder = msgspec.json.Decoder(kind)

        @described("Submit an operation", wire.Accepted, body=kind, status=202, headers=_HEADERS)
        async def submit(request: web.Request) -> web.Response:
            body = await decode_body(request, decoder)
            run = self._run(request, body.run_id)
            check(body, run)
            run.check()
            return self._submit(request, run, partial(work, run, body))

        return submit

    @described("Get the outcome of an operation", Outcome, headers=(wire.RUN_ID,))
    async def poll(self, request: web.Request) -> web.Response:
        run = self._run(request)
        operation_id = request.match_info["operation_id"]
        with run.deployment.in_use():
            outcome = self._operations.outcome(run.record.id, operation_id, hold_seconds=self._hold_seconds)
            return await poll_response(outcome, operation_id)

    @described("Get whether the trainer is ready", _Health, headers=(wire.RUN_ID,))
    async def health(self, request: web.Request) -> web.Response:
        if "run_id" not in request.match_info:
            return json_response({"status": "ok"})
        run = self._run(request)
        run.deployment.keep_active()
        if not run.record.active:
            raise deactivated("run")
        if (problem := run.deployment.problem(status_while_starting=503)) is not None:
            raise problem
        return json_response({"status": "ok"})

    @described("Get the number of optimizer steps", wire.PolicyVersion, headers=(wire.RUN_ID,))
    async def policy_version(self, request: web.Request) -> web.Response:
        if self._serverless and "run_id" in request.match_info:
            message = "a serverless trainer does not report its policy version"
            raise HttpError(501, "NOT_OFFERED", message, error=message)
        return json_response(wire.PolicyVersion(policy_version=self._run(request).step))

    @described("Add metrics of the caller's own to steps", _Kept, body=wire.OwnMetricsBody, headers=(wire.RUN_ID,))
    async def add_metrics(self, request: web.Request) -> web.Response:
        body = await decode_body(request, _METRICS)
        run = self._run(request)
        for one in body.steps:
            run.history.add_own(one.step, one.metrics)
        return json_response({"steps": len(body.steps)})

    def _run(self, request: web.Request, body_run_id: str | None = None) -> Run:
        run_id = _run_id(request, body_run_id)
        if "run_id" not in request.match_info:
            return self._registry.local_run(run_id or LOCAL_RUN_ID)
        run = self._registry.run(request.match_info["run_id"])
        if run_id not in (None, run.record.id):
            raise InputError(wire.RUN_ID, f"this is the trainer of run {run.record.id!r}; got {run_id!r}")
        return run

    def _submit(self, request: web.Request, run: Run, work: Callable[[], Awaitable[Any]]) -> web.Response:
        if self._serverless and wire.IDEMPOTENCY_KEY not in request.headers and not run.record.local:
            raise InputError(wire.IDEMPOTENCY_KEY, "a serverless trainer needs one")
        operation_id = request.headers.get(wire.IDEMPOTENCY_KEY) or uuid.uuid4().hex
        if len(operation_id) > _MAX_KEY_LENGTH or not operation_id.isprintable():
            raise InputError(wire.IDEMPOTENCY_KEY, f"must be at most {_MAX_KEY_LENGTH} printable characters")
        name = request.path.rsplit("/", 1)[-1]
        self._operations.submit(
            run.record.id,
            operation_id,
            name,
            prepare=run.deployment.active_engine,
            work=work,
            log=run.deployment.log,
        )
        location = f"/operations/{quote(operation_id, safe='')}"
        return json_response(wire.Accepted(operation_id=operation_id), status=202, headers={"Location": location})


def _run_id(request: web.Request, body_run_id: str | None) -> str | None:
    header = request.headers.get(wire.RUN_ID)
    if header is not None and body_run_id not in (None, header):
        raise InputError("run_id", f"the header {wire.RUN_ID} says {header!r}, the body {body_run_id!r}")
    return header or body_run_id


def _check_forward(body: wire.ForwardBody, run: Run) -> None:
    wire.loss_rule(body.loss_fn)
    if not 0 <= body.top_k_logprobs <= wire.MAX_TOP_K_LOGPROBS:
        raise InputError("top_k_logprobs", f"must be 0 to {wire.MAX_TOP_K_LOGPROBS}; got {body.top_k_logprobs}")
    if not body.data:
        raise InputError("data", "must have at least one datum")
    limits = [limit for limit in (run.record.max_seq_len, run.host.max_seq_len) if limit is not None]
    for index, datum in enumerate(body.data):
        length = datum.model_input.length
        if not length:
            raise InputError(f"data[{index}].model_input", "must have at least one token")
        if limits and length > min(limits):
            problem = f"must have at most {min(limits)} tokens, the longest sequence of this run; got {length}"
            raise InputError(f"data[{index}].model_input", problem)


def _check_save(body: _Save, _run: Run) -> None:
    wire.check_checkpoint_name(body.name)
    if isinstance(body.ttl_seconds, int) and not 1 <= body.ttl_seconds <= _MAX_TTL_SECONDS:
        raise InputError("ttl_seconds", f"must be 1 to {_MAX_TTL_SECONDS}; got {body.ttl_seconds}")

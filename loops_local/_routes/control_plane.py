"""Sessions, runs, samplers and models of the control plane. Source: control-plane reference 2, rows 1 to 11 and 17."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Annotated, Final, get_args

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Meta

from loops_async import types

from .._execution.models import ModelHost
from .._http.openapi import described, object_with
from .._http.parsing import choice, decode_body, query_int
from .._http.paths import CONTROL_PLANE, TEAMS
from .._http.responses import json_response
from .._resources.lifecycle import Lifecycle
from .._resources.registry import Registry
from .account import AccountRoutes
from .representations import Representations, represent_deactivated

__all__ = ["SCOPE_QUERY", "ControlPlaneRoutes", "check_scope"]

SCOPE_QUERY: Final = {"scope": types.Scope}
_CAPABILITIES_QUERY: Final = {
    "use_case": types.UseCase,
    "model": str,
    "max_seq_len": Annotated[int, Meta(ge=1)],
}

_Session = object_with("SessionResponse", session=types.Session)
_Run = object_with("RunResponse", run=types.Run)
_Runs = object_with("ListRunsResponse", runs=list[types.Run])
_Sampler = object_with("SamplerResponse", sampler=types.Sampler)
_Samplers = object_with("ListSamplersResponse", samplers=list[types.Sampler])
_ModelDeployment = object_with("ModelDeploymentResponse", id=str, model_id=str, status=str)

_SESSION = msgspec.json.Decoder(types.CreateSessionRequest)
_RUN = msgspec.json.Decoder(types.CreateRunRequest)
_TRAINER = msgspec.json.Decoder(types.CreateTrainerRequest)
_SAMPLER = msgspec.json.Decoder(types.CreateSamplerRequest)


class ControlPlaneRoutes:
    """The handlers of these routes."""

    def __init__(
        self, registry: Registry, lifecycle: Lifecycle, representations: Representations, account: AccountRoutes
    ) -> None:
        self._registry = registry
        self._lifecycle = lifecycle
        self._represent = representations
        self._account = account

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes; some exist a second time, below a team."""
        also_of_teams: list[tuple[str, str, Handler]] = [
            ("POST", "/sessions", self.create_session),
            ("POST", "/runs", self.create_run),
            ("GET", "/runs", self.list_runs),
            ("POST", "/trainers", self.create_trainer),
            ("POST", "/samplers", self.create_sampler),
            ("GET", "/samplers", self.list_samplers),
        ]
        team = f"{TEAMS}/{{team_id}}/loops"
        return [
            *(web.route(method, CONTROL_PLANE + path, handler) for method, path, handler in also_of_teams),
            *(web.route(method, team + path, self._in_team(handler)) for method, path, handler in also_of_teams),
            web.get(f"{CONTROL_PLANE}/sessions/{{session_id}}", self.get_session),
            web.get(f"{CONTROL_PLANE}/runs/{{run_id}}", self.get_run),
            web.post(f"{CONTROL_PLANE}/runs/{{run_id}}/deactivate", self.deactivate_run),
            web.get(f"{CONTROL_PLANE}/samplers/{{sampler_id}}", self.get_sampler),
            web.post(f"{CONTROL_PLANE}/samplers/{{sampler_id}}/deactivate", self.deactivate_sampler),
            web.get(f"{CONTROL_PLANE}/capabilities", self.capabilities),
            web.get("/v1/models/{model_id}/deployments/{deployment_id}", self.get_model_deployment),
        ]

    def _in_team(self, handler: Handler) -> Handler:
        @wraps(handler)  # with its description
        async def in_team(request: web.Request) -> web.StreamResponse:
            self._account.check_team(request.match_info["team_id"])
            return await handler(request)

        return in_team

    @described("Create a session", _Session, body=types.CreateSessionRequest, is_optional=True)
    async def create_session(self, request: web.Request) -> web.Response:
        await decode_body(request, _SESSION, default=b"{}")
        session = await self._lifecycle.create_session()
        return json_response({"session": types.Session(id=session.id)})

    @described("Get a session", _Session)
    async def get_session(self, request: web.Request) -> web.Response:
        session = self._registry.session(request.match_info["session_id"])
        return json_response({"session": types.Session(id=session.id)})

    @described("Create a run with its sampler", _Run, body=types.CreateRunRequest)
    async def create_run(self, request: web.Request) -> web.Response:
        run = await self._lifecycle.create_run(await decode_body(request, _RUN))
        return json_response({"run": self._represent.run(run)})

    @described("Create a run without a sampler", _Run, body=types.CreateTrainerRequest)
    async def create_trainer(self, request: web.Request) -> web.Response:
        run = await self._lifecycle.create_trainer(await decode_body(request, _TRAINER))
        return json_response({"run": self._represent.run(run)})

    @described("List runs", _Runs, query={**SCOPE_QUERY, "run_id": str, "base_model": str})
    async def list_runs(self, request: web.Request) -> web.Response:
        check_scope(request)
        run_id, base_model = request.query.get("run_id"), request.query.get("base_model")
        runs = [
            self._represent.run(run)
            for run in self._registry.runs()
            if run_id in (None, run.record.id) and base_model in (None, run.record.base_model)
        ]
        return json_response({"runs": runs})

    @described("Get a run", _Run)
    async def get_run(self, request: web.Request) -> web.Response:
        run = self._registry.run(request.match_info["run_id"])
        return json_response({"run": self._represent.run(run)})

    @described("Deactivate a run", types.Deactivated)
    async def deactivate_run(self, request: web.Request) -> web.Response:
        run = self._registry.run(request.match_info["run_id"])
        await self._lifecycle.deactivate_run(run)
        return json_response(represent_deactivated(run.record))

    @described("Create a sampler", _Sampler, body=types.CreateSamplerRequest)
    async def create_sampler(self, request: web.Request) -> web.Response:
        sampler = await self._lifecycle.create_sampler(await decode_body(request, _SAMPLER))
        return json_response({"sampler": self._represent.sampler(sampler)})

    @described("List samplers", _Samplers, query=SCOPE_QUERY)
    async def list_samplers(self, request: web.Request) -> web.Response:
        check_scope(request)
        samplers = [self._represent.sampler(sampler) for sampler in self._registry.samplers()]
        return json_response({"samplers": samplers})

    @described("Get a sampler", _Sampler)
    async def get_sampler(self, request: web.Request) -> web.Response:
        sampler = self._registry.sampler(request.match_info["sampler_id"])
        return json_response({"sampler": self._represent.sampler(sampler)})

    @described("Deactivate a sampler", types.Deactivated)
    async def deactivate_sampler(self, request: web.Request) -> web.Response:
        sampler = self._registry.sampler(request.match_info["sampler_id"])
        await self._lifecycle.deactivate_sampler(sampler)
        return json_response(represent_deactivated(sampler.record))

    @described("List the base models on offer", types.ServerCapabilities, query=_CAPABILITIES_QUERY)
    async def capabilities(self, request: web.Request) -> web.Response:
        choice("use_case", request.query.get("use_case", "rl"), get_args(types.UseCase))
        name = request.query.get("model")
        length = query_int(request, "max_seq_len", 1, minimum=1)
        supported = [_supported(host, length) for host in self._registry.models.hosts if name in (None, host.name)]
        return json_response(types.ServerCapabilities(supported_models=supported, metrics=True))

    @described("Get the state of a sampler's deployment", _ModelDeployment)
    async def get_model_deployment(self, request: web.Request) -> web.Response:
        model_id, deployment_id = request.match_info["model_id"], request.match_info["deployment_id"]
        deployment = self._registry.model_deployment(model_id, deployment_id)
        return json_response({"id": deployment_id, "model_id": model_id, "status": deployment.status})


def check_scope(request: web.Request) -> None:
    """Check the scope of a listing; it changes nothing, since the one user sees all objects."""
    if "scope" in request.query:
        choice("scope", request.query["scope"], get_args(types.Scope))


def _supported(host: ModelHost, length: int) -> types.SupportedModel:
    """Describe a model; its longest sequence is known once it is loaded."""
    known = host.max_seq_len
    enabled = known is None or length <= known
    details = types.EnablementDetails(
        reason="sequence_length_unsupported",
        reason_detail=f"{host.name} takes at most {known} tokens",
        remediation="ask for a smaller max_seq_len, or another model",
    )
    return types.SupportedModel(
        model_name=host.name,
        max_context_length=known or 0,  # the published schema has no null here
        max_seq_len=known,
        max_enabled_seq_len=known,
        supports_vision_language=False,
        enabled=enabled,
        serverless=False,
        enablement_details=None if enabled else details,
    )

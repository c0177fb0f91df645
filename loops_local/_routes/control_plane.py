"""Sessions, runs, samplers and models of the control plane. Source: control-plane reference 2, rows 1 to 11 and 17."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from loops_async import types

from .account import Account
from .making import Maker
from .models import ModelHost
from .registry import Registry
from .views import NOBODY, Views
from .web import check_word, decode, json_answer, query_int

__all__ = ["ROOT", "ControlPlane"]

ROOT = "/v1/loops"
_TEAM_ROOT = "/v1/teams/{team_id}/loops"

_SESSION = msgspec.json.Decoder(types.CreateSessionRequest)
_RUN = msgspec.json.Decoder(types.CreateRunRequest)
_TRAINER = msgspec.json.Decoder(types.CreateTrainerRequest)
_SAMPLER = msgspec.json.Decoder(types.CreateSamplerRequest)


class ControlPlane:
    """The handlers of these routes."""

    def __init__(self, registry: Registry, maker: Maker, views: Views, account: Account) -> None:
        self._registry = registry
        self._maker = maker
        self._views = views
        self._account = account

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes; those with a team form stand twice."""
        of_teams: list[tuple[str, str, Handler]] = [
            ("POST", "/sessions", self.create_session),
            ("POST", "/runs", self.create_run),
            ("GET", "/runs", self.list_runs),
            ("POST", "/trainers", self.create_trainer),
            ("POST", "/samplers", self.create_sampler),
            ("GET", "/samplers", self.list_samplers),
        ]
        return [
            *(web.route(method, ROOT + path, handler) for method, path, handler in of_teams),
            *(web.route(method, _TEAM_ROOT + path, self._in_team(handler)) for method, path, handler in of_teams),
            web.get(f"{ROOT}/sessions/{{session_id}}", self.get_session),
            web.get(f"{ROOT}/runs/{{run_id}}", self.get_run),
            web.post(f"{ROOT}/runs/{{run_id}}/deactivate", self.deactivate_run),
            web.get(f"{ROOT}/samplers/{{sampler_id}}", self.get_sampler),
            web.post(f"{ROOT}/samplers/{{sampler_id}}/deactivate", self.deactivate_sampler),
            web.get(f"{ROOT}/capabilities", self.capabilities),
            web.get("/v1/models/{model_id}/deployments/{deployment_id}", self.get_model_deployment),
        ]

    def _in_team(self, handler: Handler) -> Handler:
        async def in_team(request: web.Request) -> web.StreamResponse:
            self._account.check_team(request.match_info["team_id"])
            return await handler(request)

        return in_team

    async def create_session(self, request: web.Request) -> web.Response:
        body = await request.read()
        decode(body or b"{}", _SESSION)
        session = await self._maker.create_session()
        return json_answer({"session": types.Session(id=session.id)})

    async def get_session(self, request: web.Request) -> web.Response:
        session = self._registry.session(request.match_info["session_id"])
        return json_answer({"session": types.Session(id=session.id)})

    async def create_run(self, request: web.Request) -> web.Response:
        run = await self._maker.create_run(decode(await request.read(), _RUN))
        return json_answer({"run": self._views.run(run)})

    async def create_trainer(self, request: web.Request) -> web.Response:
        run = await self._maker.create_trainer(decode(await request.read(), _TRAINER))
        return json_answer({"run": self._views.run(run)})

    async def list_runs(self, request: web.Request) -> web.Response:
        check_scope(request)
        run_id, base_model = request.query.get("run_id"), request.query.get("base_model")
        runs = [
            self._views.run(run)
            for run in self._registry.runs()
            if run_id in (None, run.record.id) and base_model in (None, run.record.base_model)
        ]
        return json_answer({"runs": runs})

    async def get_run(self, request: web.Request) -> web.Response:
        run = self._registry.run(request.match_info["run_id"])
        return json_answer({"run": self._views.run(run)})

    async def deactivate_run(self, request: web.Request) -> web.Response:
        run = self._registry.run(request.match_info["run_id"])
        await self._maker.stop_run(run)
        return json_answer(types.Deactivated(id=run.record.id, base_model=run.record.base_model, user=NOBODY))

    async def create_sampler(self, request: web.Request) -> web.Response:
        sampler = await self._maker.create_sampler(decode(await request.read(), _SAMPLER))
        return json_answer({"sampler": self._views.sampler(sampler)})

    async def list_samplers(self, request: web.Request) -> web.Response:
        check_scope(request)
        samplers = [self._views.sampler(sampler) for sampler in self._registry.samplers()]
        return json_answer({"samplers": samplers})

    async def get_sampler(self, request: web.Request) -> web.Response:
        sampler = self._registry.sampler(request.match_info["sampler_id"])
        return json_answer({"sampler": self._views.sampler(sampler)})

    async def deactivate_sampler(self, request: web.Request) -> web.Response:
        sampler = self._registry.sampler(request.match_info["sampler_id"])
        await self._maker.stop_sampler(sampler)
        record = sampler.record
        return json_answer(types.Deactivated(id=record.id, base_model=record.base_model, user=NOBODY))

    async def capabilities(self, request: web.Request) -> web.Response:
        check_word("use_case", request.query.get("use_case", "rl"), get_args(types.UseCase))
        wanted = request.query.get("model")
        length = query_int(request, "max_seq_len", 1, least=1)
        supported = [_show_model(host, length) for host in self._registry.models.hosts if wanted in (None, host.name)]
        return json_answer(types.ServerCapabilities(supported_models=supported))

    async def get_model_deployment(self, request: web.Request) -> web.Response:
        model_id, deployment_id = request.match_info["model_id"], request.match_info["deployment_id"]
        deployment = self._registry.model_deployment(model_id, deployment_id)
        return json_answer({"id": deployment_id, "model_id": model_id, "status": deployment.status})


def check_scope(request: web.Request) -> None:
    """Check whose objects are asked for; there is one user, who sees everything."""
    if "scope" in request.query:
        check_word("scope", request.query["scope"], get_args(types.Scope))


def _show_model(host: ModelHost, wanted_length: int) -> types.SupportedModel:
    """Show a model; its length is known once it is loaded."""
    longest = host.max_seq_len
    fits = longest is None or wanted_length <= longest
    details = types.EnablementDetails(
        reason="sequence_length_unsupported",
        reason_detail=f"{host.name} takes at most {longest} tokens",
        remediation="ask for a smaller max_seq_len, or another model",
    )
    return types.SupportedModel(
        model_name=host.name,
        max_context_length=longest,
        max_seq_len=longest,
        max_enabled_seq_len=longest,
        supports_vision_language=False,
        enabled=fits,
        serverless=False,
        enablement_details=None if fits else details,
    )

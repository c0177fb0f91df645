"""What trainers run on, its logs and measurements. Source: control-plane reference 2, rows 18 to 23."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Sequence
from typing import Annotated, Final, get_args

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from loops_async import types

from .control_plane import ROOT, check_scope
from .files import Files
from .journal import DEFAULT_LIMIT, DEFAULT_WINDOW_SECONDS, MOST_LINES, MOST_WINDOW_SECONDS, Journal
from .making import Maker
from .meter import Machine, Window
from .registry import Registry
from .views import NOBODY, Views
from .web import check_word, decode, invalid, json_answer, query_int

__all__ = ["DeploymentRoutes"]

_MILLI: Final = 1_000_000  # nanoseconds
_STEP_SECONDS: Final = 60
_MOST_STEPS: Final = 10_000
_ARCHIVE_PAGE: Final = 1000

_Millis = Annotated[int, Meta(ge=0)] | None
_Seconds = Annotated[int, Meta(ge=1)] | None


class _MetricsBody(Struct):
    """`step_seconds` is the width of a point; counts are given per `time_divisor_seconds`, per step when left out."""

    start_epoch_millis: _Millis = None
    end_epoch_millis: _Millis = None
    step_seconds: _Seconds = None
    time_divisor_seconds: _Seconds = None


_METRICS = msgspec.json.Decoder(_MetricsBody)


class DeploymentRoutes:
    """The handlers of these routes. Logs and measurements are kept of samplers' deployments, too."""

    def __init__(
        self, registry: Registry, maker: Maker, views: Views, journal: Journal, machine: Machine, files: Files
    ) -> None:
        self._registry = registry
        self._maker = maker
        self._views = views
        self._journal = journal
        self._machine = machine
        self._files = files

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        one = f"{ROOT}/deployments/{{deployment_id}}"
        return [
            web.get(f"{ROOT}/deployments", self.list_deployments),
            web.get(one, self.get_deployment),
            web.post(f"{one}/deactivate", self.deactivate),
            web.post(f"{one}/metrics", self.metrics),
            web.get(f"{one}/logs", self.logs),
            web.get(f"{one}/debug_archive/files", self.debug_archive),
        ]

    async def list_deployments(self, request: web.Request) -> web.Response:
        check_scope(request)
        shown = [self._views.deployment(deployment) for deployment in self._registry.trainer_deployments()]
        return json_answer({"deployments": shown})

    async def get_deployment(self, request: web.Request) -> web.Response:
        deployment = self._registry.trainer_deployment(request.match_info["deployment_id"])
        return json_answer({"deployment": self._views.deployment(deployment)})

    async def deactivate(self, request: web.Request) -> web.Response:
        run = self._registry.latest_run_on(request.match_info["deployment_id"])
        await self._maker.stop_run(run)
        record = run.deployment.record
        return json_answer(types.Deactivated(id=record.id, base_model=record.base_model, user=NOBODY))

    async def metrics(self, request: web.Request) -> web.Response:
        deployment = self._registry.any_deployment(request.match_info["deployment_id"])
        body = decode(await request.read() or b"{}", _METRICS)
        self._machine.sample()
        metrics = deployment.meter.metrics(_window(body), self._machine)
        return json_answer({"deployment_id": deployment.record.id, "metrics": metrics})

    async def logs(self, request: web.Request) -> web.Response:
        deployment = self._registry.any_deployment(request.match_info["deployment_id"])
        end = query_int(request, "end_epoch_millis", _now_millis() + 1, least=0)
        start = query_int(request, "start_epoch_millis", max(0, end - 1000 * DEFAULT_WINDOW_SECONDS), least=0)
        if not 0 <= end - start <= 1000 * MOST_WINDOW_SECONDS:
            raise invalid("start_epoch_millis", "must be at most 7 days before end_epoch_millis, and not after it")
        limit = query_int(request, "limit", DEFAULT_LIMIT, least=1)
        if limit > MOST_LINES:
            raise invalid("limit", f"must be at most {MOST_LINES}; got {limit}")
        lines = await self._journal.read(
            deployment.record.id,
            start=start * _MILLI,
            end=end * _MILLI,
            direction=check_word("direction", request.query.get("direction", "desc"), get_args(types.SortDirection)),
            limit=limit,
            min_level=check_word("min_level", request.query.get("min_level", "DEBUG"), get_args(types.LogLevel)),
        )
        return json_answer({"logs": lines})

    async def debug_archive(self, request: web.Request) -> web.Response:
        """List the archive: one file, the log as far back as it is kept."""
        deployment_id = self._registry.any_deployment(request.match_info["deployment_id"]).record.id
        size = query_int(request, "page_size", _ARCHIVE_PAGE, least=1)
        if size > _ARCHIVE_PAGE:
            raise invalid("page_size", f"must be at most {_ARCHIVE_PAGE}; got {size}")
        start = _offset(request.query.get("page_token"))
        lines = await self._journal.read(deployment_id, start=0, end=time.time_ns() + 1, direction="asc")
        listed = await self._files.archive(
            deployment_id, "log.jsonl", msgspec.json.Encoder().encode_lines(lines), request
        )
        page = listed[start : start + size]
        more = start + size < len(listed)
        token = base64.urlsafe_b64encode(str(start + size).encode()).decode() if more else None
        return json_answer(types.DebugArchiveFilesResponse(presigned_urls=page, next_page_token=token))


def _window(body: _MetricsBody) -> Window:
    end = body.end_epoch_millis or _now_millis()
    start = end - 1000 * DEFAULT_WINDOW_SECONDS if body.start_epoch_millis is None else body.start_epoch_millis
    step = body.step_seconds or _STEP_SECONDS
    if start >= end:
        raise invalid("start_epoch_millis", "must be before end_epoch_millis")
    if (end - start) / 1000 / step > _MOST_STEPS:
        raise invalid("step_seconds", f"must make at most {_MOST_STEPS} steps of the time asked for")
    return Window(start / 1000, end / 1000, step, body.time_divisor_seconds or step)


def _offset(token: str | None) -> int:
    if token is None:
        return 0
    try:
        return int(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError) as error:
        raise invalid("page_token", f"is not one of this listing; got {token!r}") from error


def _now_millis() -> int:
    return time.time_ns() // _MILLI

"""Deployments of trainers, their logs and metrics. Source: control-plane reference 2, rows 18 to 23."""

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
from loops_async.errors import InputError

from .._http.openapi import described, object_with
from .._http.parsing import choice, decode_body, query_int
from .._http.paths import CONTROL_PLANE
from .._http.responses import json_response
from .._resources.lifecycle import Lifecycle
from .._resources.metrics import ProcessMetrics, Window
from .._resources.registry import Registry
from .._storage.logs import RETENTION_SECONDS
from .control_plane import SCOPE_QUERY, check_scope
from .files import FileRoutes
from .representations import Representations, represent_deactivated

__all__ = ["DeploymentRoutes"]

_NANOSECONDS: Final = 1_000_000
"""Of one millisecond."""

_WINDOW_MILLIS: Final = 30 * 60 * 1000
_MAX_WINDOW_MILLIS: Final = 1000 * RETENTION_SECONDS
_LOG_LINES: Final = 500
_MAX_LOG_LINES: Final = 1000
_STEP_SECONDS: Final = 60
_MAX_STEPS: Final = 10_000
_PAGE_SIZE: Final = 1000

_MAX_MILLIS: Final = (1 << 63) // _NANOSECONDS - 1
"""Times are stored in nanoseconds, as int64."""

_Millis = Annotated[int, Meta(ge=0, le=_MAX_MILLIS)]
_Seconds = Annotated[int, Meta(ge=1)] | None


class _MetricsBody(Struct):
    """`step_seconds` is the width of a point; counts are given per `time_divisor_seconds`, by default per step."""

    start_epoch_millis: _Millis | None = None
    end_epoch_millis: _Millis | None = None
    step_seconds: _Seconds = None
    time_divisor_seconds: _Seconds = None


_LOGS_QUERY: Final = {
    "start_epoch_millis": _Millis,
    "end_epoch_millis": _Millis,
    "direction": types.SortDirection,
    "limit": Annotated[int, Meta(ge=1, le=_MAX_LOG_LINES)],
    "min_level": types.LogLevel,
}
_ARCHIVE_QUERY: Final = {"page_size": Annotated[int, Meta(ge=1, le=_PAGE_SIZE)], "page_token": str}

_Deployments = object_with("ListDeploymentsResponse", deployments=list[types.Deployment])
_Deployment = object_with("DeploymentResponse", deployment=types.Deployment)
_Metrics = object_with("DeploymentMetricsResponse", deployment_id=str, metrics=types.DeploymentMetrics)
_Logs = object_with("LogsResponse", logs=list[types.LogLine])
_METRICS = msgspec.json.Decoder(_MetricsBody)


class DeploymentRoutes:
    """The handlers of these routes. Logs and metrics are also those of samplers' deployments."""

    def __init__(
        self,
        registry: Registry,
        lifecycle: Lifecycle,
        representations: Representations,
        process: ProcessMetrics,
        files: FileRoutes,
    ) -> None:
        self._registry = registry
        self._lifecycle = lifecycle
        self._represent = representations
        self._process = process
        self._files = files

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        root = f"{CONTROL_PLANE}/deployments"
        one = f"{root}/{{deployment_id}}"
        return [
            web.get(root, self.list_deployments),
            web.get(one, self.get_deployment),
            web.post(f"{one}/deactivate", self.deactivate),
            web.post(f"{one}/metrics", self.metrics),
            web.get(f"{one}/logs", self.logs),
            web.get(f"{one}/debug_archive/files", self.debug_archive),
        ]

    @described("List the deployments of trainers", _Deployments, query=SCOPE_QUERY)
    async def list_deployments(self, request: web.Request) -> web.Response:
        check_scope(request)
        deployments = [self._represent.deployment(deployment) for deployment in self._registry.trainer_deployments()]
        return json_response({"deployments": deployments})

    @described("Get a deployment of a trainer", _Deployment)
    async def get_deployment(self, request: web.Request) -> web.Response:
        deployment = self._registry.latest_run_on(request.match_info["deployment_id"]).deployment
        return json_response({"deployment": self._represent.deployment(deployment)})

    @described("Deactivate a deployment and its run", types.Deactivated)
    async def deactivate(self, request: web.Request) -> web.Response:
        run = self._registry.latest_run_on(request.match_info["deployment_id"])
        await self._lifecycle.deactivate_run(run)
        return json_response(represent_deactivated(run.deployment.record))

    @described("Get the metrics of a deployment", _Metrics, body=_MetricsBody, is_optional=True)
    async def metrics(self, request: web.Request) -> web.Response:
        deployment = self._registry.any_deployment(request.match_info["deployment_id"])
        body = await decode_body(request, _METRICS, default=b"{}")
        self._process.measure()
        metrics = deployment.metrics.deployment_metrics(_window(body), self._process)
        return json_response({"deployment_id": deployment.record.id, "metrics": metrics})

    @described("Get the log of a deployment", _Logs, query=_LOGS_QUERY)
    async def logs(self, request: web.Request) -> web.Response:
        deployment = self._registry.any_deployment(request.match_info["deployment_id"])
        end = query_int(request, "end_epoch_millis", _now_millis() + 1, minimum=0, maximum=_MAX_MILLIS)
        start = query_int(request, "start_epoch_millis", max(0, end - _WINDOW_MILLIS), minimum=0, maximum=_MAX_MILLIS)
        if not 0 <= end - start <= _MAX_WINDOW_MILLIS:
            raise InputError("start_epoch_millis", "must be at most 7 days before end_epoch_millis, and not after it")
        lines = await self._registry.logs.read(
            deployment.record.id,
            start=start * _NANOSECONDS,
            end=end * _NANOSECONDS,
            direction=choice("direction", request.query.get("direction", "desc"), get_args(types.SortDirection)),
            limit=query_int(request, "limit", _LOG_LINES, minimum=1, maximum=_MAX_LOG_LINES),
            min_level=choice("min_level", request.query.get("min_level", "DEBUG"), get_args(types.LogLevel)),
        )
        return json_response({"logs": lines})

    @described("List the files of a debug archive", types.DebugArchiveFilesResponse, query=_ARCHIVE_QUERY)
    async def debug_archive(self, request: web.Request) -> web.Response:
        """List the archive: one file, the whole log."""
        deployment_id = self._registry.any_deployment(request.match_info["deployment_id"]).record.id
        size = query_int(request, "page_size", _PAGE_SIZE, minimum=1, maximum=_PAGE_SIZE)
        start = _offset(request.query.get("page_token"))
        lines = await self._registry.logs.read(deployment_id, start=0, end=time.time_ns() + 1, direction="asc")
        log = msgspec.json.Encoder().encode_lines(lines)
        files = await self._files.write_archive(deployment_id, "log.jsonl", log, request)
        end = start + size
        return json_response(
            types.DebugArchiveFilesResponse(
                presigned_urls=files[start:end], next_page_token=_token(end) if end < len(files) else None
            )
        )


def _window(body: _MetricsBody) -> Window:
    end = body.end_epoch_millis or _now_millis()
    start = end - _WINDOW_MILLIS if body.start_epoch_millis is None else body.start_epoch_millis
    step = body.step_seconds or _STEP_SECONDS
    if start >= end:
        raise InputError("start_epoch_millis", "must be before end_epoch_millis")
    if (end - start) / 1000 / step > _MAX_STEPS:
        raise InputError("step_seconds", f"must divide the window into at most {_MAX_STEPS} steps")
    return Window(start / 1000, end / 1000, step, body.time_divisor_seconds or step)


def _token(offset: int) -> str:
    return base64.urlsafe_b64encode(str(offset).encode()).decode()


def _offset(token: str | None) -> int:
    if token is None:
        return 0
    try:
        return int(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError) as error:
        raise InputError("page_token", f"is not one of this listing; got {token!r}") from error


def _now_millis() -> int:
    return time.time_ns() // _NANOSECONDS

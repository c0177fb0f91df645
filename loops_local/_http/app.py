"""The HTTP application: routes, and the middleware around them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from loops_async.errors import InputError

from .._errors import HttpError
from .._resources.deployment import Deployment
from .._resources.metrics import ProcessMetrics
from .._resources.registry import Registry
from ..faults import Faults
from . import paths
from .authorization import DashboardAccess, authorization
from .connections import Connections
from .responses import error_response

__all__ = ["build_app"]

logger = logging.getLogger("loops_local.http")

# A little over the 24 MiB of a training request, as the hosted service has it.
_MAX_BODY_BYTES = 32 * 1024 * 1024
_OF_TRAINERS = (f"{paths.TRAINERS}/", f"{paths.LOCAL_TRAINER}/")
_OF_SAMPLERS = (f"{paths.SAMPLERS}/", f"{paths.LOCAL_SAMPLER}/")


def build_app(
    routes: Iterable[web.RouteDef],
    *,
    registry: Registry,
    api_key: str,
    dashboard: DashboardAccess,
    faults: Faults,
    process: ProcessMetrics,
    connections: Connections,
) -> web.Application:
    """Return the application."""
    app = web.Application(
        middlewares=[  # from the outermost to the innermost
            connections.middleware(),
            _fault_injection(faults),
            _request_metrics(process, registry),
            _errors_as_responses,
            authorization(registry, api_key, dashboard),
        ],
        client_max_size=_MAX_BODY_BYTES,
    )
    app.add_routes(routes)
    return app


def _fault_injection(faults: Faults) -> Middleware:
    """Return the middleware that makes the planned faults happen."""

    @web.middleware
    async def inject(request: web.Request, handler: Handler) -> web.StreamResponse:
        # Looking at the service is not what faults are planned for.
        fault = None if request.path.startswith(paths.DASHBOARD) else faults.next_for(request)
        return await (handler(request) if fault is None else fault(request, handler))

    return inject


def _request_metrics(process: ProcessMetrics, registry: Registry) -> Middleware:
    """Return the middleware that records each request to a trainer or sampler in the metrics of its deployment."""

    @web.middleware
    async def measure(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        response = await handler(request)
        seconds = time.perf_counter() - started
        logger.debug(
            "%s %s -> %d in %.0f ms", request.method, request.rel_url.raw_path, response.status, 1000 * seconds
        )
        deployment = _deployment(request, registry)
        if deployment is not None:
            process.measure()
            deployment.metrics.record(seconds, response.status, concurrent=deployment.in_flight + 1)
        return response

    return measure


def _deployment(request: web.Request, registry: Registry) -> Deployment | None:
    if request.path.startswith(f"{paths.TRAINERS}/"):
        run = registry.find_run(request.match_info.get("run_id", ""))
        return None if run is None else run.deployment
    if request.path.startswith(f"{paths.SAMPLERS}/"):
        sampler = registry.find_sampler(request.match_info.get("sampler_id", ""))
        return None if sampler is None else sampler.deployment
    return None


@web.middleware
async def _errors_as_responses(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error, also one of our own mistakes, into a JSON response."""
    try:
        return await handler(request)
    except HttpError as error:
        return error_response(error)
    except InputError as error:
        return error_response(_invalid_input(request, error))
    except web.HTTPException as error:
        if error.status < 400:
            raise
        message = f"{request.method} {request.path}: {error.reason}"
        code = error.reason.upper().replace(" ", "_")
        # The methods that there are, with 405.
        headers = {name: value for name, value in error.headers.items() if name == "Allow"}
        return error_response(HttpError(error.status, code, message, headers=headers, error=message))
    except Exception:
        message = "the service failed; its log has the reason"
        failure = HttpError(500, "INTERNAL_ERROR", message, error=message)
        logger.exception("request %s, %s %s, failed", failure.request_id, request.method, request.rel_url.raw_path)
        return error_response(failure)


def _invalid_input(request: web.Request, error: InputError) -> HttpError:
    """Refuse an argument that breaks a rule, in the form that callers of each API expect."""
    message = str(error)
    if request.path.startswith(_OF_SAMPLERS):
        # The form of vLLM.
        return HttpError(400, "BAD_REQUEST", message, error=message, type="BadRequestError")
    # Published clients repeat a 400 of a trainer for an hour.
    status = 422 if request.path.startswith(_OF_TRAINERS) else 400
    return HttpError(status, "VALIDATION_ERROR", message, details={"field": error.path})

"""The HTTP application: routes, who may call them, and how refusals are said."""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Iterable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from .control_plane import ROOT
from .faults import Faults
from .files import SIGNED_ROOTS
from .measuring import measuring
from .meter import Machine
from .registry import Registry
from .web import HttpError

__all__ = ["build_app"]

logger = logging.getLogger(__name__)

# A little over the 24 MiB of a training request, as the hosted service has it.
_LARGEST_BODY = 32 * 1024 * 1024
_LOCAL_MODE = "/local/"


def build_app(
    routes: Iterable[web.RouteDef], *, registry: Registry, api_key: str, faults: Faults, machine: Machine
) -> web.Application:
    """Return the application."""
    app = web.Application(
        middlewares=[_inject(faults), measuring(machine, registry), _explain, _authorize(registry, api_key)],
        client_max_size=_LARGEST_BODY,
    )
    app.add_routes(routes)
    return app


def _inject(faults: Faults) -> Middleware:
    @web.middleware
    async def inject(request: web.Request, handler: Handler) -> web.StreamResponse:
        fault = faults.next_for(request)
        return await (handler(request) if fault is None else fault(request, handler))

    return inject


@web.middleware
async def _explain(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every refusal and every mistake of ours into a JSON body."""
    try:
        return await handler(request)
    except HttpError as error:
        return error.answer()
    except web.HTTPException as error:
        if error.status < 400:
            raise
        message = f"{request.method} {request.path}: {error.reason}"
        return HttpError(error.status, error.reason.upper().replace(" ", "_"), message, error=message).answer()
    except Exception:
        message = "the service failed; its log says why"
        failure = HttpError(500, "INTERNAL_ERROR", message, error=message)
        logger.exception("request %s, %s %s, failed", failure.request_id, request.method, request.path)
        return failure.answer()


def _authorize(registry: Registry, api_key: str) -> Middleware:
    @web.middleware
    async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(SIGNED_ROOTS) or _fits(request.headers.get("Authorization", ""), api_key):
            return await handler(request)
        if await _is_local_mode(request, registry):
            return await handler(request)
        message = "the API key is missing or wrong; send it as 'Authorization: Bearer <key>'"
        raise HttpError(401, "UNAUTHORIZED", message, error=message)

    return authorize


def _fits(header: str, api_key: str) -> bool:
    scheme, _, key = header.partition(" ")
    known = scheme.lower() in ("bearer", "api-key")
    return hmac.compare_digest(key.strip().encode(errors="surrogateescape"), api_key.encode()) and known


async def _is_local_mode(request: web.Request, registry: Registry) -> bool:
    """Tell whether a request needs no key: local mode, and what it has saved, from this machine only."""
    # A page that is open in a browser on this machine is not its user: it has an origin, or a name of its own.
    if not _is_loopback(request.remote) or not _is_loopback(request.url.host) or "Origin" in request.headers:
        return False
    if request.path.startswith(_LOCAL_MODE):
        return True
    if request.method == "GET" and request.path == f"{ROOT}/checkpoints":
        run = registry.find_run(request.query.get("run_id", ""))
        return run is not None and run.record.local and set(request.query) == {"run_id"}
    if request.method == "GET" and request.path.startswith(f"{ROOT}/checkpoints/") and request.path.endswith("/files"):
        checkpoint = await registry.checkpoints.find(request.match_info.get("checkpoint_id", ""))
        return checkpoint is not None and checkpoint.local
    return False


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False

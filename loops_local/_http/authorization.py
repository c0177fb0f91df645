"""Who may make a request: callers with the API key, and in local mode every process of this machine."""

from __future__ import annotations

import hmac
import ipaddress

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from .._errors import HttpError
from .._resources.registry import Registry
from . import paths

__all__ = ["authorization"]

# Below these roots, the URL's signature takes the place of the key.
_SIGNED = (f"{paths.FILES}/", f"{paths.ARCHIVES}/")
_CHECKPOINTS = f"{paths.CONTROL_PLANE}/checkpoints"


def authorization(registry: Registry, api_key: str) -> Middleware:
    """Return the middleware that refuses requests without permission."""

    @web.middleware
    async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
        if (
            request.path == paths.OPENAPI
            or request.path.startswith(_SIGNED)
            or _has_key(request.headers.get("Authorization", ""), api_key)
        ):
            return await handler(request)
        if await _needs_no_key(request, registry):
            return await handler(request)
        message = "the API key is missing or wrong; send it as 'Authorization: Bearer <key>'"
        raise HttpError(401, "UNAUTHORIZED", message, error=message)

    return authorize


def _has_key(header: str, api_key: str) -> bool:
    scheme, _, key = header.partition(" ")
    known = scheme.lower() in ("bearer", "api-key")
    return hmac.compare_digest(key.strip().encode(errors="surrogateescape"), api_key.encode()) and known


async def _needs_no_key(request: web.Request, registry: Registry) -> bool:
    """Return whether the request uses local mode, or reads what local mode saved, from this machine."""
    # A web page that is open in a browser on this machine is not its user: it sends an origin, or another host name.
    if not _is_loopback(request.remote) or not _is_loopback(request.url.host) or "Origin" in request.headers:
        return False
    if request.path.startswith(f"{paths.LOCAL}/"):
        return True
    if request.method == "GET" and request.path == _CHECKPOINTS:
        run = registry.find_run(request.query.get("run_id", ""))
        return run is not None and run.record.local and set(request.query) == {"run_id"}
    if request.method == "GET" and request.path.startswith(f"{_CHECKPOINTS}/") and request.path.endswith("/files"):
        checkpoint = await registry.checkpoints.find(request.match_info.get("checkpoint_id", ""))
        return checkpoint is not None and checkpoint.local
    return False


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False

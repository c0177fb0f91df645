"""Who may make a request: callers with the API key, and in local mode every process of this machine.

The dashboard's page needs no permission, since it holds no data; its data may also be read with a token of its own,
which opens nothing else.
"""

from __future__ import annotations

import hmac
import ipaddress

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from msgspec import Struct

from .._errors import HttpError
from .._resources.registry import Registry
from . import paths

__all__ = ["DashboardAccess", "authorization"]

# Below these roots, the URL's signature takes the place of the key.
_SIGNED = (f"{paths.FILES}/", f"{paths.ARCHIVES}/")
_CHECKPOINTS = f"{paths.CONTROL_PLANE}/checkpoints"


class DashboardAccess(Struct, frozen=True):
    """The token that opens the data of the dashboard, and the host by which the service was asked to be reachable."""

    token: str
    host: str

    def check_place(self, request: web.Request) -> None:
        """Refuse a request under the name of another host, or of another site's page.

        A page of another site could make its own name lead to this machine, and then read what it answers.
        """
        own = f"{request.scheme}://{request.host}"
        if not self._is_own(request) or request.headers.get("Origin", own) != own:
            message = "the dashboard answers only at the address of this service, to its own page"
            raise HttpError(403, "FORBIDDEN", message, error=message)

    def _is_own(self, request: web.Request) -> bool:
        host = request.url.host
        local = request.get_extra_info("sockname")
        return _is_loopback(host) or host == self.host or (local is not None and host == local[0])

    def opens(self, request: web.Request) -> bool:
        """Return whether a request needs no API key."""
        if request.path != paths.DASHBOARD_DATA:
            return True
        return request.method == "GET" and _has_key(request.headers.get("Authorization", ""), self.token)


def authorization(registry: Registry, api_key: str, dashboard: DashboardAccess) -> Middleware:
    """Return the middleware that refuses requests without permission."""

    @web.middleware
    async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
        if _is_of_dashboard(request.path):
            dashboard.check_place(request)
            if dashboard.opens(request):
                return await handler(request)
        if (
            request.path == paths.OPENAPI
            or request.path.startswith(_SIGNED)
            or _has_key(request.headers.get("Authorization", ""), api_key)
        ):
            return await handler(request)
        if await _needs_no_key(request, registry):
            return await handler(request)
        message = "the API key is missing or wrong; send it as 'Authorization: Bearer <key>'"
        raise HttpError(401, "UNAUTHORIZED", message, headers={"WWW-Authenticate": "Bearer"}, error=message)

    return authorize


def _is_of_dashboard(path: str) -> bool:
    return path == paths.DASHBOARD or path.startswith(f"{paths.DASHBOARD}/")


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

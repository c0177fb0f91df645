"""The HTTP application: routes, and the middleware around them."""

from __future__ import annotations

from collections.abc import Iterable

from aiohttp import web

from .._resources.metrics import ProcessMetrics
from .._resources.registry import Registry
from ..faults import Faults
from .authorization import authorization
from .middleware import errors_as_responses, fault_injection, request_metrics

__all__ = ["build_app"]

# A little over the 24 MiB of a training request, as the hosted service has it.
_MAX_BODY_BYTES = 32 * 1024 * 1024


def build_app(
    routes: Iterable[web.RouteDef], *, registry: Registry, api_key: str, faults: Faults, process: ProcessMetrics
) -> web.Application:
    """Return the application."""
    app = web.Application(
        # From the outermost to the innermost.
        middlewares=[
            fault_injection(faults),
            request_metrics(process, registry),
            errors_as_responses,
            authorization(registry, api_key),
        ],
        client_max_size=_MAX_BODY_BYTES,
    )
    app.add_routes(routes)
    return app

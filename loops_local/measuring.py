"""Measures the requests of data planes."""

from __future__ import annotations

import time

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from .meter import Machine
from .provisioning import Deployment

__all__ = ["measure", "measuring"]

_DEPLOYMENT = "loops_local.deployment"


def measure(request: web.Request, deployment: Deployment) -> None:
    """Count `request` among those of `deployment`."""
    request[_DEPLOYMENT] = deployment


def measuring(machine: Machine) -> Middleware:
    """Return the middleware that does the counting."""

    @web.middleware
    async def measure_time(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        response = await handler(request)
        deployment = request.get(_DEPLOYMENT)
        if deployment is not None:
            machine.sample()
            deployment.meter.record(time.perf_counter() - started, response.status, deployment.users + 1)
        return response

    return measure_time

"""Measures the requests of data planes."""

from __future__ import annotations

import time

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from .meter import Machine
from .provisioning import Deployment
from .registry import Registry

__all__ = ["measuring"]


def measuring(machine: Machine, registry: Registry) -> Middleware:
    """Return the middleware that counts each request among those of its trainer or sampler."""

    @web.middleware
    async def measure(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        response = await handler(request)
        deployment = _deployment(request, registry)
        if deployment is not None:
            machine.sample()
            deployment.meter.record(time.perf_counter() - started, response.status, deployment.users + 1)
        return response

    return measure


def _deployment(request: web.Request, registry: Registry) -> Deployment | None:
    if request.path.startswith("/trainers/"):
        run = registry.find_run(request.match_info.get("run_id", ""))
        return None if run is None else run.deployment
    if request.path.startswith("/samplers/"):
        sampler = registry.find_sampler(request.match_info.get("sampler_id", ""))
        return None if sampler is None else sampler.deployment
    return None

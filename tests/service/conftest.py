"""Services on the echo engine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import aiohttp
import pytest

from loops_local import LocalService
from loops_local._resources import deployment
from tests.service.api import Api

TimePasses: TypeAlias = Callable[[float], None]


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def serve(http: aiohttp.ClientSession) -> AsyncIterator[Callable[..., Any]]:
    """Start services, which are closed in the end."""
    services: list[LocalService] = []

    async def start(**options: Any) -> Api:
        local = LocalService(**{"engine": "echo", "provisioning_seconds": 0.0} | options)
        await local.__aenter__()
        services.append(local)
        return Api(local, http)

    yield start
    for local in reversed(services):
        await local.__aexit__(None, None, None)


@pytest.fixture
def time_passes(monkeypatch: pytest.MonkeyPatch) -> TimePasses:
    """Let some seconds pass for deployments, at once."""
    monotonic, ahead = deployment.time.monotonic, 0.0

    def pass_by(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    monkeypatch.setattr(deployment, "time", SimpleNamespace(monotonic=lambda: monotonic() + ahead, time=time.time))
    return pass_by


@pytest.fixture
async def api(serve: Callable[..., Any]) -> Api:
    """A service whose runs are ready at once."""
    return await serve(version_wait_seconds=0.05)

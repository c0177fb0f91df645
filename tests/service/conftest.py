"""Services on the echo engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from loops_local import LocalService
from tests.service.api import Api


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
async def api(serve: Callable[..., Any]) -> Api:
    """A service whose runs are ready at once."""
    return await serve(version_wait_seconds=0.05)

"""Services, and clients of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from loops_async import SamplingClient, ServiceClient, TrainingClient
from loops_local import LocalService, serve_in_thread


@pytest.fixture(scope="session")
def tiny() -> Iterator[LocalService]:
    """One service that really trains, for the tests of numbers; importing torch takes seconds."""
    with serve_in_thread(engine="torch", model="tiny", provisioning_seconds=0.0) as local:
        yield local


@pytest.fixture
async def local() -> AsyncIterator[LocalService]:
    """A service of the test's own, in its own event loop."""
    async with LocalService(engine="echo", provisioning_seconds=0.0) as local:
        yield local


@pytest.fixture
async def service(local: LocalService) -> AsyncIterator[ServiceClient]:
    async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        yield service


@pytest.fixture
async def trainer(service: ServiceClient) -> TrainingClient:
    return await service.create_lora_training_client("echo", rank=4)


@pytest.fixture
async def sampler(service: ServiceClient) -> SamplingClient:
    return await service.create_sampling_client("echo")

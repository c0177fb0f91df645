"""The client under test, and a service that says what the test wants it to say."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from loops_async import SamplingClient, ServiceClient, TrainingClient
from loops_async._session.heartbeat import Heartbeat
from tests.support.clock import Clock
from tests.support.colours import Colour
from tests.support.files import FileStore
from tests.support.scripted import KEY, MODEL, ScriptedService, serving


@pytest.fixture
async def service() -> AsyncIterator[ScriptedService]:
    async with serving() as service:
        yield service


@pytest.fixture
async def client(service: ScriptedService) -> AsyncIterator[ServiceClient]:
    """A client as a user of the hosted service has it: with a key, its session open."""
    async with ServiceClient(api_key=KEY, base_url=service.url) as client:
        yield client


@pytest.fixture
async def coloured_client(service: ScriptedService, colour: Colour) -> AsyncIterator[ServiceClient]:
    """The same in each colour, for what the generated twin could do otherwise."""
    async with colour.connected(api_key=KEY, base_url=service.url) as client:
        yield client


@pytest.fixture
async def trainer(client: ServiceClient, service: ScriptedService) -> TrainingClient:
    """A ready trainer; the requests on the way are forgotten, and `seq_id` 1 is taken."""
    trainer = await client.create_lora_training_client(MODEL, rank=8)
    service.seen.clear()
    return trainer


@pytest.fixture
async def sampler(client: ServiceClient, service: ScriptedService) -> SamplingClient:
    """A ready standalone sampler; the requests on the way are forgotten."""
    sampler = await client.create_sampling_client(MODEL)
    service.seen.clear()
    return sampler


@pytest.fixture
def quick(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Pauses between tries take no time. There is no heartbeat, which would never rest."""
    monkeypatch.setattr(Heartbeat, "add", lambda *_: None)
    return clock


@pytest.fixture
def store(service: ScriptedService) -> FileStore:
    """Where the service keeps the files of checkpoints."""
    return FileStore(service)

"""The client under test, and a service that says what the test wants it to say."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from loops_async import SamplingClient, ServiceClient, TrainingClient
from loops_async._session.heartbeat import Heartbeat
from tests.clock import Clock
from tests.wire.scripted import MODEL, ScriptedService

KEY = "secret-key-123456"


@pytest.fixture
async def service() -> AsyncIterator[ScriptedService]:
    scripted = ScriptedService()
    runner = web.ServerRunner(web.Server(scripted.handle, access_log=None), shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    [address] = runner.addresses
    scripted.url = f"http://127.0.0.1:{address[1]}"
    yield scripted
    await runner.cleanup()


@pytest.fixture
async def client(service: ScriptedService) -> AsyncIterator[ServiceClient]:
    """A client as a user of the hosted service has it: with a key, its session open."""
    async with ServiceClient(api_key=KEY, base_url=service.url) as client:
        yield client


@pytest.fixture
async def trainer(client: ServiceClient, service: ScriptedService) -> TrainingClient:
    """A ready trainer; what was asked for on the way is forgotten, and `seq_id` 1 is taken."""
    trainer = await client.create_lora_training_client(MODEL, rank=8)
    service.seen.clear()
    return trainer


@pytest.fixture
async def sampler(client: ServiceClient, service: ScriptedService) -> SamplingClient:
    """A ready standalone sampler; what was asked for on the way is forgotten."""
    sampler = await client.create_sampling_client(MODEL)
    service.seen.clear()
    return sampler


@pytest.fixture
def quick(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Pauses between tries take no time. There is no heartbeat, which would never rest."""
    monkeypatch.setattr(Heartbeat, "add", lambda *_: None)
    return clock

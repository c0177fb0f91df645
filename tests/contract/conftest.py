"""The embedded service over real sockets, and a client of each colour."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import pytest

from loops_async import ServiceClient, TrainingClient
from loops_async._http import retry
from loops_local import LocalService, serve_in_thread
from loops_local.engine.base import SampleJob
from tests.support.colours import Colour
from tests.support.engines import Engines, WatchedEngine


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tries, what would be half a second and more is a hundredth."""
    monkeypatch.setattr(retry, "pause_before", lambda *_: 0.01)


@pytest.fixture(autouse=True)
def no_faults_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test planned and did not meet must not hit the next one."""
    yield
    if "local" in request.fixturenames:
        request.getfixturevalue("local").faults.clear()


@pytest.fixture(scope="module")
def engines() -> Engines:
    return Engines()


@pytest.fixture(scope="module")
def local(engines: Engines) -> Iterator[LocalService]:
    """One service for all tests of a module: runs share nothing, and everything is provisioned at once."""
    with serve_in_thread(engine=engines, provisioning_seconds=0.0) as local:
        yield local


@pytest.fixture
def engine(engines: Engines) -> Iterator[WatchedEngine]:
    """The engine of a base model that only this test uses."""
    engine = engines(f"watched-{uuid4().hex[:8]}")
    yield engine
    engine.training.set()
    engine.release_samples()


@pytest.fixture
async def service(colour: Colour, local: LocalService) -> AsyncIterator[ServiceClient]:
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
        yield service


@pytest.fixture
async def trainer(service: ServiceClient, engine: WatchedEngine) -> TrainingClient:
    return await service.create_lora_training_client(engine.name, rank=8)


@pytest.fixture
def jobs(engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch) -> list[SampleJob]:
    """What the engine is asked to sample."""
    seen: list[SampleJob] = []
    sample = engine.sample

    def noted(job: SampleJob) -> Any:
        seen.append(job)
        return sample(job)

    monkeypatch.setattr(engine, "sample", noted)
    return seen

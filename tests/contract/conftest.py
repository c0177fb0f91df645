"""The service under test, over real sockets, and a client of each colour."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from loops_async import ServiceClient, TrainingClient
from loops_async._http import retry
from loops_local import LocalService, serve_in_thread
from tests.contract._colours import Async, Blocking, Colour
from tests.contract._engine import Engines, WatchedEngine

MOST_CALLS_AT_ONCE = 128


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tries, what would be half a second and more is a hundredth."""
    monkeypatch.setattr(retry, "_pause", lambda *_: 0.01)


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
    """One service for all tests of a module: runs share nothing, and what is provisioned is ready at once."""
    with serve_in_thread(engine=engines, provisioning_seconds=0.0) as local:
        yield local


@pytest.fixture
def engine(engines: Engines) -> Iterator[WatchedEngine]:
    """The engine of a base model that only this test uses."""
    engine = engines(f"watched-{uuid4().hex[:8]}")
    yield engine
    engine.training.set()
    engine.release_samples()


@pytest.fixture(params=["async", "sync"])
def colour(request: pytest.FixtureRequest) -> Iterator[Colour]:
    if request.param == "async":
        yield Async()
    else:
        with ThreadPoolExecutor(MOST_CALLS_AT_ONCE, "blocking") as threads:
            yield Blocking(threads)


@pytest.fixture
async def service(colour: Colour, local: LocalService) -> AsyncIterator[ServiceClient]:
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
        yield service


@pytest.fixture
async def trainer(service: ServiceClient, engine: WatchedEngine) -> TrainingClient:
    return await service.create_lora_training_client(engine.name, rank=8)

"""Provisioning that takes time, takes too long, or fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import pytest

from loops_async import (
    NotReadyError,
    ProvisioningError,
    SamplerTerminatedError,
    ServiceClient,
)
from loops_local import LocalService, RefusedError, serve_in_thread
from loops_local.engine.echo import EchoEngine
from tests.contract._colours import Colour
from tests.contract._helpers import FEW_TOKENS, PROMPT, eventually, run_python

PROVISIONING_SECONDS = 0.5
RUNS = 64


def load(name: str) -> EchoEngine:
    if name == "broken":
        raise RefusedError("its weights are corrupt")
    return EchoEngine(name)


@pytest.fixture(scope="module")
def local() -> Iterator[LocalService]:
    """A service whose trainers and samplers take a while to come up, or never do."""
    with serve_in_thread(engine=load, provisioning_seconds=PROVISIONING_SECONDS) as local:
        yield local


@pytest.fixture(scope="module")
def endless() -> Iterator[LocalService]:
    """A service that is never done with provisioning."""
    with serve_in_thread(engine="echo", provisioning_seconds=3600.0) as local:
        yield local


@pytest.fixture
async def endless_service(colour: Colour, endless: LocalService) -> AsyncIterator[ServiceClient]:
    async with colour.connected(base_url=endless.base_url, api_key=endless.api_key) as service:
        yield service


async def test_a_trainer_and_its_sampler_are_waited_for(service: ServiceClient) -> None:
    started = time.monotonic()
    trainer = await service.create_lora_training_client("echo")

    assert time.monotonic() - started >= PROVISIONING_SECONDS
    await trainer.health()
    deployment_id = (await service.control_plane.get_run(trainer.run_id)).deployment_id
    assert (await service.control_plane.get_deployment(str(deployment_id))).status.name == "RUNNING"
    sampler = await trainer.save_weights_and_get_sampling_client()
    assert (await sampler.sample(PROMPT, 1, FEW_TOKENS)).sequences


async def test_a_standalone_sampler_is_waited_for(service: ServiceClient, local: LocalService) -> None:
    started = time.monotonic()
    sampler = await service.create_sampling_client("echo")

    assert time.monotonic() - started >= PROVISIONING_SECONDS
    statuses = local.faults.watch("GET */v1/models/*")
    await sampler.ensure_ready()
    assert (await sampler.sample(PROMPT, 1, FEW_TOKENS)).sequences
    assert not statuses  # once it was ready, nobody asks again


async def test_many_runs_are_provisioned_at_once(service: ServiceClient) -> None:
    trainers = await asyncio.gather(*(service.create_lora_training_client("echo") for _ in range(RUNS)))

    assert len({trainer.run_id for trainer in trainers}) == RUNS


MANY = """
import asyncio, sys, threading
import loops_async as loops

async def main():
    async with loops.ServiceClient() as service:
        await asyncio.gather(*(service.create_lora_training_client("echo") for _ in range(int(sys.argv[1]))))
        print(threading.active_count(), end=" ")
    print(threading.active_count())

asyncio.run(main())
"""


async def test_the_async_client_has_no_thread_of_its_own(local: LocalService) -> None:
    printed = await run_python(MANY, str(RUNS), BASETEN_API_KEY=local.api_key, LOOPS_BASE_URL=local.base_url)
    assert printed == "1 1"


async def test_a_trainer_that_is_not_ready_in_time(endless_service: ServiceClient) -> None:
    never = f"never-{uuid4()}"
    with pytest.raises(TimeoutError, match=r"not ready after 0\.3 s.*deploying.*larger ready_timeout") as raised:
        await endless_service.create_lora_training_client(never, ready_timeout=0.3)
    assert isinstance(raised.value, NotReadyError)

    (run,) = await endless_service.control_plane.list_runs(base_model=never)
    assert run.status.name == "INACTIVE"


async def test_a_sampler_that_is_not_ready_in_time(endless_service: ServiceClient) -> None:
    with pytest.raises(NotReadyError, match=r"not ready after 0\.1 s.*larger ready_timeout"):
        await endless_service.create_sampling_client("echo", ready_timeout=0.1)


async def test_a_trainer_that_fails(service: ServiceClient) -> None:
    with pytest.raises(ProvisioningError, match=r"deployment \w+ is FAILED.*create a new run") as raised:
        await service.create_lora_training_client("broken")
    assert raised.value.status == "FAILED"


async def test_a_sampler_that_fails(service: ServiceClient) -> None:
    with pytest.raises(SamplerTerminatedError, match=r"deployment \w+ .*is DEPLOY_FAILED") as raised:
        await service.create_sampling_client("broken")
    assert raised.value.status == "DEPLOY_FAILED"
    assert raised.value.deployment_id


async def test_a_trainer_that_is_stopped_while_it_comes_up(
    endless_service: ServiceClient, endless: LocalService
) -> None:
    stopped = f"stopped-{uuid4()}"
    probes = endless.faults.watch("GET */health")
    created = asyncio.ensure_future(endless_service.create_lora_training_client(stopped))
    await eventually(lambda: probes)
    (run,) = await endless_service.control_plane.list_runs(base_model=stopped)
    await endless_service.control_plane.deactivate_deployment(str(run.deployment_id))
    with pytest.raises(ProvisioningError, match="is STOPPED"):
        await created

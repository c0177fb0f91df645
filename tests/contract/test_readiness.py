"""Provisioning that takes time, takes too long or fails: what is reported on the way, and that nothing is left over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import pytest

from loops_async import (
    BadRequestError,
    BasetenDeployment,
    CreateRunRequest,
    LocalDeployment,
    NotReadyError,
    ProvisioningError,
    ProvisioningEvent,
    SamplerTerminatedError,
    ServerlessDeployment,
    ServiceClient,
)
from loops_local import LocalService, serve_in_thread
from tests.support.colours import Colour
from tests.support.engines import echo_unless_broken
from tests.support.limits import expire_when
from tests.support.work import FEW_TOKENS, PROMPT, eventually, run_python

PROVISIONING_SECONDS = 0.3
RUNS = 64
HUNDREDS = 256


@pytest.fixture(scope="module")
def local() -> Iterator[LocalService]:
    """A service whose trainers and samplers take a while to come up, or never do."""
    with serve_in_thread(engine=echo_unless_broken, provisioning_seconds=PROVISIONING_SECONDS) as local:
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


def stages(events: list[ProvisioningEvent]) -> list[tuple[str, str | None]]:
    return [(event.stage, event.status) for event in events]


async def status_of(service: ServiceClient, base_model: str) -> str | None:
    (run,) = await service.control_plane.list_runs(base_model=base_model)
    return run.status.name


# --- what comes up ---


async def test_a_trainer_and_its_sampler_are_waited_for(service: ServiceClient) -> None:
    events: list[ProvisioningEvent] = []
    trainer = await service.create_lora_training_client("echo", on_progress=events.append)

    told = stages(events)
    assert told[0] == ("created", None)
    assert told[-2:] == [("waiting", "RUNNING"), ("ready", None)]
    assert {status for stage, status in told if stage == "waiting"} <= {"CREATED", "DEPLOYING", "RUNNING"}
    assert len(set(told)) == len(told), "each change is reported once"
    assert {(event.kind, event.id) for event in events} == {("run", trainer.run_id)}
    assert events[-1].seconds >= PROVISIONING_SECONDS
    await trainer.health()
    deployment_id = (await service.control_plane.get_run(trainer.run_id)).deployment_id
    assert (await service.control_plane.get_deployment(str(deployment_id))).status.name == "RUNNING"
    sampler = await trainer.save_weights_and_get_sampling_client()
    assert (await sampler.sample(PROMPT, 1, FEW_TOKENS)).sequences


async def test_a_standalone_sampler_is_waited_for(service: ServiceClient, local: LocalService) -> None:
    events: list[ProvisioningEvent] = []
    sampler = await service.create_sampling_client("echo", on_progress=events.append)

    told = stages(events)
    assert (told[0], told[-2:]) == (("created", None), [("waiting", "ACTIVE"), ("ready", None)])
    assert {event.kind for event in events} == {"sampler"}
    assert events[-1].seconds >= PROVISIONING_SECONDS
    statuses = local.faults.watch("GET */v1/models/*")
    await sampler.ensure_ready()
    assert (await sampler.sample(PROMPT, 1, FEW_TOKENS)).sequences
    assert not statuses, "a sampler that was ready once is not checked again"


async def test_many_trainers_are_provisioned_at_once(service: ServiceClient) -> None:
    trainers = await asyncio.gather(*(service.create_lora_training_client("echo") for _ in range(RUNS)))

    assert len({trainer.run_id for trainer in trainers}) == RUNS


async def test_hundreds_of_runs_are_created_and_watched_at_once(local: LocalService) -> None:
    async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        request = CreateRunRequest(session_id=service.session_id, base_model="m")
        runs = await asyncio.gather(*(service.control_plane.create_run(request) for _ in range(HUNDREDS)))
        watched = await asyncio.gather(*(service.wait_for_run(run.id) for run in runs))
        assert {run.id for run in watched} == {run.id for run in runs}
        assert len({run.id for run in runs}) == HUNDREDS
        assert await service.wait_for_run(runs[0].id)


MANY = """
import asyncio, sys, threading
import loops_async as loops

async def main():
    async with loops.ServiceClient(on_exit="leave") as service:
        await asyncio.gather(*(service.create_lora_training_client("echo") for _ in range(int(sys.argv[1]))))
        print(threading.active_count(), end=" ")
    print(threading.active_count())

asyncio.run(main())
"""


async def test_the_async_client_has_no_thread_of_its_own(local: LocalService) -> None:
    printed = await run_python(MANY, str(RUNS), BASETEN_API_KEY=local.api_key, LOOPS_BASE_URL=local.base_url)
    assert printed == "1 1"


async def test_a_run_can_be_provisioned_without_training_it(service: ServiceClient, local: LocalService) -> None:
    run = await service.provision_run(CreateRunRequest(session_id=service.session_id, base_model="m", lora_rank=4))
    assert run.base_url.startswith(local.base_url)
    assert (await service.control_plane.get_deployment(str(run.deployment_id))).status.name == "RUNNING"


async def test_a_deployment_is_waited_for_without_a_client(
    service: ServiceClient, colour: Colour, local: LocalService
) -> None:
    ensure_ready = colour.function("SamplingClient.ensure_ready_for_deployment")
    name = f"deployed-{uuid4()}"
    creating = asyncio.ensure_future(service.create_sampling_client(name))
    samplers: list[Any] = []
    while not samplers:
        samplers = [one for one in await service.control_plane.list_samplers() if one.base_model == name]
    (sampler,) = samplers
    deployment = BasetenDeployment(
        base_url=sampler.base_url,
        model_id=str(sampler.model_id),
        deployment_id=str(sampler.deployment_id),
        api_base_url=local.base_url,
    )
    common: Any = {"base_model": name, "deployment": deployment, "api_key": local.api_key}
    local.faults.answer("GET */v1/models/*", 200, {"status": "BUILDING"}, times=10_000)
    with pytest.raises(NotReadyError):
        await ensure_ready(**common, ready_timeout=0.01)
    local.faults.clear()
    await ensure_ready(**common)
    assert (await service.control_plane.get_sampler(sampler.id)).status.name == "ACTIVE"
    await creating
    await service.control_plane.deactivate_sampler(sampler.id)
    with pytest.raises(SamplerTerminatedError):
        await ensure_ready(**common)


@pytest.mark.parametrize("kind", [LocalDeployment, ServerlessDeployment])
async def test_other_deployments_are_always_ready(colour: Colour, kind: Any) -> None:
    nowhere = kind(base_url="http://127.0.0.1:9")
    ensure_ready = colour.function("SamplingClient.ensure_ready_for_deployment")
    await ensure_ready(base_model="echo", deployment=nowhere, api_key="k")


# --- what does not ---


@pytest.mark.parametrize(("keep", "status"), [(False, "INACTIVE"), (True, "ACTIVE")])
async def test_a_trainer_that_is_not_ready_in_time_is_deactivated_unless_it_is_kept(
    endless_service: ServiceClient,
    endless: LocalService,
    monkeypatch: pytest.MonkeyPatch,
    keep: bool,
    status: str,
) -> None:
    never = f"never-{uuid4()}"
    probes = endless.faults.watch("GET */health", times=2)
    expire_when(lambda: len(probes) == 2, monkeypatch, seconds=0.1)
    with pytest.raises(TimeoutError, match=r"not ready after 0\.1 s.*deploying.*larger ready_timeout") as late:
        await endless_service.create_lora_training_client(never, ready_timeout=0.1, keep_on_failure=keep)
    assert isinstance(late.value, NotReadyError)
    assert await status_of(endless_service, never) == status
    notes = getattr(late.value, "__notes__", [])
    assert any("was kept (keep_on_failure)" in note for note in notes) is keep


async def test_a_sampler_that_is_not_ready_in_time(endless_service: ServiceClient) -> None:
    with pytest.raises(NotReadyError, match=r"not ready after 0\.1 s.*larger ready_timeout"):
        await endless_service.create_sampling_client("echo", ready_timeout=0.1)


async def test_a_trainer_that_fails_is_deactivated_and_says_why(service: ServiceClient) -> None:
    events: list[ProvisioningEvent] = []
    with pytest.raises(
        ProvisioningError, match=r"deployment \w+ is FAILED \(.*its weights are corrupt.*loops deployments logs"
    ) as failed:
        await service.create_lora_training_client("broken", on_progress=events.append)
    assert failed.value.status == "FAILED"
    assert stages(events)[-2:] == [("failed", None), ("deactivated", None)]
    assert (await service.control_plane.get_run(events[-1].id)).status.name == "INACTIVE"


async def test_a_sampler_that_fails_is_deactivated(service: ServiceClient) -> None:
    with pytest.raises(SamplerTerminatedError, match=r"deployment \w+ .*is DEPLOY_FAILED") as failed:
        await service.create_sampling_client("broken")
    assert failed.value.status == "DEPLOY_FAILED"
    samplers = await service.control_plane.list_samplers()
    (status,) = [one.status.name for one in samplers if one.deployment_id == failed.value.deployment_id]
    assert status == "INACTIVE"


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


class Odd(BaseException):
    """What some frameworks raise to end a program."""


@pytest.mark.parametrize("error", [ZeroDivisionError, Odd])
async def test_a_callback_that_fails_fails_the_call(service: ServiceClient, error: type[BaseException]) -> None:
    def fail(_: ProvisioningEvent) -> None:
        raise error

    name = f"fails-{uuid4()}"
    with pytest.raises(error):
        await service.create_lora_training_client(name, on_progress=fail)
    assert await status_of(service, name) == "INACTIVE"


async def test_a_callback_that_fails_while_a_sampler_starts_fails_its_own_call_alone(
    service: ServiceClient,
) -> None:
    def fail(event: ProvisioningEvent) -> None:
        if event.stage == "waiting":
            raise Odd

    events: list[ProvisioningEvent] = []
    failing = service.create_sampling_client("echo", on_progress=fail)
    well = service.create_sampling_client("echo", on_progress=events.append)
    failed, sampler = await asyncio.gather(failing, well, return_exceptions=True)
    assert isinstance(failed, Odd)
    assert not isinstance(sampler, BaseException)
    assert events[-1].stage == "ready"


async def test_a_run_whose_trainer_refuses_its_first_operation_is_deactivated(
    service: ServiceClient, local: LocalService
) -> None:
    name = f"refused-{uuid4()}"
    local.faults.answer("POST */init_trainer_server", 422, {"message": "no"})
    with pytest.raises(BadRequestError):
        await service.create_lora_training_client(name)
    assert await status_of(service, name) == "INACTIVE"


async def test_a_run_that_is_watched_in_vain_stays_as_it_is(endless_service: ServiceClient) -> None:
    request = CreateRunRequest(session_id=endless_service.session_id, base_model="m")
    run = await endless_service.control_plane.create_run(request)
    with pytest.raises(NotReadyError):
        await endless_service.wait_for_run(run.id, ready_timeout=0.01)
    assert (await endless_service.control_plane.get_run(run.id)).status.name == "ACTIVE"

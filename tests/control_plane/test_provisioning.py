"""Provisioning: what is told on the way, and that nothing is left that nobody asked to keep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import pytest

import loops_async
from loops_async import (
    ConfigError,
    CreateRunRequest,
    NotFoundError,
    NotReadyError,
    ProvisioningError,
    ProvisioningEvent,
    SamplerTerminatedError,
    ServiceClient,
)
from loops_local import LocalService, serve_in_thread
from tests.clock import Clock
from tests.control_plane.stub import KEY, Colour, Stub
from tests.engines import echo_unless_broken

WHEN = "2026-06-24T18:02:11Z"
HUNDREDS = 256


@pytest.fixture(scope="module")
def local() -> Iterator[LocalService]:
    with serve_in_thread(engine=echo_unless_broken, provisioning_seconds=0.3) as local:
        yield local


@pytest.fixture
async def service(local: LocalService) -> AsyncIterator[ServiceClient]:
    async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        yield service


def stages(events: list[ProvisioningEvent]) -> list[tuple[str, str | None]]:
    return [(event.stage, event.status) for event in events]


async def status_of(service: ServiceClient, base_model: str) -> list[str | None]:
    return [run.status.name for run in await service.control_plane.list_runs(base_model=base_model)]


# --- what is told ---


async def test_a_run_tells_its_progress(colour: Colour, local: LocalService) -> None:
    events: list[ProvisioningEvent] = []
    trainer = await colour.service(
        local.base_url,
        lambda service: service.create_lora_training_client("m", on_progress=events.append),
        api_key=local.api_key,
    )
    told = stages(events)
    assert told[0] == ("created", None)
    assert told[-2:] == [("waiting", "RUNNING"), ("ready", None)]
    assert {status for stage, status in told if stage == "waiting"} <= {"CREATED", "DEPLOYING", "RUNNING"}
    assert len(set(told)) == len(told), "each change is told once"
    assert {(event.kind, event.id) for event in events} == {("run", trainer.run_id)}
    assert 0.3 <= events[-1].seconds < 30


async def test_a_sampler_tells_its_progress(service: ServiceClient) -> None:
    events: list[ProvisioningEvent] = []
    await service.create_sampling_client("m", on_progress=events.append)
    told = stages(events)
    assert (told[0], told[-2:]) == (("created", None), [("waiting", "ACTIVE"), ("ready", None)])
    assert {event.kind for event in events} == {"sampler"}


async def test_a_failure_tells_why_and_that_it_was_switched_off(service: ServiceClient) -> None:
    events: list[ProvisioningEvent] = []
    with pytest.raises(ProvisioningError, match=r"is FAILED \(.*its weights are corrupt.*loops deployments logs"):
        await service.create_lora_training_client("broken", on_progress=events.append)
    assert stages(events)[-2:] == [("failed", None), ("deactivated", None)]
    assert set(await status_of(service, "broken")) == {"INACTIVE"}


async def test_a_callback_that_fails_fails_the_call(service: ServiceClient) -> None:
    def fail(_: ProvisioningEvent) -> None:
        raise ZeroDivisionError

    name = f"fails-{uuid4()}"
    with pytest.raises(ZeroDivisionError):
        await service.create_lora_training_client(name, on_progress=fail)
    assert await status_of(service, name) == ["INACTIVE"]


# --- what is left ---


@pytest.mark.parametrize(("keep", "status"), [(False, "INACTIVE"), (True, "ACTIVE")])
async def test_what_is_not_ready_in_time_is_switched_off_unless_it_is_kept(
    service: ServiceClient, keep: bool, status: str
) -> None:
    name = f"slow-{uuid4()}"
    with pytest.raises(NotReadyError) as late:
        await service.create_lora_training_client(name, ready_timeout=0.1, keep_on_failure=keep)
    assert await status_of(service, name) == [status]
    notes = getattr(late.value, "__notes__", [])
    assert any("was kept, as asked" in note for note in notes) is keep


async def test_a_sampler_that_fails_is_switched_off(service: ServiceClient) -> None:
    with pytest.raises(SamplerTerminatedError) as failed:
        await service.create_sampling_client("broken")
    [sampler] = [
        sampler
        for sampler in await service.control_plane.list_samplers()
        if sampler.deployment_id == failed.value.deployment_id
    ]
    assert sampler.status.name == "INACTIVE"


async def test_a_creation_that_is_cancelled_before_its_answer_leaves_nothing(
    service: ServiceClient, local: LocalService
) -> None:
    name = f"cancelled-{uuid4()}"
    arrived = local.faults.delay("POST */runs", 0.2)
    creating = asyncio.create_task(service.create_lora_training_client(name))
    while not arrived:  # noqa: ASYNC110 - the service is in another thread
        await asyncio.sleep(0.01)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert await status_of(service, name) == ["INACTIVE"]


async def test_beginning_may_fail_too(service: ServiceClient, local: LocalService) -> None:
    """A run whose trainer refuses its first operation is of no use either."""
    name = f"refused-{uuid4()}"
    local.faults.answer("POST */init_trainer_server", 422, {"message": "no"})
    with pytest.raises(loops_async.BadRequestError):
        await service.create_lora_training_client(name)
    assert await status_of(service, name) == ["INACTIVE"]


async def test_a_service_without_a_route_to_deactivate_runs(stub: Stub) -> None:
    """A seed-era service: its runs do not say what they run on."""
    urls = {"base_url": f"{stub.url}/trainer", "base_model": "m"}
    stub.on("POST /v1/loops/runs", {"run": urls | {"id": "r", "session_id": "s1", "created_at": WHEN}})
    stub.on("GET /trainer/health", {"error": "not yet"}, status=400)
    others = urls | {"base_url": "http://elsewhere"}
    stub.on("GET /v1/loops/deployments", {"deployments": [others | {"id": "d0"}, urls | {"id": "d1"}]})
    stub.on("POST /v1/loops/deployments/d1/deactivate", {"id": "d1", "base_model": "m", "user": {}})
    async with ServiceClient(base_url=stub.url, api_key=KEY) as service:
        with pytest.raises(NotReadyError):
            await service.create_lora_training_client("m", ready_timeout=0.1)
    assert stub.count("POST /v1/loops/deployments/d1/deactivate") == 1


async def test_what_cannot_be_switched_off_is_said(stub: Stub) -> None:
    run = {"id": "r", "session_id": "s1", "created_at": WHEN, "base_model": "m", "base_url": f"{stub.url}/trainer"}
    stub.on("POST /v1/loops/runs", {"run": run})
    stub.on("GET /v1/loops/deployments", {"deployments": []})
    async with ServiceClient(base_url=stub.url, api_key=KEY) as service:
        with pytest.raises(NotReadyError) as late:
            await service.create_lora_training_client("m", ready_timeout=0.1)
    [note] = late.value.__notes__
    assert "run r could not be deactivated and may still cost money" in note


@pytest.mark.parametrize("marks", [("06", ""), ("01", "631")], ids=["gateway", "deactivated"])
async def test_a_gateway_that_knows_better_is_believed(stub: Stub, clock: Clock, marks: tuple[str, str]) -> None:
    run = {"id": "r", "session_id": "s1", "created_at": WHEN, "base_model": "m", "base_url": f"{stub.url}/trainer"}
    stub.on("POST /v1/loops/runs", {"run": run})
    source, code = marks
    headers = {"X-Baseten-Error-Source": source, "X-Baseten-Error-Code": code}
    stub.on("GET /trainer/health", {"error": "no such model"}, status=404, headers=headers)
    async with ServiceClient(base_url=stub.url, api_key=KEY) as service:
        with pytest.raises(NotFoundError, match="no such model"):
            await service.create_lora_training_client("m")
    assert stub.count("GET /trainer/health") == 1


# --- watching, and whose it is ---


async def test_hundreds_of_runs_are_provisioned_and_watched_at_once(service: ServiceClient) -> None:
    requests = [CreateRunRequest(session_id=service.session_id, base_model="m") for _ in range(HUNDREDS)]
    runs = await asyncio.gather(*(service.control_plane.create_run(request) for request in requests))
    watched = await asyncio.gather(*(service.wait_for_run(run.id) for run in runs))
    assert {run.id for run in watched} == {run.id for run in runs}
    assert len({run.id for run in runs}) == HUNDREDS
    assert await service.wait_for_run(runs[0].id, ready_timeout=1.0)


async def test_a_run_that_is_watched_in_vain_stays_as_it_is(service: ServiceClient) -> None:
    run = await service.control_plane.create_run(CreateRunRequest(session_id=service.session_id, base_model="m"))
    with pytest.raises(NotReadyError):
        await service.wait_for_run(run.id, ready_timeout=0.01)
    assert (await service.control_plane.get_run(run.id)).status.name == "ACTIVE"


async def test_a_run_can_be_provisioned_without_training_it(colour: Colour, local: LocalService) -> None:
    def provision(service: Any) -> Any:
        return service.provision_run(CreateRunRequest(session_id=service.session_id, base_model="m", lora_rank=4))

    run = await colour.service(local.base_url, provision, api_key=local.api_key)
    assert run.base_url.startswith(local.base_url)


@pytest.mark.parametrize("team", ["research", "t1"], ids=["name", "id"])
async def test_a_team_owns_what_is_made(stub: Stub, colour: Colour, team: str) -> None:
    run = {"id": "r", "session_id": "s9", "created_at": WHEN, "base_model": "m", "base_url": f"{stub.url}/trainer"}
    sampler = {"id": "q", "created_at": WHEN, "base_model": "m", "base_url": f"{stub.url}/sampler"}
    stub.on("GET /v1/teams", {"teams": [{"id": "t0", "name": "t2"}, {"id": "t1", "name": "research"}]})
    stub.on("POST /v1/teams/t1/loops/sessions", {"session": {"id": "s9"}})
    stub.on("POST /v1/teams/t1/loops/runs", {"run": run})
    stub.on("POST /v1/teams/t1/loops/samplers", {"sampler": sampler})
    stub.on("GET /trainer/health", {})

    def make(service: Any) -> Any:
        return service.provision_run(CreateRunRequest(session_id="s9", base_model="m"))

    await colour.service(stub.url, make, team=team)
    await colour.service(stub.url, lambda service: service.create_sampling_client("m"), team=team)
    assert stub.count("POST /v1/teams/t1/loops/samplers") == stub.count("POST /v1/teams/t1/loops/runs") == 1


async def test_a_team_that_does_not_exist(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.on("GET /v1/teams", {"teams": [{"id": "t1", "name": "research"}, {"id": "t2", "name": "ops"}]})
    monkeypatch.setenv("LOOPS_TEAM", "finance")
    with pytest.raises(ConfigError, match="there is no team 'finance'; there are ops, research"):
        async with ServiceClient(base_url=stub.url, api_key=KEY):
            pass


async def test_wishes_of_the_client_reach_every_run(stub: Stub) -> None:
    run = {"id": "r", "session_id": "s1", "created_at": WHEN, "base_model": "m", "base_url": f"{stub.url}/trainer"}
    stub.on("POST /v1/loops/runs", {"run": run})
    wishes = {"reuse_from_run_id": "r0", "reuse_from_session_id": "s0", "availability_model": "spot"}
    async with ServiceClient(base_url=stub.url, api_key=KEY, **wishes) as service:
        with pytest.raises(NotReadyError):
            await service.create_lora_training_client("m", ready_timeout=0.05, sampler_num_replicas=3)
    [body] = [asked.body for asked in stub.asked if asked.path == "/v1/loops/runs"]
    assert (body["reuse_from_run_id"], body["availability_model"]) == ("r0", "spot")
    assert (body["reuse_from_session_id"], body["sampler_num_replicas"]) == (None, 3)


def test_an_unknown_availability_is_refused() -> None:
    with pytest.raises(ConfigError, match="availability_model must be 'dedicated' or 'spot'; got 'cheap'"):
        ServiceClient(api_key=KEY, availability_model="cheap")

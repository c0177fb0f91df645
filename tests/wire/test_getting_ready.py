"""Waiting for trainers and samplers, and giving back those that do not come up (control-plane 6)."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from loops_async import (
    AuthenticationError,
    ClosedError,
    ConnectError,
    LoopsError,
    NotFoundError,
    NotReadyError,
    PermissionDeniedError,
    ProtocolError,
    ProvisioningError,
    SamplerTerminatedError,
    SamplingClient,
    ServiceClient,
)
from tests.support.clock import Clock
from tests.support.limits import expire_when
from tests.support.patience import PATIENCE_SECONDS
from tests.support.scripted import MODEL, Hold, Say, ScriptedService, hang_up

HEALTH = "/trainer/health"
STATUS = "/v1/models/m1/deployments/d1"
DEPLOYMENT = "/v1/loops/deployments/t1"
VERSION = "/sampler/trainers_policy_version"


def deployment(state: str) -> Say:
    return Say(body={"deployment": {"id": "t1", "base_model": MODEL, "base_url": "x", "status": {"name": state}}})


@pytest.fixture
def dedicated(service: ScriptedService) -> ScriptedService:
    """A service of the newer generation, which says what its trainers run on."""
    service.always("POST", "/v1/loops/runs", Say(body={"run": service.run(deployment_id="t1", name="mine")}))
    service.always("GET", DEPLOYMENT, deployment("RUNNING"))
    service.always("POST", f"{DEPLOYMENT}/deactivate", Say(body={"id": "t1", "base_model": MODEL}))
    return service


# --- trainers ---


async def test_a_trainer_is_ready_when_it_answers_200(
    client: ServiceClient, service: ScriptedService, quick: Clock
) -> None:
    service.answer("GET", HEALTH, Say(404, "no such host"), Say(502, "<html>"), Say(400, {"error": "x"}), hang_up)
    trainer = await client.create_lora_training_client(MODEL)
    assert trainer.run_id == "r1"
    assert len(service.seen_at("GET", HEALTH)) == 5


async def test_a_trainer_that_does_not_come_is_given_up_with_its_last_answer(
    client: ServiceClient, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    expire_when(lambda: len(service.seen_at("GET", HEALTH)) > 1, monkeypatch, seconds=0.2)
    service.always("GET", HEALTH, Say(503, {"error": "pulling the image"}))
    with pytest.raises(NotReadyError, match=r"r1 \(org/model\) was not ready after 0.2 s.*pulling the image") as late:
        await client.create_lora_training_client(MODEL, ready_timeout=0.2)
    assert isinstance(late.value, TimeoutError)
    assert late.value.retryable


async def test_a_trainer_that_does_not_answer_at_all_is_given_up_in_time(
    client: ServiceClient, service: ScriptedService
) -> None:
    service.always("GET", HEALTH, Hold(Say()))
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(NotReadyError, match=r"not ready after 0.02 s"):
            await client.create_lora_training_client(MODEL, ready_timeout=0.02)


@pytest.mark.parametrize(("status", "kind"), [(401, AuthenticationError), (403, PermissionDeniedError)])
async def test_a_trainer_that_refuses_the_key_is_not_waited_for(
    client: ServiceClient, service: ScriptedService, status: int, kind: type[LoopsError]
) -> None:
    service.always("GET", HEALTH, Say(status, {"error": "no"}))
    with pytest.raises(kind):
        await client.create_lora_training_client(MODEL)
    assert len(service.seen_at("GET", HEALTH)) == 1


@pytest.mark.parametrize("state", ["FAILED", "STOPPED", "PREEMPTED"])
async def test_a_terminal_state_is_reported_at_once_and_the_run_is_deactivated(
    client: ServiceClient, dedicated: ScriptedService, state: str, quick: Clock
) -> None:
    dedicated.always("GET", HEALTH, Say(502, ""))
    dedicated.answer("GET", DEPLOYMENT, deployment("DEPLOYING"), deployment(state))
    with pytest.raises(ProvisioningError, match=rf"run r1 cannot become ready.*t1 is {state}") as failed:
        await client.create_lora_training_client(MODEL)
    assert (failed.value.deployment_id, failed.value.status) == ("t1", state)
    assert not failed.value.retryable
    assert len(dedicated.seen_at("POST", f"{DEPLOYMENT}/deactivate")) == 1


async def test_a_failure_between_state_and_health_is_a_failure_of_the_deployment(
    client: ServiceClient, dedicated: ScriptedService
) -> None:
    dedicated.answer("GET", DEPLOYMENT, deployment("DEPLOYING"), deployment("FAILED"))
    dedicated.always("GET", HEALTH, Say(400, {"error": "x"}, headers={"X-Baseten-Error-Source": "06"}))
    with pytest.raises(ProvisioningError, match=r"t1 is FAILED"):
        await client.create_lora_training_client(MODEL)


@pytest.mark.parametrize("odd", [Say(404, {"error": "x"}), Say(200, "<html>"), deployment("PONDERING"), hang_up])
async def test_an_unknown_state_does_not_delay_a_healthy_trainer(
    client: ServiceClient, dedicated: ScriptedService, quick: Clock, odd: Any
) -> None:
    dedicated.always("GET", DEPLOYMENT, odd)
    assert (await client.create_lora_training_client(MODEL)).run_id == "r1"


async def test_a_cancelled_provisioning_deactivates_the_run(client: ServiceClient, dedicated: ScriptedService) -> None:
    held = Hold(Say())
    dedicated.always("GET", HEALTH, held)
    task = asyncio.create_task(client.create_lora_training_client(MODEL))
    await held.arrived.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert len(dedicated.seen_at("POST", f"{DEPLOYMENT}/deactivate")) == 1


async def test_a_run_that_cannot_be_deactivated_is_named(client: ServiceClient, dedicated: ScriptedService) -> None:
    dedicated.always("POST", f"{DEPLOYMENT}/deactivate", Say(500, {"error": "x"}))
    dedicated.always("GET", DEPLOYMENT, deployment("FAILED"))
    with pytest.raises(ProvisioningError) as failed:
        await client.create_lora_training_client(MODEL)
    [note] = failed.value.__notes__
    assert "run r1 could not be deactivated and may still cost money" in note


@pytest.mark.parametrize("is_listed", [True, False])
async def test_a_run_that_does_not_say_what_it_runs_on_is_looked_up(
    client: ServiceClient, service: ScriptedService, is_listed: bool
) -> None:
    """A seed-era service has no route to deactivate runs; only the URL tells which deployment is meant."""
    others = {"id": "t0", "base_model": MODEL, "base_url": "http://elsewhere"}
    ours = {"id": "t1", "base_model": MODEL, "base_url": f"{service.url}/trainer"}
    service.always("GET", HEALTH, Say(400, {"error": "not yet"}))
    service.always("GET", "/v1/loops/deployments", Say(body={"deployments": [others, ours][: 1 + is_listed]}))
    service.always("POST", f"{DEPLOYMENT}/deactivate", Say(body={"id": "t1", "base_model": MODEL, "user": {}}))
    with pytest.raises(NotReadyError) as late:
        await client.create_lora_training_client(MODEL, ready_timeout=0.02)
    assert len(service.seen_at("POST", f"{DEPLOYMENT}/deactivate")) == is_listed
    notes = getattr(late.value, "__notes__", [])
    assert any("run r1 could not be deactivated and may still cost money" in note for note in notes) is not is_listed


@pytest.mark.parametrize(("source", "code"), [("06", ""), ("01", "631")], ids=["gateway", "deactivated"])
async def test_a_gateway_that_knows_better_is_believed(
    client: ServiceClient, service: ScriptedService, quick: Clock, source: str, code: str
) -> None:
    headers = {"X-Baseten-Error-Source": source, "X-Baseten-Error-Code": code}
    service.always("GET", HEALTH, Say(404, {"error": "no such model"}, headers))
    with pytest.raises(NotFoundError, match="no such model"):
        await client.create_lora_training_client(MODEL)
    assert len(service.seen_at("GET", HEALTH)) == 1


async def test_a_run_without_an_address(client: ServiceClient, service: ScriptedService) -> None:
    service.answer("POST", "/v1/loops/runs", Say(body={"run": service.run(base_url=None)}))
    with pytest.raises(ProtocolError, match="run r1 was created without the URL of its trainer"):
        await client.create_lora_training_client(MODEL)


async def test_many_are_waited_for_at_once(client: ServiceClient, service: ScriptedService) -> None:
    held = Hold(Say())
    service.always("GET", HEALTH, held)
    tasks = [asyncio.create_task(client.create_lora_training_client(MODEL)) for _ in range(50)]
    await service.until_seen("GET", HEALTH, 50)
    held.go.set()
    assert len(await asyncio.gather(*tasks)) == 50


async def test_a_local_trainer_that_is_not_there_is_said_at_once(service: ScriptedService) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
    async with (
        ServiceClient.local(trainer_url=nowhere, sampler_url=nowhere) as client,
        asyncio.timeout(PATIENCE_SECONDS),
    ):
        with pytest.raises(ConnectError, match=r"could not connect.*loops-local serve"):
            await client.create_lora_training_client(MODEL)


# --- samplers ---


def status(state: Any) -> Say:
    return Say(body={"id": "d1", "status": state})


async def test_a_sampler_is_ready_when_it_is_active(
    client: ServiceClient, service: ScriptedService, quick: Clock
) -> None:
    service.answer("GET", STATUS, status("BUILDING"), status({"name": "LOADING_MODEL"}), status("PONDERING"))
    await client.create_sampling_client(MODEL)
    assert len(service.seen_at("GET", STATUS)) == 4


@pytest.mark.parametrize(
    "state",
    ["DEPLOY_FAILED", "UNHEALTHY", "BUILD_FAILED", "BUILD_STOPPED", "DEACTIVATING", "INACTIVE", "FAILED"],
)
async def test_a_samplers_terminal_state_is_said_at_once(
    client: ServiceClient, service: ScriptedService, state: str
) -> None:
    service.always("GET", STATUS, status(state))
    with pytest.raises(SamplerTerminatedError, match=rf"d1 of model m1 is {state}") as ended:
        await client.create_sampling_client(MODEL)
    assert isinstance(ended.value, RuntimeError)
    assert (ended.value.deployment_id, ended.value.status) == ("d1", state)
    assert len(service.seen_at("GET", STATUS)) == 1


@pytest.mark.parametrize("woken", [Say(200), Say(202), Say(500, {"error": "x"}), hang_up])
async def test_a_sampler_that_sleeps_is_woken_once(
    client: ServiceClient, service: ScriptedService, woken: Any, quick: Clock
) -> None:
    service.always(
        "POST", "/v1/loops/samplers", Say(body={"sampler": service.sampler(base_url=f"{service.url}/s/sync")})
    )
    service.always("POST", "/s/wake", woken)
    service.answer("GET", STATUS, status("SCALED_TO_ZERO"), status("SCALED_TO_ZERO"), status("WAKING_UP"))
    await client.create_sampling_client(MODEL)
    assert len(service.seen_at("POST", "/s/wake")) == 1
    assert len(service.seen_at("GET", STATUS)) == 4


async def test_a_bad_moment_of_the_control_plane_is_waited_out(
    client: ServiceClient, service: ScriptedService, quick: Clock
) -> None:
    service.answer("GET", STATUS, *[Say(500, {"error": "x"})] * 3, *[hang_up] * 5, status("BUILDING"))
    await client.create_sampling_client(MODEL)
    assert len(service.seen_at("GET", STATUS)) == 10


@pytest.mark.parametrize("refusal", [400, 401, 403, 404, 405, 422])
@pytest.mark.parametrize("body", [{"error": "no such route"}, "<html>"], ids=["json", "page"])
async def test_a_control_plane_without_states_does_not_block_sampling(
    client: ServiceClient, service: ScriptedService, refusal: int, body: Any
) -> None:
    service.always("GET", STATUS, Say(refusal, body))
    sampler = await client.create_sampling_client(MODEL)
    assert (await sampler.sample([1])).sequences
    assert len(service.seen_at("GET", STATUS)) == 1


@pytest.mark.parametrize("nulls", [{"model_id": None}, {"deployment_id": None}])
async def test_a_sampler_without_a_deployment_has_no_gate(
    client: ServiceClient, service: ScriptedService, nulls: dict[str, None]
) -> None:
    service.answer("POST", "/v1/loops/samplers", Say(body={"sampler": service.sampler(**nulls)}))
    await client.create_sampling_client(MODEL)
    assert not [seen for seen in service.seen if seen.path.startswith("/v1/models/")]


async def test_all_callers_share_one_gate(
    client: ServiceClient, service: ScriptedService, sampler: SamplingClient
) -> None:
    service.answer("GET", STATUS, status("ACTIVE"))
    await asyncio.gather(*(sampler.sample([1]) for _ in range(50)))
    assert not service.seen_at("GET", STATUS), "it was open already"


async def test_a_caller_that_gives_up_does_not_shut_the_gate_for_others(
    client: ServiceClient, service: ScriptedService
) -> None:
    held = Hold(status("ACTIVE"))
    service.answer("GET", STATUS, held)
    patient = asyncio.create_task(client.create_sampling_client(MODEL))
    await held.arrived.wait()
    with pytest.raises(NotReadyError, match=r"model m1, deployment d1\) was not ready after 0.01 s"):
        await client.create_sampling_client(MODEL, ready_timeout=0.01)
    leaving = asyncio.create_task(client.create_sampling_client(MODEL))
    await service.until_seen("POST", "/v1/loops/samplers", 3)
    leaving.cancel()
    await asyncio.wait([leaving])
    held.go.set()
    assert isinstance(await patient, SamplingClient)
    assert len(service.seen_at("GET", STATUS)) == 1


async def test_a_gate_without_callers_is_not_polled(
    client: ServiceClient, service: ScriptedService, quick: Clock
) -> None:
    service.always("GET", STATUS, status("BUILDING"))
    waiting = [asyncio.create_task(client.create_sampling_client(MODEL)) for _ in range(2)]
    await service.until_seen("GET", STATUS, 5)
    waiting[0].cancel()
    await service.until_seen("GET", STATUS, len(service.seen_at("GET", STATUS)) + 2)
    waiting[1].cancel()
    await asyncio.wait(waiting)
    polled = len(service.seen_at("GET", STATUS))
    await asyncio.sleep(0.05)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(service.seen_at("GET", STATUS)) <= polled + 1, "one may have been on its way"

    service.always("GET", STATUS, status("ACTIVE"))
    assert await client.create_sampling_client(MODEL)


@pytest.mark.parametrize(
    ("answer", "quoted"), [(status("BUILDING"), "BUILDING"), (Say(500, {"error": "no disk"}), "answered 500: no disk")]
)
async def test_a_sampler_that_does_not_come_is_given_up_with_the_last_answer(
    client: ServiceClient, service: ScriptedService, monkeypatch: pytest.MonkeyPatch, answer: Say, quoted: str
) -> None:
    expire_when(lambda: len(service.seen_at("GET", STATUS)) > 1, monkeypatch, seconds=0.3)
    service.always("GET", STATUS, answer)
    with pytest.raises(NotReadyError, match=rf"not ready after 0.3 s; the last answer about it was: .*{quoted}"):
        await client.create_sampling_client(MODEL, ready_timeout=0.3)


@pytest.mark.parametrize("status_code", [401, 403])
async def test_a_version_is_not_waited_for_with_a_key_that_is_refused(
    sampler: SamplingClient, service: ScriptedService, status_code: int
) -> None:
    service.always("GET", VERSION, Say(status_code, {"error": "no"}))
    with pytest.raises(AuthenticationError if status_code == 401 else PermissionDeniedError):
        await sampler.wait_for_version(3)
    assert len(service.seen_at("GET", VERSION)) == 1


@pytest.mark.parametrize("body", [{"error": "no such route"}, "<html>"], ids=["json", "page"])
@pytest.mark.parametrize("missing", [404, 405, 501])
async def test_a_sampler_that_tells_no_version_is_not_waited_for(
    sampler: SamplingClient, service: ScriptedService, missing: int, body: Any
) -> None:
    service.always("GET", VERSION, Say(missing, body))
    await sampler.wait_for_version(3)
    assert len(service.seen_at("GET", VERSION)) == 1


@pytest.mark.parametrize(
    ("answer", "quoted"),
    [(Say(200, "<html>"), "not what Loops sends"), (Say(400, {"error": "no adapter"}), "answered 400: no adapter")],
)
async def test_a_version_that_does_not_come_is_given_up_with_the_last_answer(
    sampler: SamplingClient, service: ScriptedService, monkeypatch: pytest.MonkeyPatch, answer: Say, quoted: str
) -> None:
    expire_when(lambda: len(service.seen_at("GET", VERSION)) > 1, monkeypatch, seconds=0.1)
    service.always("GET", VERSION, answer)
    with pytest.raises(NotReadyError, match=f"last answer was: .*{quoted}"):
        await sampler.wait_for_version(3, timeout=0.1)


async def test_closing_ends_the_wait(service: ScriptedService) -> None:
    service.always("GET", STATUS, status("BUILDING"))
    client = await ServiceClient(api_key="k", base_url=service.url).open()
    waiting = asyncio.create_task(client.create_sampling_client(MODEL))
    await service.until_seen("GET", STATUS)
    await client.close()
    with pytest.raises(ClosedError):
        await waiting

"""Creating what costs money: once, also when the answer is lost."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web

from loops_async import (
    CreateRunRequest,
    CreateSamplerRequest,
    DeployCheckpointsRequest,
    LostAnswerError,
    ServerError,
    ServiceClient,
)
from loops_async._session import lost_runs, provisioning
from tests.support.clock import Clock
from tests.support.scripted import Say, ScriptedService, hang_up

RUNS = "/v1/loops/runs"
SAMPLERS = "/v1/loops/samplers"
DEPLOY = "/v1/loops/checkpoints/deploy"


class Factory:
    """Makes runs; `fates` says what happens to the next of them, and then all are ``"told"``.

    ``"told"`` is answered; ``"lost"``, ``"late"`` (which lists it one listing later) and ``"gateway"`` are made but
    not answered; ``"never"`` is neither made nor answered.
    """

    def __init__(self, service: ScriptedService, fates: list[str]) -> None:
        self.runs: list[dict[str, Any]] = []
        self.posts = 0
        self._service = service
        self._fates = fates
        self._late: list[dict[str, Any]] = []
        service.always("POST", RUNS, self.create)
        service.always("GET", RUNS, self._list)

    async def create(self, request: web.BaseRequest) -> web.StreamResponse:
        body = self._service.seen[-1].json
        self.posts += 1
        fate = self._fates.pop(0) if self._fates else "told"
        run = self._service.run(
            id=f"run-{self.posts}",
            session_id=body["session_id"],
            base_model=body["base_model"],
            name=body.get("name") or body["base_model"],
            lora_config_version=str(body["lora_rank"]),
        )
        if fate != "never":
            (self._late if fate == "late" else self.runs).append(run)
        if fate == "told":
            await asyncio.sleep(0)  # creations by others overtake this answer
            return await Say(body={"run": run})(request)
        if fate == "gateway":
            return await Say(504, {"message": "the gateway gave up"})(request)
        return await hang_up(request)

    async def _list(self, request: web.BaseRequest) -> web.StreamResponse:
        answer = Say(body={"runs": list(self.runs)})
        self.runs, self._late = self.runs + self._late, []
        return await answer(request)


@pytest.fixture(autouse=True)
def quick_search(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_runs, "SEARCH_SECONDS", 0.2)


def request(rank: int = 8, **fields: Any) -> CreateRunRequest:
    return CreateRunRequest(session_id="s1", base_model="m", lora_rank=rank, **fields)


@pytest.mark.parametrize("fate", ["lost", "late", "gateway"])
async def test_the_run_of_a_lost_answer_is_found(
    service: ScriptedService, coloured_client: ServiceClient, fate: str
) -> None:
    factory = Factory(service, [fate])
    run = await coloured_client.provision_run(request())
    assert run.id == "run-1"
    assert factory.posts == 1


async def test_a_run_that_does_not_show_up_is_not_created_again(
    service: ScriptedService, coloured_client: ServiceClient
) -> None:
    factory = Factory(service, ["never"])
    with pytest.raises(LostAnswerError, match=r"may still have been created .* look for session s1") as lost:
        await coloured_client.provision_run(request())
    assert factory.posts == 1
    assert not lost.value.retryable


async def test_runs_that_others_know_are_not_taken(service: ScriptedService, client: ServiceClient) -> None:
    factory = Factory(service, ["told", "never"])
    await client.provision_run(request())
    with pytest.raises(LostAnswerError):
        await client.provision_run(request())
    assert factory.posts == 2


async def test_many_lost_at_once_each_get_a_run_of_their_own(service: ScriptedService, client: ServiceClient) -> None:
    factory = Factory(service, ["told", "lost", "lost"] * 20)
    runs = await asyncio.gather(*(client.provision_run(request()) for _ in range(60)))
    assert sorted(run.id for run in runs) == sorted(run["id"] for run in factory.runs)
    assert factory.posts == 60


async def test_a_service_that_is_down_is_not_waited_for_by_each(
    service: ScriptedService, client: ServiceClient
) -> None:
    factory = Factory(service, ["never"] * 30)
    started = time.monotonic()
    answers = await asyncio.gather(*(client.provision_run(request()) for _ in range(30)), return_exceptions=True)
    assert all(isinstance(answer, LostAnswerError) for answer in answers)
    assert time.monotonic() - started < 30 * lost_runs.SEARCH_SECONDS / 2
    assert factory.posts == 30
    # The session is of use afterwards.
    assert (await client.provision_run(request())).id == "run-31"


async def test_names_tell_lost_runs_apart(service: ScriptedService, client: ServiceClient) -> None:
    Factory(service, ["lost", "lost"])
    first, second = await asyncio.gather(
        client.provision_run(request(8, name="a")), client.provision_run(request(16, name="b"))
    )
    assert (first.name, first.lora_config_version) == ("a", "8")
    assert (second.name, second.lora_config_version) == ("b", "16")


async def test_lost_runs_that_cannot_be_told_apart_are_named(service: ScriptedService, client: ServiceClient) -> None:
    Factory(service, ["lost", "lost"])
    answers = await asyncio.gather(
        client.provision_run(request(8)),
        client.provision_run(request(16)),
        return_exceptions=True,
    )
    for answer in answers:
        assert isinstance(answer, LostAnswerError)
        assert answer.candidates == ("run-1", "run-2")
        assert "It may be one of run-1, run-2" in str(answer)


async def test_a_run_that_a_cancelled_call_may_have_made_is_not_taken(
    service: ScriptedService, client: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provisioning, "DEACTIVATE_SECONDS", 0.05)
    factory = Factory(service, ["told", "lost"])
    arrived = asyncio.Event()

    async def hold_first(http: web.BaseRequest) -> web.StreamResponse:
        if factory.posts == 0:
            answer = await factory.create(http)
            arrived.set()
            await asyncio.Event().wait()
            return answer
        return await factory.create(http)

    service.always("POST", RUNS, hold_first)
    cancelled = asyncio.create_task(client.provision_run(request(8)))
    await arrived.wait()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    with pytest.raises(LostAnswerError, match="one of run-1, run-2"):
        await client.provision_run(request(16))


async def test_runs_in_the_session_of_another_client_are_not_taken(
    service: ScriptedService, client: ServiceClient
) -> None:
    factory = Factory(service, ["lost"])
    with pytest.raises(LostAnswerError, match="look for session theirs"):
        await client.provision_run(CreateRunRequest(session_id="theirs", base_model="m"))
    assert factory.posts == 1


@pytest.mark.parametrize("status", [429, 503])
async def test_a_creation_that_was_turned_away_is_repeated(
    service: ScriptedService, client: ServiceClient, clock: Clock, status: int
) -> None:
    service.answer("POST", RUNS, *[Say(status, {"message": "later"}, {"Retry-After": "7"})] * 3)
    Factory(service, [])
    run = await client.provision_run(request())
    assert run.id == "run-1"
    assert clock.pauses == [7, 7, 7]


async def test_a_date_to_try_again_at_is_kept(service: ScriptedService, client: ServiceClient, clock: Clock) -> None:
    later = formatdate(time.time() + 20, usegmt=True)
    for said in (later, "when we can"):
        service.answer("POST", RUNS, Say(503, {"message": "later"}, {"Retry-After": said}))
    Factory(service, [])
    await client.provision_run(request())
    assert 15 < clock.pauses[0] <= 20
    assert clock.pauses[1] < 2


async def test_a_rate_limit_is_outwaited(service: ScriptedService, client: ServiceClient, clock: Clock) -> None:
    """Hundreds of creations outlast the four tries that a fault is given."""
    service.answer("POST", RUNS, *[Say(429, {"message": "later"})] * 8)
    Factory(service, [])
    await client.provision_run(request())
    assert len(clock.pauses) == 8
    assert clock.pauses[0] < 2 < 15 <= clock.pauses[-1] <= 30


async def test_a_creation_that_the_service_failed_is_not_repeated(
    service: ScriptedService, client: ServiceClient
) -> None:
    service.always("POST", RUNS, Say(500, {"message": "out of GPUs"}))
    with pytest.raises(ServerError, match="out of GPUs"):
        await client.provision_run(request())
    assert len(service.seen_at("POST", RUNS)) == 1


async def test_a_lost_sampler_is_not_created_again(service: ScriptedService, coloured_client: ServiceClient) -> None:
    service.always("POST", SAMPLERS, hang_up)
    with pytest.raises(LostAnswerError, match="List the samplers, the newest first"):
        await coloured_client.control_plane.create_sampler(CreateSamplerRequest(session_id="s1", base_model="m"))
    assert len(service.seen_at("POST", SAMPLERS)) == 1


async def test_pairing_a_sampler_is_harmless_to_repeat(service: ScriptedService, client: ServiceClient) -> None:
    service.answer("POST", SAMPLERS, hang_up, Say(body={"sampler": service.sampler(id="p")}))
    sampler = await client.control_plane.create_sampler(CreateSamplerRequest(session_id="s1", run_id="r"))
    assert sampler.id == "p"


async def test_a_lost_deployment_is_not_created_again(service: ScriptedService, coloured_client: ServiceClient) -> None:
    service.always("POST", DEPLOY, hang_up)
    body = DeployCheckpointsRequest(checkpoint_ids=["c"], model_name="mine", instance_type_id="i", hf_secret_name="h")
    with pytest.raises(LostAnswerError, match="Look for 'mine'"):
        await coloured_client.control_plane.deploy_checkpoints(body)
    assert len(service.seen_at("POST", DEPLOY)) == 1

"""Creating what costs money: once, also when the answer is lost."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web

from loops_async import (
    CreateRunRequest,
    CreateSamplerRequest,
    DeployCheckpointsRequest,
    LostAnswerError,
    ProtocolError,
    ServiceClient,
)
from loops_async._session import lost_runs, provisioning
from tests.support.clock import Clock
from tests.support.patience import PATIENCE_SECONDS
from tests.support.scripted import Hold, Say, ScriptedService, hang_up

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
        service.always("GET", RUNS, self.list)

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

    async def list(self, request: web.BaseRequest) -> web.StreamResponse:
        answer = Say(body={"runs": list(self.runs)})
        self.runs, self._late = self.runs + self._late, []
        return await answer(request)


@pytest.fixture(autouse=True)
def quick_search(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_runs, "SEARCH_SECONDS", 0.2)


@pytest.fixture
def long_search(quick_search: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For searches that end before their time limit."""
    monkeypatch.setattr(lost_runs, "SEARCH_SECONDS", PATIENCE_SECONDS)


def request(rank: int = 8, **fields: Any) -> CreateRunRequest:
    return CreateRunRequest(session_id="s1", base_model="m", lora_rank=rank, **fields)


@pytest.mark.parametrize("fate", ["lost", "late", "gateway"])
async def test_the_run_of_a_lost_answer_is_found(
    service: ScriptedService, coloured_client: ServiceClient, long_search: None, fate: str
) -> None:
    factory = Factory(service, [fate])
    run = await coloured_client.provision_run(request())
    assert run.id == "run-1"
    assert factory.posts == 1


async def test_a_listing_that_cannot_be_read_does_not_end_the_search(
    service: ScriptedService, client: ServiceClient, long_search: None
) -> None:
    factory = Factory(service, ["lost"])
    unreadable = [Say(202, b""), Say(200, b"<html>")]

    async def listed(request: web.BaseRequest) -> web.StreamResponse:
        return await (unreadable.pop()(request) if unreadable else factory.list(request))

    service.always("GET", RUNS, listed)
    assert (await client.provision_run(request())).id == "run-1"
    assert not unreadable


async def test_a_run_that_does_not_show_up_is_not_created_again(
    service: ScriptedService, coloured_client: ServiceClient
) -> None:
    factory = Factory(service, ["never"])
    with pytest.raises(LostAnswerError, match=r"may have been made all the same .* look for session s1") as lost:
        await coloured_client.provision_run(request())
    assert factory.posts == 1
    assert not lost.value.retryable


async def test_runs_that_others_know_are_not_taken(service: ScriptedService, client: ServiceClient) -> None:
    factory = Factory(service, ["told", "never"])
    await client.provision_run(request())
    with pytest.raises(LostAnswerError):
        await client.provision_run(request())
    assert factory.posts == 2


async def test_many_lost_at_once_each_get_a_run_of_their_own(
    service: ScriptedService, client: ServiceClient, long_search: None
) -> None:
    factory = Factory(service, ["told", "lost", "lost"] * 20)
    runs = await asyncio.gather(*(client.provision_run(request()) for _ in range(60)))
    assert sorted(run.id for run in runs) == sorted(run["id"] for run in factory.runs)
    assert factory.posts == 60


async def test_a_service_that_is_down_is_not_waited_for_by_each(
    service: ScriptedService, client: ServiceClient, long_search: None
) -> None:
    factory = Factory(service, ["never"] * 30)
    held = Hold(Say(500, {"error": "down"}))
    service.always("GET", RUNS, held)
    calls = [asyncio.create_task(client.provision_run(request())) for _ in range(30)]
    await service.until_seen("GET", RUNS, 30)
    held.go.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(answer, LostAnswerError) for answer in answers)
    assert factory.posts == 30
    # The session is of use afterwards.
    assert (await client.provision_run(request())).id == "run-31"


async def test_names_tell_lost_runs_apart(service: ScriptedService, client: ServiceClient, long_search: None) -> None:
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


@pytest.mark.parametrize("is_listed", [True, False])
async def test_the_run_of_a_cancelled_call_is_switched_off_and_not_taken_by_others(
    service: ScriptedService,
    client: ServiceClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_listed: bool,
) -> None:
    monkeypatch.setattr(provisioning, "DEACTIVATE_SECONDS", 0.05)
    service.always("POST", f"{RUNS}/run-1/deactivate", Say(body={"id": "run-1"}))
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
    if not is_listed:
        service.always("GET", RUNS, Say(500, {"error": "bug"}))
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    if is_listed:
        assert len(service.seen_at("POST", f"{RUNS}/run-1/deactivate")) == 1
        assert (await client.provision_run(request(16))).id == "run-2"
        return
    assert "an unused run may exist and cost money" in caplog.text
    service.always("GET", RUNS, factory.list)
    with pytest.raises(LostAnswerError, match="one of run-1, run-2"):
        await client.provision_run(request(16))


async def test_a_lost_creation_of_a_cancelled_call_is_said(
    service: ScriptedService, client: ServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    hold = Hold(hang_up)
    service.always("POST", RUNS, hold)
    service.always("GET", RUNS, Say(body={"runs": []}))
    cancelled = asyncio.create_task(client.provision_run(request()))
    await hold.arrived.wait()
    cancelled.cancel()
    hold.go.set()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert "The run may have been made all the same" in caplog.text


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
    assert clock.pauses[1] <= 2


async def test_a_rate_limit_is_outwaited(service: ScriptedService, client: ServiceClient, clock: Clock) -> None:
    """Hundreds of creations outlast the time that a fault is given."""
    service.answer("POST", RUNS, *[Say(429, {"message": "later"})] * 8)
    Factory(service, [])
    await client.provision_run(request())
    assert len(clock.pauses) == 8
    assert clock.pauses[0] < 2 < 15 <= clock.pauses[-1] <= 30


UNCERTAIN = [
    Say(500, {"message": "out of GPUs"}),
    Say(500, "<html>"),
    Say(503, "upstream connect error"),
    Say(520, ""),
    Say(200, {"run": {"id": "x"}}),
    Say(200, "<html>ok</html>"),
    Say(200, ""),
]


@pytest.mark.parametrize("answer", UNCERTAIN, ids=repr)
async def test_a_creation_whose_answer_says_nothing_counts_as_lost(
    service: ScriptedService, client: ServiceClient, answer: Say
) -> None:
    service.always("POST", RUNS, answer)
    service.always("GET", RUNS, Say(body={"runs": []}))
    with pytest.raises(LostAnswerError, match=rf"answered {answer.status}.*may have been made all the same"):
        await client.provision_run(request())
    assert len(service.seen_at("POST", RUNS)) == 1
    service.always("GET", RUNS, Say(body={"runs": [service.run(id="made", base_model="m")]}))
    assert (await client.provision_run(request())).id == "made"


async def test_a_redirect_creates_nothing(service: ScriptedService, client: ServiceClient) -> None:
    service.always("POST", RUNS, Say(307, "", {"Location": "/"}))
    with pytest.raises(ProtocolError, match="a redirect"):
        await client.provision_run(request())


@pytest.mark.parametrize("answer", UNCERTAIN[:-3], ids=repr)
async def test_a_lost_sampler_is_named(service: ScriptedService, client: ServiceClient, answer: Say) -> None:
    now = datetime.now(UTC).isoformat()
    ours = service.sampler(id="ours", base_model="m", created_at=now)
    others = [service.sampler(id="old", base_model="m"), service.sampler(id="other", created_at=now)]
    service.answer("POST", SAMPLERS, answer)
    service.always("GET", SAMPLERS, Say(body={"samplers": [ours, *others]}))
    with pytest.raises(LostAnswerError, match=r"It may be one of ours\. List the samplers") as lost:
        await client.create_sampling_client("m")
    assert lost.value.candidates == ("ours",)


async def test_a_creation_uses_a_connection_of_its_own(service: ScriptedService, client: ServiceClient) -> None:
    """One that was idle may break under it, and then nobody knows what was made."""
    peers: list[object] = []

    async def create(http: web.BaseRequest) -> web.StreamResponse:
        assert http.transport is not None
        peers.append(http.transport.get_extra_info("peername"))
        return await Say(body={"run": service.run(base_model="m")})(http)

    service.always("POST", RUNS, create)
    await client.control_plane.create_run(request())
    await client.control_plane.create_run(request())
    assert len(set(peers)) == 2


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

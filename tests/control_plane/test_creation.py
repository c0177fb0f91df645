"""Creating what costs money: once, also when the answer is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web

import loops_async
from loops_async import CreateRunRequest, CreateSamplerRequest, DeployCheckpointsRequest, LostAnswerError, _lost_runs
from tests.clock import Clock
from tests.control_plane.stub import KEY, Colour, Stub

RUNS = "/v1/loops/runs"


class Factory:
    """Makes runs; `fates` says what becomes of the next answers: ``"told"``, ``"lost"`` or ``"late"`` (and lost)."""

    def __init__(self, stub: Stub, fates: list[str]) -> None:
        self.runs: list[dict[str, Any]] = []
        self.posts = 0
        self._fates = fates
        self._late: list[dict[str, Any]] = []
        stub.call(f"POST {RUNS}", self._create)
        stub.call(f"GET {RUNS}", self._list)

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.posts += 1
        fate = self._fates.pop(0) if self._fates else "told"
        run = {
            "id": f"run-{self.posts}",
            "session_id": body["session_id"],
            "base_model": body["base_model"],
            "base_url": "http://trainer",
            "created_at": "2026-06-24T18:02:11Z",
            "name": body.get("name") or body["base_model"],
            "lora_config_version": str(body["lora_rank"]),
        }
        if fate != "never":
            (self._late if fate == "late" else self.runs).append(run)
        if fate == "told":
            # Others' creations overtake this answer.
            await asyncio.sleep(0)
            return web.json_response({"run": run})
        if fate == "gateway":
            return web.json_response({"message": "the gateway gave up"}, status=504)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _list(self, request: web.Request) -> web.StreamResponse:
        answer = web.json_response({"runs": list(self.runs)})
        self.runs, self._late = self.runs + self._late, []
        return answer


@pytest.fixture(autouse=True)
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lost_runs, "SEEK_SECONDS", 0.2)


@pytest.fixture
async def service(stub: Stub, clock: Clock) -> AsyncIterator[loops_async.ServiceClient]:
    async with loops_async.ServiceClient(base_url=stub.url, api_key=KEY) as service:
        yield service


def request(rank: int = 8, **fields: Any) -> CreateRunRequest:
    return CreateRunRequest(session_id="s1", base_model="m", lora_rank=rank, **fields)


@pytest.mark.parametrize("fate", ["lost", "late", "gateway"])
async def test_the_run_of_a_lost_answer_is_found(stub: Stub, colour: Colour, clock: Clock, fate: str) -> None:
    factory = Factory(stub, [fate])
    run = await colour.control_plane(stub.url, lambda plane: plane.create_run(request()))
    assert run.id == "run-1"
    assert factory.posts == 1


async def test_a_run_that_does_not_show_is_not_asked_for_again(stub: Stub, colour: Colour, clock: Clock) -> None:
    factory = Factory(stub, ["never"])
    with pytest.raises(LostAnswerError, match=r"may have been made all the same .* look for session s1") as lost:
        await colour.control_plane(stub.url, lambda plane: plane.create_run(request()))
    assert factory.posts == 1
    assert not lost.value.retryable


async def test_runs_that_others_know_are_not_taken(stub: Stub, service: loops_async.ServiceClient) -> None:
    factory = Factory(stub, ["told", "never"])
    await service.control_plane.create_run(request())
    with pytest.raises(LostAnswerError):
        await service.control_plane.create_run(request())
    assert factory.posts == 2


async def test_many_lost_at_once_each_get_a_run_of_their_own(stub: Stub, service: loops_async.ServiceClient) -> None:
    factory = Factory(stub, ["told", "lost", "lost"] * 20)
    runs = await asyncio.gather(*(service.control_plane.create_run(request()) for _ in range(60)))
    assert sorted(run.id for run in runs) == sorted(run["id"] for run in factory.runs)
    assert factory.posts == 60


async def test_a_service_that_is_down_is_not_waited_for_by_each(stub: Stub, service: loops_async.ServiceClient) -> None:
    factory = Factory(stub, ["never"] * 30)
    started = time.monotonic()
    answers = await asyncio.gather(
        *(service.control_plane.create_run(request()) for _ in range(30)), return_exceptions=True
    )
    assert all(isinstance(answer, LostAnswerError) for answer in answers)
    assert time.monotonic() - started < 30 * _lost_runs.SEEK_SECONDS / 2
    assert factory.posts == 30
    # The session is of use afterwards.
    assert (await service.control_plane.create_run(request())).id == "run-31"


async def test_names_tell_lost_runs_apart(stub: Stub, service: loops_async.ServiceClient) -> None:
    Factory(stub, ["lost", "lost"])
    first, second = await asyncio.gather(
        service.control_plane.create_run(request(8, name="a")), service.control_plane.create_run(request(16, name="b"))
    )
    assert (first.name, first.lora_config_version) == ("a", "8")
    assert (second.name, second.lora_config_version) == ("b", "16")


async def test_lost_runs_that_cannot_be_told_apart_are_named(stub: Stub, service: loops_async.ServiceClient) -> None:
    Factory(stub, ["lost", "lost"])
    answers = await asyncio.gather(
        service.control_plane.create_run(request(8)),
        service.control_plane.create_run(request(16)),
        return_exceptions=True,
    )
    for answer in answers:
        assert isinstance(answer, LostAnswerError)
        assert answer.candidates == ("run-1", "run-2")
        assert "It may be one of run-1, run-2" in str(answer)


async def test_a_run_that_a_cancelled_call_may_have_made_is_not_taken(
    stub: Stub, service: loops_async.ServiceClient
) -> None:
    factory = Factory(stub, ["told", "lost"])
    arrived = asyncio.Event()
    create = factory._create

    async def hold_first(http: web.Request) -> web.StreamResponse:
        if factory.posts == 0:
            answer = await create(http)
            arrived.set()
            await asyncio.Event().wait()
            return answer
        return await create(http)

    stub._answers[f"POST {RUNS}"] = [hold_first]
    cancelled = asyncio.create_task(service.control_plane.create_run(request(8)))
    await arrived.wait()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    with pytest.raises(LostAnswerError, match="one of run-1, run-2"):
        await service.control_plane.create_run(request(16))


async def test_a_session_of_somebody_else_may_get_runs_from_them(
    stub: Stub, service: loops_async.ServiceClient
) -> None:
    factory = Factory(stub, ["lost"])
    with pytest.raises(LostAnswerError, match="look for session theirs"):
        await service.control_plane.create_run(CreateRunRequest(session_id="theirs", base_model="m"))
    assert factory.posts == 1


@pytest.mark.parametrize("status", [429, 503])
async def test_a_creation_that_was_turned_away_is_repeated(
    stub: Stub, service: loops_async.ServiceClient, clock: Clock, status: int
) -> None:
    for _ in range(3):
        stub.on(f"POST {RUNS}", {"message": "later"}, status=status, headers={"Retry-After": "7"})
    Factory(stub, [])
    run = await service.control_plane.create_run(request())
    assert run.id == "run-1"
    assert clock.pauses == [7, 7, 7]


async def test_a_date_to_try_again_at_is_kept(stub: Stub, service: loops_async.ServiceClient, clock: Clock) -> None:
    later = formatdate(time.time() + 20, usegmt=True)
    stub.on(f"POST {RUNS}", {"message": "later"}, status=503, headers={"Retry-After": later})
    stub.on(f"POST {RUNS}", {"message": "later"}, status=503, headers={"Retry-After": "when we can"})
    Factory(stub, [])
    await service.control_plane.create_run(request())
    assert 15 < clock.pauses[0] <= 20
    assert clock.pauses[1] < 2


async def test_a_rate_limit_is_outwaited(stub: Stub, service: loops_async.ServiceClient, clock: Clock) -> None:
    """Hundreds of creations outlast the four tries that a fault is given."""
    for _ in range(8):
        stub.on(f"POST {RUNS}", {"message": "later"}, status=429)
    Factory(stub, [])
    await service.control_plane.create_run(request())
    assert len(clock.pauses) == 8
    assert clock.pauses[0] < 2 < 15 <= clock.pauses[-1] <= 30


async def test_a_failure_that_the_service_owns_up_to_is_not_repeated(
    stub: Stub, service: loops_async.ServiceClient
) -> None:
    stub.on(f"POST {RUNS}", {"message": "out of GPUs"}, status=500)
    with pytest.raises(loops_async.ServerError, match="out of GPUs"):
        await service.control_plane.create_run(request())
    assert stub.count(f"POST {RUNS}") == 1


async def test_a_lost_sampler_is_not_asked_for_again(stub: Stub, colour: Colour, clock: Clock) -> None:
    stub.lose("POST /v1/loops/samplers")
    with pytest.raises(LostAnswerError, match="List the samplers, the newest first"):
        await colour.control_plane(
            stub.url, lambda plane: plane.create_sampler(CreateSamplerRequest(session_id="s1", base_model="m"))
        )
    assert stub.count("POST /v1/loops/samplers") == 1


async def test_pairing_a_sampler_is_harmless_to_repeat(stub: Stub, service: loops_async.ServiceClient) -> None:
    stub.lose("POST /v1/loops/samplers")
    stub.on(
        "POST /v1/loops/samplers",
        {"sampler": {"id": "p", "base_url": "u", "base_model": "m", "created_at": "2026-06-24T18:02:11Z"}},
    )
    sampler = await service.control_plane.create_sampler(CreateSamplerRequest(session_id="s1", run_id="r"))
    assert sampler.id == "p"


async def test_a_lost_deploy_is_not_asked_for_again(stub: Stub, colour: Colour, clock: Clock) -> None:
    stub.lose("POST /v1/loops/checkpoints/deploy")
    body = DeployCheckpointsRequest(checkpoint_ids=["c"], model_name="mine", instance_type_id="i", hf_secret_name="h")
    with pytest.raises(LostAnswerError, match="Look for 'mine'"):
        await colour.control_plane(stub.url, lambda plane: plane.deploy_checkpoints(body))
    assert stub.count("POST /v1/loops/checkpoints/deploy") == 1


async def test_hundreds_of_calls_take_turns(stub: Stub, service: loops_async.ServiceClient) -> None:
    """A listing for each of 300 runs: no more than 64 requests are on the wire, and each is answered."""
    under_way = most = 0

    async def answer(_: web.Request) -> web.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return web.json_response({"checkpoints": []})

    stub.call("GET /v1/loops/checkpoints", answer)
    listings = await asyncio.gather(*(service.control_plane.list_checkpoints(run_id=f"r{n}") for n in range(300)))
    assert listings == [[]] * 300
    assert most <= 64

"""A client's life: opening, closing, and that nothing is left afterwards (also after cancellation)."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web

from loops_async import AdamParams, ClosedError, Datum, LoopsError, SamplingClient, ServiceClient, TrainingClient
from tests.support.clock import Clock
from tests.support.patience import PATIENCE_SECONDS
from tests.support.scripted import COMPLETIONS, KEY, MODEL, Hold, Say, ScriptedService, serving
from tests.support.work import eventually

SESSIONS = "/v1/loops/sessions"
HEALTH = "/trainer/health"
DATUM = Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3]})


def ours() -> set[asyncio.Task[Any]]:
    """Return the library's tasks that are still alive."""
    return {task for task in asyncio.all_tasks() if task.get_name().startswith("loops_async")}


async def test_entering_opens_one_session_and_leaving_leaves_nothing(service: ScriptedService) -> None:
    client = ServiceClient(api_key=KEY, base_url=service.url)
    async with client as entered:
        assert entered is client
        assert client.session_id == "s1"
        assert await client.open() is client
        trainer = await client.create_lora_training_client(MODEL)
        await trainer.optim_step(AdamParams())
        assert ours()
    assert len(service.seen_at("POST", SESSIONS)) == 1
    assert not ours()
    await client.close()


async def test_before_it_is_open_and_after_it_is_closed(service: ScriptedService) -> None:
    client = ServiceClient(api_key=KEY, base_url=service.url)
    calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: client.create_lora_training_client(MODEL),
        lambda: client.create_sampling_client(MODEL),
        lambda: client.list_checkpoints("r1"),
        client.get_server_capabilities,
    ]
    with pytest.raises(ClosedError, match="not open yet"):
        _ = client.session_id
    for call in calls:
        with pytest.raises(ClosedError, match="not open yet"):
            await call()
    await client.open()
    await client.close()
    for call in [*calls, client.open]:
        with pytest.raises(ClosedError, match="closed"):
            await call()
    assert len(service.seen) == 1


async def test_a_session_that_is_refused_leaves_nothing_and_may_be_tried_again(service: ScriptedService) -> None:
    service.answer("POST", SESSIONS, Say(401, {"message": "no"}))
    client = ServiceClient(api_key=KEY, base_url=service.url)
    with pytest.raises(LoopsError):
        await client.open()
    assert not ours()
    await client.open()
    assert client.session_id == "s1"
    await client.close()


async def test_a_cancelled_opening_leaves_nothing(service: ScriptedService) -> None:
    held = Hold(Say())
    service.answer("POST", SESSIONS, held)
    client = ServiceClient(api_key=KEY, base_url=service.url)
    opening = asyncio.create_task(client.open())
    await held.arrived.wait()
    opening.cancel()
    await asyncio.wait([opening])
    assert opening.cancelled()
    assert not ours()


async def test_closing_ends_whatever_is_under_way(service: ScriptedService) -> None:
    client = await ServiceClient(api_key=KEY, base_url=service.url).open()
    trainer = await client.create_lora_training_client(MODEL)
    sampler = await trainer.create_sampling_client("bt://loops:r1/sampler_weights/x")
    polled, sampled, submitted = Hold(Say()), Hold(Say()), Hold(Say())
    service.answer("POST", "/trainer/optim_step", Say(202, {"operation_id": "o"}), submitted)
    service.answer("GET", "/trainer/operations/o", polled)
    service.answer("POST", "/sampler/sample", sampled)
    future = await trainer.optim_step(AdamParams())
    waiting = [
        asyncio.create_task(future.result()),
        asyncio.create_task(trainer.optim_step(AdamParams())),
        asyncio.create_task(trainer.save_state("behind")),
        asyncio.create_task(sampler.sample([1])),
    ]
    for held in (polled, sampled, submitted):
        await held.arrived.wait()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await client.close()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ClosedError] * 4
    assert not ours()
    with pytest.raises(ClosedError):
        await future
    with pytest.raises(ClosedError):
        await trainer.optim_step(AdamParams())
    with pytest.raises(ClosedError):
        await sampler.sample([1])


@pytest.mark.parametrize("after", range(4))
async def test_closing_finishes_though_it_is_cancelled(service: ScriptedService, after: int) -> None:
    client = await ServiceClient(api_key=KEY, base_url=service.url).open()
    await client.create_lora_training_client(MODEL)
    closing = asyncio.create_task(client.close())
    for _ in range(after):
        await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    if after:
        assert not ours()
    await client.close()
    assert not ours()


async def test_a_closed_trainer_takes_nothing_more_but_gives_what_it_took(
    trainer: TrainingClient, service: ScriptedService
) -> None:
    async with trainer:
        future = await trainer.optim_step(AdamParams())
    assert (await future).metrics == {"step": 1.0}
    with pytest.raises(ClosedError, match="training client of run r1 is closed"):
        await trainer.forward([DATUM])
    assert len(service.submitted()) == 1


async def test_connections_are_used_again_and_closed(service: ScriptedService) -> None:
    peers: set[Any] = set()

    async def remember(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        return await Say(body={"supported_models": []})(request)

    service.always("GET", "/v1/loops/capabilities", remember)
    async with ServiceClient(api_key=KEY, base_url=service.url) as client:
        for _ in range(20):
            await client.get_server_capabilities()
    assert len(peers) == 1


def test_an_unpickled_client_lives_in_one_loop_after_the_other_and_keeps_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", KEY)
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def once(pickled: bytes | None) -> bytes:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        async with serving() as service:
            async with ServiceClient(api_key=KEY, base_url=service.url) as client:
                pickled = pickle.dumps(await client.create_sampling_client(MODEL))
            assert (await pickle.loads(pickled).sample([1])).sequences
        return pickled

    pickled = None
    for _ in range(3):
        pickled = asyncio.run(once(pickled))
    gc.collect()
    assert [loop() for loop in loops] == [None] * 3


async def test_many_samples_are_under_way_without_threads(service: ScriptedService, sampler: SamplingClient) -> None:
    threads = threading.active_count()
    held = Hold(Say(body=COMPLETIONS))
    service.always("POST", "/sampler/sample", held)
    tasks = [asyncio.create_task(sampler.sample([1])) for _ in range(100)]
    await service.until_seen("POST", "/sampler/sample", 100)
    assert threading.active_count() == threads
    held.go.set()
    assert len(await asyncio.gather(*tasks)) == 100


async def test_hundreds_of_calls_of_the_control_plane_take_turns(
    client: ServiceClient, service: ScriptedService
) -> None:
    held = Hold(Say(body={"checkpoints": []}))
    service.always("GET", "/v1/loops/checkpoints", held)
    calls = [asyncio.create_task(client.list_checkpoints(f"r{number}")) for number in range(300)]
    await service.until_seen("GET", "/v1/loops/checkpoints", 64)
    await asyncio.sleep(0.05)  # for a 65th request, which does not come
    assert len(service.seen_at("GET", "/v1/loops/checkpoints")) == 64
    held.go.set()
    assert await asyncio.gather(*calls) == [[]] * 300


async def test_a_trainer_is_pinged_until_the_last_of_its_clients_is_closed(
    clock: Clock, client: ServiceClient, service: ScriptedService, trainer: TrainingClient
) -> None:
    service.always("GET", "/v1/loops/runs/r1", Say(body={"run": service.run()}))
    service.always("GET", "/v1/loops/capabilities", Say(body={"supported_models": []}))
    attached = await client.attach_training_client("r1")
    await trainer.close()
    await service.until_seen("GET", HEALTH, len(service.seen_at("GET", HEALTH)) + 3)
    await attached.close()
    await client.get_server_capabilities()  # after a ping that was under way
    pings = len(service.seen_at("GET", HEALTH))
    for _ in range(5):
        await client.get_server_capabilities()
    assert len(service.seen_at("GET", HEALTH)) == pings


async def test_a_trainer_whose_run_was_deactivated_is_not_pinged(
    clock: Clock, client: ServiceClient, service: ScriptedService, trainer: TrainingClient
) -> None:
    service.always("GET", "/v1/loops/capabilities", Say(body={"supported_models": []}))
    service.always("POST", "/v1/loops/runs/r1/deactivate", Say(body={"id": "r1"}))
    await service.until_seen("GET", HEALTH, 2)
    await client.control_plane.deactivate_run("r1")  # not the trainer's own method, which also closes it
    await client.get_server_capabilities()  # after a ping that was under way
    pings = len(service.seen_at("GET", HEALTH))
    for _ in range(5):
        await client.get_server_capabilities()
    assert len(service.seen_at("GET", HEALTH)) == pings


async def test_closing_ends_a_pause_before_a_retry_at_once_and_quietly(
    service: ScriptedService, caplog: pytest.LogCaptureFixture
) -> None:
    client = await ServiceClient(api_key=KEY, base_url=service.url).open()
    service.always("GET", "/v1/loops/capabilities", Say(429, {"message": "later"}, {"Retry-After": "30"}))
    asking = asyncio.create_task(client.get_server_capabilities())
    await eventually(lambda: bool(caplog.records))
    caplog.clear()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await client.close()
        with pytest.raises(ClosedError, match="closed before"):
            await asking
    assert not caplog.records


async def test_closing_ends_a_wait_for_a_run(service: ScriptedService) -> None:
    client = await ServiceClient(api_key=KEY, base_url=service.url).open()
    service.always("GET", "/v1/loops/runs/r1", Say(body={"run": service.run()}))
    service.always("GET", HEALTH, Say(503, {"message": "starting"}))
    waiting = asyncio.create_task(client.wait_for_run("r1"))
    await service.until_seen("GET", HEALTH)
    await client.close()
    with pytest.raises(ClosedError, match="wait for run r1"):
        await waiting

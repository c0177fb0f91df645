"""Time limits of samples, and what is said while something takes long."""

from __future__ import annotations

import asyncio
import pickle
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import pytest
from aiohttp import web

from loops_async import (
    AdamParams,
    Datum,
    InputError,
    SampleTimeoutError,
    SamplingClient,
    ServiceClient,
    TrainingClient,
    _waiting,
)
from loops_async._work import waits
from tests.support.limits import LOOK_SECONDS, expire_when
from tests.support.patience import PATIENCE_SECONDS
from tests.support.scripted import COMPLETIONS, KEY, MODEL, Hold, Reply, Say, ScriptedService
from tests.support.work import eventually

SAMPLE = "/sampler/sample"
SHORT = 0.15
DATUM = Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3]})

Call: TypeAlias = Callable[[SamplingClient], Awaitable[Any]]


async def silence(_: web.BaseRequest) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def many(sampler: SamplingClient) -> None:
    async for _ in sampler.sample_many([[1]], timeout=SHORT):
        pass


WAYS: dict[str, Call] = {
    "call": lambda sampler: sampler.sample([1], timeout=SHORT),
    "options": lambda sampler: sampler.with_options(timeout=SHORT).sample([1]),
    "many": many,
    "logprobs": lambda sampler: sampler.compute_logprobs([1], timeout=SHORT),
    "pickle": lambda sampler: pickle.loads(pickle.dumps(sampler.with_options(timeout=SHORT))).sample([1]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "reply",
    [silence, Say(503, {"error": "full"}), Say(429, {"error": "x"}, {"Retry-After": "3600"})],
    ids=["silence", "503", "429"],
)
async def test_a_limit_bounds_the_whole_call(
    sampler: SamplingClient,
    service: ScriptedService,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
    reply: Reply,
) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", KEY)
    service.always("POST", SAMPLE, reply)
    expire_when(
        lambda: service.seen_at("POST", SAMPLE) if reply is silence else caplog.records, monkeypatch, seconds=SHORT
    )
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(SampleTimeoutError, match=rf"no answer within {SHORT} s, retries included") as late:
            await WAYS[way](sampler)
    assert late.value.timeout == SHORT
    assert not late.value.retryable
    assert ("may still be working" in str(late.value)) is (reply is silence)


@pytest.mark.parametrize(
    "state", [Say(503, {"error": "full"}, {"Retry-After": "3600"}), silence], ids=["full", "silence"]
)
async def test_a_limit_bounds_the_tries_to_be_queued(
    client: ServiceClient, service: ScriptedService, monkeypatch: pytest.MonkeyPatch, state: Reply
) -> None:
    expire_when(lambda: service.seen_at("POST", SAMPLE), monkeypatch, seconds=SHORT)
    service.answer("POST", "/v1/loops/samplers", Say(body={"sampler": service.sampler(deployment_id=None)}))
    sampler = await client.create_sampling_client(MODEL)
    service.always("POST", SAMPLE, state)
    with pytest.raises(SampleTimeoutError, match=rf"within {SHORT} s; it was cancelled"):
        await sampler.sample([1], timeout=SHORT)


async def test_a_limit_of_one_call_leaves_the_client_as_it_is(
    sampler: SamplingClient, service: ScriptedService
) -> None:
    limited = sampler.with_options(timeout=0.01)
    held = Hold(Say(body=COMPLETIONS))
    service.answer("POST", SAMPLE, held)
    sample = asyncio.create_task(limited.with_options(timeout=None).sample([1]))
    await held.arrived.wait()
    await asyncio.sleep(0.05)
    held.go.set()
    assert (await sample).sequences
    assert repr(limited) == repr(sampler)


async def test_a_paired_sampler_has_a_limit_too(
    trainer: TrainingClient, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = await trainer.save_weights_and_get_sampling_client("x")
    limits: list[float | None] = []
    monkeypatch.setattr(_waiting.TimeLimit, "__enter__", lambda limit: limits.append(limit.seconds) or limit)
    await sampler.sample([1])
    assert 300.0 in limits


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
async def test_a_limit_is_positive(sampler: SamplingClient, seconds: float) -> None:
    with pytest.raises(InputError, match="timeout"):
        await sampler.sample([1], timeout=seconds)
    with pytest.raises(InputError, match="timeout"):
        sampler.with_options(timeout=seconds)


async def test_a_sampler_that_comes_up_again_has_its_own_limit(
    sampler: SamplingClient, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    waking = Hold(Say(body={"status": "ACTIVE"}))
    service.answer("POST", SAMPLE, Say(404, {"error": "not deployed"}))
    service.answer("GET", "/v1/models/m1/deployments/d1", Say(body={"status": "WAKING_UP"}), waking)
    expire_when(lambda: waking.arrived.is_set() and not waking.go.is_set(), monkeypatch, seconds=SHORT)
    sample = asyncio.create_task(sampler.sample([1], timeout=SHORT))
    await waking.arrived.wait()
    await asyncio.sleep(10 * LOOK_SECONDS)
    waking.go.set()
    assert (await sample).sequences


async def test_answers_that_arrived_while_the_loop_was_held_are_read(
    sampler: SamplingClient, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, ahead = asyncio.get_running_loop(), 0.0
    time = loop.time
    monkeypatch.setattr(loop, "time", lambda: time() + ahead)
    answered = asyncio.Event()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = await Say(body=COMPLETIONS)(request)
        await response.prepare(request)
        await response.write_eof()
        answered.set()
        return response

    async def hold() -> None:
        nonlocal ahead
        await answered.wait()
        ahead = 2000.0  # for so long, no callback was called

    service.always("POST", SAMPLE, answer)
    sample, _ = await asyncio.gather(sampler.sample([1], timeout=1000.0), hold())
    assert sample.sequences


@pytest.fixture
def soon_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long is said after 0.06 s; to be had before a client."""
    monkeypatch.setattr(waits, "SILENCE_SECONDS", 0.06)


async def test_what_takes_long_says_so(
    soon_said: None,
    trainer: TrainingClient,
    sampler: SamplingClient,
    service: ScriptedService,
    caplog: pytest.LogCaptureFixture,
) -> None:
    optim = await trainer.optim_step(AdamParams())
    service.always("GET", f"/trainer/operations/{optim.operation_id}", Say(408, {"status": "pending"}))
    service.always("POST", "/trainer/forward", silence)
    service.always("GET", "/sampler/trainers_policy_version", Say(body={"policy_version": 0}))
    waiting = [
        asyncio.ensure_future(optim.result()),
        asyncio.create_task(trainer.forward([DATUM])),
        asyncio.create_task(sampler.wait_for_version(7)),
    ]
    for told in (
        rf"still waiting for optim_step {optim.operation_id} of run r1, for \d s now; last answer: it is not done yet",
        r"still waiting for run r1 to accept forward, for \d s now",
        r"to serve version 7, for \d s now; last answer: it serves version 0",
    ):
        await eventually(lambda told=told: re.search(told, caplog.text))
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def test_waiting_for_one_of_the_places_in_flight_says_so(
    soon_said: None,
    service: ScriptedService,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("BT_LOOPS_MAX_CONNECTIONS", "1")
    service.always("POST", SAMPLE, silence)
    async with ServiceClient(api_key=KEY, base_url=service.url) as client:
        sampler = await client.create_sampling_client(MODEL)
        results = await asyncio.gather(*(sampler.sample([1], timeout=SHORT) for _ in range(2)), return_exceptions=True)
    assert [type(result) for result in results] == [SampleTimeoutError] * 2, "the second begins when it is sent"
    assert "still waiting for one of the 1 samples in flight to end (BT_LOOPS_MAX_CONNECTIONS)" in caplog.text

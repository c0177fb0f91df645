"""Sampling through the queue of a serverless sampler."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from loops_async import (
    AdamParams,
    ApiError,
    InputError,
    Limiter,
    RemoteOpError,
    SampleTimeoutError,
    SamplingClient,
    SamplingParams,
    ServerError,
    ServiceClient,
    TrainingClient,
    UnknownRequestError,
    UnsupportedError,
)
from loops_async.protocol import CheckpointUri
from loops_local import LocalService, serve_in_thread
from loops_local.engine.echo import logprob
from tests.support.engines import Engines, WatchedEngine
from tests.support.limits import expire_when
from tests.support.work import body_of, eventually

FEW = SamplingParams(max_tokens=3)
only_async = pytest.mark.parametrize("colour", ["async"], indirect=True)


@pytest.fixture(scope="module")
def local(engines: Engines) -> Iterator[LocalService]:
    with serve_in_thread(engine=engines, serverless=True, provisioning_seconds=0.0, poll_hold_seconds=0.05) as local:
        yield local


@pytest.fixture
async def sampler(service: ServiceClient, engine: WatchedEngine) -> SamplingClient:
    return await service.create_sampling_client(engine.name)


async def test_a_full_queue_is_reported_to_the_limiter(local: LocalService, sampler: SamplingClient) -> None:
    limiter = Limiter(8)
    busy = {"error": {"code": "busy", "message": "the queue is full"}}
    local.faults.answer("POST */queue/sample", 503, busy, headers={"Retry-After": "0"}, times=2)

    results = [done async for done in sampler.sample_many([[1], [2]], sampling_params=FEW, limit=limiter)]

    assert len(results) == 2
    assert limiter.rejections == 2


async def test_a_sample_is_submitted_and_waited_for(
    local: LocalService, sampler: SamplingClient, engine: WatchedEngine
) -> None:
    submitted = local.faults.watch("POST */queue/sample")
    polls = local.faults.watch("GET */queue/operations/*")
    answer = await sampler.sample([5, 6, 7], 2, FEW, include_prompt_logprobs=True)
    assert [one.tokens for one in answer.sequences] == [[5, 6, 7], [6, 7, 5]]
    assert answer.prompt_logprobs == pytest.approx([None, logprob(5, 6, 0), logprob(6, 7, 0)])
    assert answer.policy_version is None
    assert answer.request_id
    body = body_of(submitted[0])
    assert body["model"] == engine.name
    assert "lora" not in body
    for request in (*submitted, *polls):
        assert "X-Sampler-Id" in request.headers
        assert "X-Run-Id" not in request.headers
        assert "X-Min-Policy-Version" not in request.headers


async def test_what_is_known_is_not_asked(local: LocalService, sampler: SamplingClient, engine: WatchedEngine) -> None:
    await sampler.ensure_ready()
    asked = local.faults.watch("GET */v1/models*")
    assert await sampler.discover_base_model_name() == engine.name
    assert await sampler.discover_adapter_name() is None
    assert not asked


async def test_published_weights_are_pinned_under_names_of_their_own(
    local: LocalService, trainer: TrainingClient
) -> None:
    await (await trainer.optim_step(AdamParams()))
    first = await trainer.save_weights_and_get_sampling_client("policy")
    await (await trainer.optim_step(AdamParams()))
    second = await trainer.save_weights_and_get_sampling_client("policy")
    for client, step in ((first, 1), (second, 2)):
        uri = CheckpointUri.parse(str(client.checkpoint_path))
        assert uri.run_id == trainer.run_id
        assert uri.name.startswith("policy-")
        submitted = local.faults.watch("POST */queue/sample")
        answer = await client.sample([5, 6], sampling_params=FEW)
        assert answer.sequences[0].logprobs == pytest.approx(
            [logprob(6, 5, step), logprob(5, 6, step), logprob(6, 5, step)]
        )
        assert body_of(submitted[0])["lora"] == client.checkpoint_path
        assert submitted[0].headers["X-Run-Id"] == trainer.run_id
        assert await client.discover_adapter_name() == client.checkpoint_path


async def test_a_path_that_is_not_a_name_is_replaced_by_one(local: LocalService, trainer: TrainingClient) -> None:
    done = {"status": "done", "result": {"version": 1, "path": "s3://bucket/somewhere/"}}
    local.faults.answer("GET */operations/*", 200, done)
    client = await trainer.save_weights_and_get_sampling_client("policy")
    assert str(client.checkpoint_path).startswith(f"bt://loops:{trainer.run_id}/sampler_weights/policy-")


async def test_a_checkpoint_needs_no_run(service: ServiceClient, trainer: TrainingClient) -> None:
    await (await trainer.optim_step(AdamParams()))
    saved = await (await trainer.save_weights_for_sampler("one", publish=False))
    client = await service.create_sampling_client_from_checkpoint(saved.path)
    assert (await client.sample([5, 6], sampling_params=FEW)).sequences[0].logprobs[0] == logprob(6, 5, 1)


async def test_versions_are_not_offered(trainer: TrainingClient) -> None:
    with pytest.raises(UnsupportedError, match="policy version"):
        await trainer.policy_version()
    saved = await (await trainer.save_weights_for_sampler("one"))
    with pytest.raises(InputError, match="min_policy_version"):
        await trainer.create_sampling_client(saved.path, min_policy_version=1)


async def test_many_at_once(sampler: SamplingClient) -> None:
    answers = await asyncio.gather(*(sampler.sample([n, 300], sampling_params=FEW) for n in range(100)))
    assert [answer.sequences[0].tokens[0] for answer in answers] == list(range(100))


async def test_a_long_wait_polls_again_and_again(local: LocalService, sampler: SamplingClient) -> None:
    polls = local.faults.answer("GET */queue/operations/*", 408, times=3)
    assert (await sampler.sample([5])).sequences
    assert len(polls) == 3


@pytest.mark.parametrize("status", [502, 504, 408])
async def test_submitting_again_is_harmless(local: LocalService, sampler: SamplingClient, status: int) -> None:
    refused = local.faults.answer("POST */queue/sample", status)
    submitted = local.faults.watch("POST */queue/sample")
    assert (await sampler.sample([5])).sequences
    assert submitted[0].headers["Idempotency-Key"] == refused[0].headers["Idempotency-Key"]


async def test_a_sample_whose_acceptance_was_lost_is_submitted_again(
    local: LocalService, sampler: SamplingClient
) -> None:
    lost = local.faults.lose_answer("POST */queue/sample")
    assert (await sampler.sample([5])).sequences
    assert len(lost) == 1


async def test_a_503_that_does_not_say_when_is_final(local: LocalService, sampler: SamplingClient) -> None:
    full = local.faults.answer("POST */queue/sample", 503, {"error": "overloaded"}, times=2)
    with pytest.raises(ServerError, match="overloaded"):
        await sampler.sample([5])
    assert len(full) == 1


async def test_a_completion_that_comes_at_once_is_taken(local: LocalService, sampler: SamplingClient) -> None:
    local.faults.answer("POST */queue/sample", 200, {"choices": [{"token_ids": [7], "text": "x"}]})
    assert (await sampler.sample([5])).sequences[0].tokens == [7]


async def test_what_the_model_cannot_do_fails_the_sample(sampler: SamplingClient) -> None:
    with pytest.raises(RemoteOpError, match="structured outputs"):
        await sampler.sample([5], sampling_params=SamplingParams(structured_outputs={"regex": "a*"}))


async def test_a_bad_request_is_refused_at_once(local: LocalService, sampler: SamplingClient) -> None:
    local.faults.answer("POST */queue/sample", 422, {"error": "no"})
    with pytest.raises(ApiError, match="no"):
        await sampler.sample([5])


async def test_a_forgotten_sample_is_told_apart(local: LocalService, sampler: SamplingClient) -> None:
    local.faults.answer("GET */queue/operations/*", 404, {"error": "never heard"})
    with pytest.raises(UnknownRequestError, match="sample again"):
        await sampler.sample([5])


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_sample_that_takes_too_long_is_cancelled(
    service: ServiceClient, local: LocalService, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    expire_when(lambda: engine.waiting_samples == 1, monkeypatch, seconds=0.05)
    engine.hold_samples()
    plan = local.faults.drop if is_lost else local.faults.watch
    cancels = plan("POST */queue/operations/*/cancel")
    sampler = await service.create_sampling_client(engine.name, timeout=0.05)
    with pytest.raises(SampleTimeoutError, match=r"no completion within 0\.05 s.*it was cancelled") as late:
        await sampler.sample([5])
    assert late.value.timeout == 0.05
    assert len(cancels) == 1
    if not is_lost:
        await eventually(lambda: engine.waiting_samples == 0)


@only_async
async def test_cancelling_cancels_the_sample(
    local: LocalService, sampler: SamplingClient, engine: WatchedEngine
) -> None:
    engine.hold_samples()
    cancels = local.faults.watch("POST */queue/operations/*/cancel")
    sampling = asyncio.create_task(sampler.sample([5]))
    await eventually(lambda: engine.waiting_samples == 1)
    sampling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sampling
    assert len(cancels) == 1
    await eventually(lambda: engine.waiting_samples == 0)


@only_async
async def test_cancelling_while_it_is_submitted_cancels_a_sample_that_may_have_arrived(
    local: LocalService, sampler: SamplingClient
) -> None:
    cancels = local.faults.watch("POST */queue/operations/*/cancel")
    arrived = local.faults.delay("POST */queue/sample", 30.0)
    sampling = asyncio.create_task(sampler.sample([5]))
    await eventually(lambda: arrived)
    sampling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sampling
    assert cancels[0].path.split("/")[-2] == arrived[0].headers["Idempotency-Key"]

"""Every member of a sampling client."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest

from loops_async import (
    AuthenticationError,
    BadRequestError,
    EncodedTextChunk,
    ImageChunk,
    InputError,
    ModelInput,
    SampleTimeoutError,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TrainingClient,
)
from loops_local import LocalService
from loops_local.engine.echo import MAX_SEQ_LEN, logprob
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.limits import expire_when
from tests.support.work import FEW_TOKENS, PROMPT, body_of, eventually, run_python, scores, train, version_sampled


@pytest.fixture
async def sampler(trainer: TrainingClient) -> SamplingClient:
    """A client of a paired sampler after three steps of training."""
    await train(trainer, steps=3)
    return await trainer.save_weights_and_get_sampling_client("three")


async def test_a_completion(sampler: SamplingClient) -> None:
    answer = await sampler.sample(PROMPT, sampling_params=FEW_TOKENS)

    (sequence,) = answer.sequences
    assert sequence.tokens == [104, 105, 104, 105]
    assert sequence.logprobs == scores([105, *sequence.tokens], version=3)
    assert (sequence.text, sequence.stop_reason) == ("hihi", "length")
    assert (answer.policy_version, answer.prompt_logprobs, answer.topk_prompt_logprobs) == (3, None, None)
    assert answer.request_id


async def test_arguments_are_positional(sampler: SamplingClient) -> None:
    prompt = ModelInput([EncodedTextChunk([104]), EncodedTextChunk([105])])
    answer = await sampler.sample(prompt, 2, SamplingParams(max_tokens=2), True, 3)

    assert [sequence.tokens for sequence in answer.sequences] == [[104, 105], [105, 104]]
    assert answer.prompt_token_ids == PROMPT
    assert answer.prompt_logprobs == [None, pytest.approx(logprob(104, 105, 3))]
    assert answer.topk_prompt_logprobs is not None
    assert answer.topk_prompt_logprobs[0] is None
    best = sorted((logprob(104, token, 3), token) for token in range(259))[:-4:-1]
    expected: list[Any] = [(token, pytest.approx(value)) for value, token in best]
    assert answer.topk_prompt_logprobs[1] == expected


@pytest.mark.parametrize(
    ("stop", "tokens", "text"),
    [("i", [104, 105], "h"), (["x", "ih"], [104, 105, 104], "h"), ([105], [104, 105], "h")],
    ids=["text", "texts", "tokens"],
)
async def test_stops(sampler: SamplingClient, stop: Any, tokens: list[int], text: str) -> None:
    answer = await sampler.sample(PROMPT, 1, SamplingParams(max_tokens=8, stop=stop))
    (sequence,) = answer.sequences
    assert (sequence.tokens, sequence.text, sequence.stop_reason) == (tokens, text, "stop")


async def test_parameters_reach_the_service(
    sampler: SamplingClient, trainer: TrainingClient, local: LocalService
) -> None:
    hits = local.faults.watch("POST */sample", times=2)
    params = SamplingParams(max_tokens=5, seed=1, temperature=0.5, top_k=9, top_p=0.8, stop="x")
    await sampler.sample(PROMPT, 2, params, affinity_key="group-7")
    await sampler.sample(PROMPT)

    given = {"max_tokens": 5, "seed": 1, "temperature": 0.5, "top_k": 9, "top_p": 0.8, "stop": "x"}
    first, second = map(body_of, hits)
    assert first.items() >= {"prompt": PROMPT, "n": 2, "logprobs": 0, **given}.items()
    assert not {"max_tokens", "seed", "stop", "top_k", "prompt_logprobs"} & second.keys()
    assert hits[0].headers["X-Baseten-Session-ID"] == "group-7"
    assert hits[0].headers["X-Run-Id"] == trainer.run_id
    assert hits[0].headers["X-Min-Policy-Version"] == "3"


async def test_logprobs_of_a_prompt(sampler: SamplingClient) -> None:
    logprobs = await sampler.compute_logprobs([1, 20, 30, 40])
    assert logprobs[0] is None
    assert logprobs[1:] == scores([1, 20, 30, 40], version=3)
    assert await sampler.compute_logprobs([5]) == [None]
    longest = [1, 20, 30, 40] * (MAX_SEQ_LEN // 4)
    assert (await sampler.compute_logprobs(longest))[1:] == scores(longest, version=3)
    with pytest.raises(BadRequestError, match=f"longest sequence is {MAX_SEQ_LEN} tokens"):
        await sampler.compute_logprobs([*longest, 1])


@pytest.mark.parametrize(
    ("prompt", "params", "options", "reason"),
    [
        (ModelInput([EncodedTextChunk([5]), ImageChunk.from_bytes(b"\x89PNG", "png", 3)]), FEW_TOKENS, {}, "images"),
        ([5], SamplingParams(structured_outputs={"json": {}}), {}, "structured outputs"),
        ([5], FEW_TOKENS, {"include_routed_experts": True}, "no routed experts"),
    ],
    ids=["images", "structured outputs", "routed experts"],
)
async def test_what_a_text_model_cannot_do_is_refused_with_a_reason(
    sampler: SamplingClient, prompt: Any, params: SamplingParams, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadRequestError, match=reason) as refused:
        await sampler.sample(prompt, 1, params, **options)
    assert refused.value.status == 422


async def test_what_the_sampler_serves(
    sampler: SamplingClient, trainer: TrainingClient, engine: WatchedEngine, service: ServiceClient
) -> None:
    assert sampler.get_base_model() == await sampler.discover_base_model_name() == engine.name
    assert await sampler.discover_adapter_name() == f"bt://loops:{trainer.run_id}/sampler_weights/three"
    assert await (await service.create_sampling_client(engine.name)).discover_adapter_name() is None


async def test_it_is_ready(sampler: SamplingClient) -> None:
    await sampler.ensure_ready()
    await sampler.ensure_ready(1.0)
    await sampler.close()
    assert (await sampler.sample(PROMPT, 1, FEW_TOKENS)).sequences


async def test_a_client_of_one_checkpoint(sampler: SamplingClient, trainer: TrainingClient) -> None:
    path = f"bt://loops:{trainer.run_id}/sampler_weights/three"
    pinned = await trainer.create_sampling_client(path)

    assert (pinned.checkpoint_path, pinned.checkpoint_name) == (path, "three")
    assert await version_sampled(pinned) == 3
    with pytest.raises(InputError, match="sampler_weights"):
        await trainer.create_sampling_client(f"bt://loops:{trainer.run_id}/weights/three")
    with pytest.raises(Exception, match="missing"):
        await trainer.create_sampling_client(f"bt://loops:{trainer.run_id}/sampler_weights/missing")


async def test_a_sample_that_takes_too_long_is_not_repeated(
    service: ServiceClient, engine: WatchedEngine, local: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = await service.create_sampling_client(engine.name, 0.1)
    hits = local.faults.watch("POST */sample", times=2)
    engine.hold_samples()
    expire_when(lambda: engine.waiting_samples == 1, monkeypatch, seconds=0.1)
    with pytest.raises(
        SampleTimeoutError, match=r"no answer within 0\.1 s.*paid for twice.*increase `timeout`"
    ) as raised:
        await sampler.sample(PROMPT, 1, FEW_TOKENS)
    assert isinstance(raised.value, TimeoutError)
    assert (raised.value.timeout, raised.value.retryable) == (0.1, False)
    assert len(hits) == 1
    await eventually(lambda: engine.waiting_samples == 0)


async def test_a_limit_on_connections_is_for_samples_only(
    colour: Colour, local: LocalService, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BT_LOOPS_MAX_CONNECTIONS", "3")
    engine.hold_samples()
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
        trainer = await service.create_lora_training_client(engine.name)
        sampler = await service.create_sampling_client(engine.name)
        samples = [asyncio.ensure_future(sampler.sample(PROMPT, 1, FEW_TOKENS)) for _ in range(20)]
        await eventually(lambda: engine.waiting_samples == 3)
        await train(trainer, steps=2)
        assert engine.waiting_samples == 3
        engine.release_samples()
        assert all(answer.sequences for answer in await asyncio.gather(*samples))


async def test_a_sampler_that_sleeps_is_woken_once(
    service: ServiceClient, engine: WatchedEngine, local: LocalService
) -> None:
    states = local.faults.answer("GET */v1/models/*", 200, {"status": "SCALED_TO_ZERO"}, times=2)
    wakes = local.faults.watch("POST */wake", times=2)
    sampler = await service.create_sampling_client(engine.name)
    assert (await sampler.sample(PROMPT, 1, FEW_TOKENS)).sequences
    assert (len(states), len(wakes)) == (2, 1)


UNPICKLE = {
    "loops_async": """
import asyncio, pickle, sys
sampler = pickle.load(sys.stdin.buffer)
sample = lambda: sampler.sample([104, 105], 1)
print(asyncio.run(sample()).policy_version, asyncio.run(sample()).policy_version)
""",
    "loops_sync": """
import pickle, sys
sampler = pickle.load(sys.stdin.buffer)
print(sampler.sample([104, 105], 1).policy_version, sampler.sample([104, 105], 1).policy_version)
""",
}


async def test_it_works_in_another_process_which_has_the_key(
    sampler: SamplingClient, colour: Colour, local: LocalService
) -> None:
    pickled = pickle.dumps(colour.own(sampler))
    assert local.api_key.encode() not in pickled

    script = UNPICKLE[colour.module.__name__]
    assert await run_python(script, stdin=pickled, BASETEN_API_KEY=local.api_key) == "3 3"


async def test_without_a_key_another_process_says_so(sampler: SamplingClient, colour: Colour) -> None:
    copy = colour.adopt(pickle.loads(pickle.dumps(colour.own(sampler))))
    with pytest.raises(AuthenticationError, match="BASETEN_API_KEY"):
        await copy.sample(PROMPT, 1, FEW_TOKENS)


async def test_a_copy_goes_on_in_this_process(
    sampler: SamplingClient, colour: Colour, local: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", local.api_key)
    copy = colour.adopt(pickle.loads(pickle.dumps(colour.own(sampler))))
    assert copy.get_base_model() == sampler.get_base_model()
    assert await version_sampled(copy) == 3

"""Real gradients and real logprobs through the public clients, on a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from loops_async import (
    AdamParams,
    BadRequestError,
    Datum,
    SampledSequence,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TrainingClient,
)
from loops_local import LocalService
from tests.support.work import eventually

pytestmark = pytest.mark.torch

FACTS = {"a:": "zibble", "longer question:": "qux"}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
CLOSE = 1e-4


@pytest.fixture(scope="module")
def local(tiny: LocalService) -> LocalService:
    return tiny


@pytest.fixture
async def trainer(service: ServiceClient) -> TrainingClient:
    return await service.create_lora_training_client("tiny", rank=8, seed=0)


def learned(text: Sequence[int], *, skip: int, **inputs: list[float]) -> Datum:
    """Return an example of a text of which the first `skip` tokens are given; each of `inputs` is for the rest."""
    padded: dict[str, Any] = {name: [0.0] * (skip - 1) + values for name, values in inputs.items()}
    return Datum(model_input=text[:-1], loss_fn_inputs={"target_tokens": text[1:], **padded})


async def fine_tune(trainer: TrainingClient, tokenizer: Any, steps: int) -> list[float]:
    data = []
    for question, answer in FACTS.items():
        prompt, rest = tokenizer.encode(question), [*tokenizer.encode(answer), tokenizer.eos_token_id]
        data.append(learned([*prompt, *rest], skip=len(prompt), weights=[1.0] * len(rest)))
    losses = []
    for _ in range(steps):
        forward = await trainer.forward_backward(data, "cross_entropy")
        optim = await trainer.optim_step(AdamParams(learning_rate=1e-2))
        losses.append((await forward).loss)
        await optim
    return losses


async def test_fine_tuning_memorises(trainer: TrainingClient) -> None:
    tokenizer = await trainer.get_tokenizer()
    losses = await fine_tune(trainer, tokenizer, steps=25)
    sampler = await trainer.save_weights_and_get_sampling_client("facts")

    assert losses[0] > 2.0
    assert losses[-1] < 0.1
    answers = [await sampler.sample(tokenizer.encode(question), 1, GREEDY) for question in FACTS]
    assert [answer.sequences[0].text for answer in answers] == list(FACTS.values())
    assert {answer.sequences[0].stop_reason for answer in answers} == {"stop"}


async def test_policy_gradients_raise_the_reward(trainer: TrainingClient) -> None:
    """The reward is the part of the sampled bytes that are lower-case letters."""
    prompt = list(b"say:")
    rewards: list[float] = []
    for seed in range(16):
        sampler = await trainer.save_weights_and_get_sampling_client("policy")
        sequences = (await sampler.sample(prompt, 16, SamplingParams(max_tokens=8, seed=seed))).sequences
        graded = [sum(97 <= token <= 122 for token in one.tokens) / len(one.tokens) for one in sequences]
        rewards.append(sum(graded) / len(graded))
        data = [policy_example(prompt, one, grade - rewards[-1]) for one, grade in zip(sequences, graded, strict=True)]
        await trainer.forward_backward(data, "importance_sampling")
        await (await trainer.optim_step(AdamParams(learning_rate=1e-2)))
    assert sum(rewards[:2]) / 2 < 0.25
    assert sum(rewards[-2:]) / 2 > 0.5


async def test_pairs_need_no_weights(trainer: TrainingClient) -> None:
    texts = [list(b"ask: good"), list(b"ask: bad")]
    plain = [learned(text, skip=1, ref_logprobs=[-5.0] * (len(text) - 1)) for text in texts]
    weighted = [
        learned(text, skip=1, ref_logprobs=[-5.0] * (len(text) - 1), weights=[1.0] * (len(text) - 1)) for text in texts
    ]
    losses = [(await (await trainer.forward(data, "dpo"))).loss for data in (plain, weighted)]
    assert losses[0] == losses[1] != 0


async def test_a_policy_loss_may_be_left_a_sum(trainer: TrainingClient) -> None:
    data = [learned([1, 20, 30, 40, 50], skip=1, logprobs=[-5.0] * 4, advantages=[1.0] * 4)]
    norms = []
    for config in (None, {"skip_token_normalization": True}):
        await (await trainer.init_trainer_server(8))
        step = await trainer.forward_backward(data, "ppo", config)
        optim = await (await trainer.optim_step(AdamParams()))
        assert (await step).metrics.get("skip_token_normalization") == (config and 1.0)
        assert optim.metrics is not None
        norms.append(optim.metrics["grad_norm"])
    assert norms[1] == pytest.approx(4 * norms[0], rel=1e-4)
    assert norms[0] > 0


def policy_example(prompt: list[int], sequence: SampledSequence, advantage: float) -> Datum:
    assert sequence.logprobs is not None
    return learned(
        [*prompt, *sequence.tokens],
        skip=len(prompt),
        logprobs=sequence.logprobs,
        advantages=[advantage] * len(sequence.tokens),
    )


async def test_sampler_and_trainer_agree_on_logprobs(trainer: TrainingClient) -> None:
    await fine_tune(trainer, await trainer.get_tokenizer(), steps=3)
    sampler = await trainer.save_weights_and_get_sampling_client("three")
    prompt = list(b"agree? ")
    sequences = (await sampler.sample(prompt, 4, SamplingParams(max_tokens=16, seed=1))).sequences

    texts = [[*prompt, *sequence.tokens] for sequence in sequences]
    output = await (await trainer.forward([learned(text, skip=1) for text in texts]))
    for text, sequence, outputs in zip(texts, sequences, output.loss_fn_outputs, strict=True):
        trained: Any = outputs["logprobs"].tolist()
        assert sequence.logprobs == pytest.approx(trained[len(prompt) - 1 :], abs=CLOSE)
        assert (await sampler.compute_logprobs(text))[1:] == pytest.approx(trained, abs=CLOSE)


async def test_a_sequence_of_exactly_the_longest_length_is_scored(trainer: TrainingClient) -> None:
    sampler = await trainer.save_weights_and_get_sampling_client("none")
    longest = list(range(250)) * 8 + list(range(48))
    scored = await sampler.compute_logprobs(longest)
    output = await (await trainer.forward([learned(longest, skip=1)]))
    assert scored[1:] == pytest.approx(output.loss_fn_outputs[0]["logprobs"].tolist(), abs=CLOSE)
    with pytest.raises(BadRequestError, match="longest sequence is 2048 tokens"):
        await sampler.compute_logprobs([*longest, 1])


async def test_weights_stay_what_they_were_while_training_goes_on(trainer: TrainingClient) -> None:
    tokenizer = await trainer.get_tokenizer()
    await fine_tune(trainer, tokenizer, steps=2)
    published = await (await trainer.save_weights_for_sampler("two"))
    pinned = await trainer.create_sampling_client(published.path)
    text = list(b"a:zibble")
    before: Any = await pinned.compute_logprobs(text)

    training = asyncio.ensure_future(fine_tune(trainer, tokenizer, steps=5))
    during = await asyncio.gather(*(pinned.compute_logprobs(text) for _ in range(32)))
    await training
    following = await trainer.save_weights_and_get_sampling_client("seven")

    assert all(scores[1:] == pytest.approx(before[1:], abs=CLOSE) for scores in during)
    after: Any = await following.compute_logprobs(text)
    assert sum(after[1:]) > sum(before[1:]) + 1.0
    assert await pinned.compute_logprobs(text) == pytest.approx(before, abs=CLOSE, nan_ok=True)


async def test_each_answer_names_the_version_that_made_it(trainer: TrainingClient) -> None:
    """Weights are published under one name while samples run; each version scores the prompt in its own way."""
    text = list(b"which version is this?")
    score = SamplingParams(max_tokens=2)
    by_version: dict[int, Any] = {}
    answers: list[tuple[int, Any]] = []
    is_done = False

    async def sample() -> None:
        while not is_done:
            answer = await sampler.sample(text, 1, score, include_prompt_logprobs=True)
            assert answer.policy_version is not None
            answers.append((answer.policy_version, answer.prompt_logprobs))

    async def publish() -> SamplingClient:
        output = await (await trainer.forward_backward([learned(text, skip=1)]))
        by_version[len(by_version)] = output.loss_fn_outputs[0]["logprobs"].tolist()
        following = await trainer.save_weights_and_get_sampling_client()
        await trainer.optim_step(AdamParams(learning_rate=1e-2))
        return following

    sampler = await publish()
    async with asyncio.TaskGroup() as samplers:
        for _ in range(3):
            samplers.create_task(sample())
        for _ in range(8):
            await publish()
            await eventually(lambda: answers and answers[-1][0] == len(by_version) - 1)
        is_done = True
    for version, logprobs in answers:
        fits = [v for v, own in by_version.items() if logprobs[1:] == pytest.approx(own, abs=CLOSE)]
        assert fits == [version]


async def test_a_run_resumes_exactly_where_it_was_saved(trainer: TrainingClient, service: ServiceClient) -> None:
    tokenizer = await trainer.get_tokenizer()
    await fine_tune(trainer, tokenizer, steps=3)
    saved = await (await trainer.save_state("three"))
    straight_on = await fine_tune(trainer, tokenizer, steps=2)

    resumed = await service.create_training_client_from_state_with_optimizer(saved.path)
    assert await fine_tune(resumed, tokenizer, steps=2) == pytest.approx(straight_on, abs=1e-5)
    fresh = await service.create_training_client_from_state(saved.path)
    with_fresh_optimizer = await fine_tune(fresh, tokenizer, steps=2)
    assert with_fresh_optimizer[0] == pytest.approx(straight_on[0], abs=1e-5)
    assert with_fresh_optimizer[1] != pytest.approx(straight_on[1], abs=1e-5)


async def test_the_tokenizer_is_the_model_s(trainer: TrainingClient, service: ServiceClient) -> None:
    tokenizer = await trainer.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界")) == "Grüße, 世界"
    sampler = await service.create_sampling_client("tiny")
    assert (await sampler.get_tokenizer()).get_vocab() == tokenizer.get_vocab()

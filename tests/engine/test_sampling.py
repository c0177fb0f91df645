"""Sampling: exact logprobs, seeds, filters, ends, many at a time with different adapters, and trouble."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loops_async.types import AdamParams, Datum, ImageChunk, ModelInput, SamplingParams
from loops_local.engine.base import (
    Adapter,
    Completion,
    Engine,
    RefusedError,
    SampleJob,
    SampleOutcome,
    Sampler,
    Trainer,
)
from loops_local.engine.byte_tokenizer import END_TOKEN
from loops_local.engine.pytorch import sampler as sampler_module
from loops_local.engine.pytorch.picking import pick
from tests.support.patience import PATIENCE_SECONDS

from .tools import job, logprobs, randomize, text, tokens


def _adapters(engine: Engine, tmp_path: Path) -> list[Adapter]:
    """Of different ranks, and far enough from the base that each answers in its own way."""
    made = []
    for rank in (2, 4, 8):
        trainer = engine.trainer(rank)
        randomize(trainer, tmp_path, seed=rank, size=0.1)
        made.append(trainer.adapter())
    return made


def _ask(sampler: Sampler, jobs: Sequence[SampleJob]) -> list[SampleOutcome]:
    """Submit all at once, so that they are under way together."""
    futures = [sampler.submit(one) for one in jobs]
    return [future.result() for future in futures]


def _tokens(outcomes: Sequence[SampleOutcome]) -> list[list[list[int]]]:
    return [[completion.tokens for completion in outcome.completions] for outcome in outcomes]


def _one(sampler: Sampler, asked: SampleJob) -> Completion:
    [completion] = sampler.submit(asked).result().completions
    return completion


# --- exactness -------------------------------------------------------------------------------------------------------


def test_logprobs_are_the_trainers(engine: Engine, sampler: Sampler, tmp_path: Path) -> None:
    trainers = [engine.trainer(rank, seed=0) for rank in (2, 8)]
    for seed, trainer in enumerate(trainers):
        randomize(trainer, tmp_path, seed=seed, size=0.05)
    prompts = [tokens(n, seed=n) for n in (1, 7, 30)]
    cases = [(trainer, prompt) for trainer in trainers for prompt in prompts]
    settings = {"max_tokens": 40, "seed": 1, "temperature": 0.7, "top_k": 50}
    outcomes = _ask(sampler, [job(prompt, trainer.adapter(), n=2, **settings) for trainer, prompt in cases])
    for (trainer, prompt), outcome in zip(cases, outcomes, strict=True):
        for completion in outcome.completions:
            full = prompt + completion.tokens
            datum = Datum(model_input=full[:-1], loss_fn_inputs={"target_tokens": full[1:]})
            [expected] = logprobs(trainer.forward([datum], "cross_entropy", {}, backward=False))
            np.testing.assert_allclose(completion.logprobs, expected[len(prompt) - 1 :], atol=1e-4)


def test_prompt_logprobs(trainer: Trainer, sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "HEAD_POSITIONS", 4)
    randomize(trainer, tmp_path)
    prompt = tokens(11, seed=1)
    found = (
        sampler.submit(job(prompt, trainer.adapter(), n=2, max_tokens=2, prompt_logprobs=3)).result().prompt_logprobs
    )
    output = trainer.forward([Datum(model_input=prompt)], "cross_entropy", {}, backward=False, top_k=3).loss_fn_outputs[
        0
    ]
    assert found is not None
    assert found[0] is None
    assert len(found) == len(prompt)
    ids, best = output["topk_token_ids"].to_numpy(), output["topk_logprobs"].to_numpy()
    for i, given in enumerate(found[1:]):
        assert given is not None
        assert next(iter(given)) == prompt[i + 1]
        assert given[prompt[i + 1]] == pytest.approx(output["logprobs"].data[i], abs=1e-4)
        assert set(given) == {prompt[i + 1], *ids[i].tolist()}
        assert [given[token] for token in ids[i].tolist()] == pytest.approx(best[i].tolist(), abs=1e-4)


def test_prompt_logprobs_of_the_prompt_alone(sampler: Sampler) -> None:
    outcome = sampler.submit(job([5, 6, 7], max_tokens=1, temperature=0.0, prompt_logprobs=0)).result()
    assert [given and list(given) for given in outcome.prompt_logprobs or ()] == [None, [6], [7]]
    assert sampler.submit(job([5, 6, 7], max_tokens=1)).result().prompt_logprobs is None


# --- many at a time --------------------------------------------------------------------------------------------------


def test_a_mixed_batch_equals_each_alone(engine: Engine, sampler: Sampler, tmp_path: Path) -> None:
    adapters: list[Adapter | None] = [None, *_adapters(engine, tmp_path)]
    jobs = [
        job(tokens(3 + i, seed=i), adapters[i % 4], n=2, seed=i, max_tokens=5 + 3 * i, temperature=float(i % 2))
        for i in range(12)
    ]
    together = _ask(sampler, jobs)
    alone = [sampler.submit(one).result() for one in jobs]
    assert _tokens(together) == _tokens(alone)
    for one, other in zip(together, alone, strict=True):
        for a, b in zip(one.completions, other.completions, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    same_prompt = _ask(sampler, [job("same", adapter, temperature=0.0, max_tokens=10) for adapter in adapters])
    assert len({tuple(completion[0]) for completion in _tokens(same_prompt)}) == 4


def test_more_than_fits_at_once(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples than rows, than memory for the cache and than one prefill takes: later ones wait their turn."""
    jobs = [job(tokens(5 + i, seed=i), n=3 + 9 * (i % 2), seed=i, max_tokens=6) for i in range(6)]
    expected = _tokens(_ask(sampler, jobs))
    monkeypatch.setattr(sampler_module, "MAX_ROWS", 5)
    monkeypatch.setattr(sampler_module, "PREFILL_TOKENS", 16)
    assert _tokens(_ask(sampler, jobs)) == expected
    monkeypatch.setattr(sampler_module, "MAX_CACHE_BYTES", 1)
    assert _tokens(_ask(sampler, jobs)) == expected


def test_later_requests_join_those_under_way(sampler: Sampler) -> None:
    long = sampler.submit(job("long", n=4, seed=1, max_tokens=1500))
    short = [_one(sampler, job("short", seed=seed, max_tokens=3)) for seed in range(5)]
    assert not long.done()
    assert all(len(completion.tokens) <= 3 for completion in short)
    long.cancel()


def test_concurrent_requests_share_their_steps(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def counted(logprobs: Tensor, *rest: Any) -> list[int]:
        steps.append(len(logprobs))
        return pick(logprobs, *rest)

    monkeypatch.setattr(sampler_module, "pick", counted)
    outcomes = _ask(sampler, [job(tokens(5, seed=i), seed=i, max_tokens=16) for i in range(32)])
    made = sum(len(outcome.completions[0].tokens) for outcome in outcomes)
    assert sum(steps) == made
    assert len(steps) < made / 4


# --- choosing --------------------------------------------------------------------------------------------------------


def test_seeds(sampler: Sampler) -> None:
    first, again, other = (
        _tokens([sampler.submit(job("x", n=4, seed=s, max_tokens=8)).result()])[0] for s in (1, 1, 2)
    )
    assert first == again
    assert len({tuple(sample) for sample in first + other}) == 8
    free = _tokens(_ask(sampler, [job("x", max_tokens=8)] * 2))
    assert free[0] != free[1]


def _draw(sampler: Sampler, count: int, **params: float) -> tuple[Counter[int], dict[int, float]]:
    """Draw one token many times; returns how often each came, and its logprob."""
    drawn = sampler.submit(job("x", n=count, seed=0, max_tokens=1, **params)).result().completions
    return Counter(one.tokens[0] for one in drawn), {one.tokens[0]: one.logprobs[0] for one in drawn}


def test_frequencies_follow_the_probabilities(sampler: Sampler) -> None:
    count = 3000
    counts, logprob = _draw(sampler, count)
    for token, seen in counts.most_common(5):
        p = float(np.exp(logprob[token]))
        assert seen / count == pytest.approx(p, abs=4 * (p / count) ** 0.5)
    cold, of_cold = _draw(sampler, count, temperature=0.5)
    [(top, seen)] = cold.most_common(1)
    share = np.exp(2 * logprob[top]) / sum(np.exp(2 * value) for value in logprob.values())
    assert seen / count == pytest.approx(share, abs=0.03)
    assert of_cold[top] == pytest.approx(logprob[top], abs=1e-5)


def test_a_draw_of_nothing_takes_the_first_that_is_possible() -> None:
    assert pick(torch.tensor([[-200.0, 0.0]]), [SamplingParams()], [0.0]) == [1]


@pytest.mark.parametrize(
    ("params", "most"), [({"top_k": 3}, 3), ({"top_k": 1}, 1), ({"top_p": 1e-6}, 1), ({"temperature": 1e-9}, 1)]
)
def test_filters_leave_the_best(sampler: Sampler, params: dict[str, float], most: int) -> None:
    _, everything = _draw(sampler, 3000)
    counts, _ = _draw(sampler, 200, **params)
    assert set(counts) == set(sorted(everything, key=everything.__getitem__, reverse=True)[:most])


@pytest.mark.parametrize("params", [{"top_p": 0.5}, {"top_k": 8, "top_p": 0.5}])
def test_top_p_keeps_just_enough(sampler: Sampler, params: dict[str, float]) -> None:
    """The mass is that of what top_k left."""
    _, logprob = _draw(sampler, 4000)
    ranked = sorted(logprob, key=logprob.__getitem__, reverse=True)[: int(params.get("top_k", 259))]
    mass = np.exp([logprob[token] for token in ranked])
    before = (np.cumsum(mass) - mass) / (mass.sum() if "top_k" in params else 1.0)
    kept = {token for token, share in zip(ranked, before, strict=True) if share < 0.5}
    counts, _ = _draw(sampler, 1000, **params)
    assert set(counts) == kept


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parrot(engine: Engine) -> Adapter:
    """An adapter that has learned one sentence."""
    trainer = engine.trainer(8, seed=0)
    for _ in range(40):
        trainer.forward([text("say:", "one, two, tré")], "cross_entropy", {}, backward=True)
        trainer.optim_step(AdamParams(learning_rate=1e-2))
    return trainer.adapter()


SENTENCE = list("one, two, tré".encode())


@pytest.mark.parametrize(
    ("params", "kept_tokens", "kept_text", "reason"),
    [
        ({}, [*SENTENCE, END_TOKEN], "one, two, tré", "stop"),
        ({"max_tokens": 5}, SENTENCE[:5], "one, ", "length"),
        ({"max_tokens": len(SENTENCE) + 1}, [*SENTENCE, END_TOKEN], "one, two, tré", "stop"),
        ({"stop": ", "}, SENTENCE[:5], "one", "stop"),
        ({"stop": ["two", ", t"]}, SENTENCE[:6], "one", "stop"),
        ({"stop": ["é"]}, SENTENCE, "one, two, tr", "stop"),
        ({"stop": [ord(",")]}, SENTENCE[:4], "one", "stop"),
        ({"stop": ["three", ord("w")]}, SENTENCE[:7], "one, t", "stop"),
        ({"stop": "one"}, SENTENCE[:3], "", "stop"),
        ({"stop": []}, [*SENTENCE, END_TOKEN], "one, two, tré", "stop"),
    ],
)
def test_ends(
    sampler: Sampler, parrot: Adapter, params: dict[str, object], kept_tokens: list[int], kept_text: str, reason: str
) -> None:
    completion = _one(sampler, job("say:", parrot, **{"temperature": 0.0, "max_tokens": 40, **params}))
    assert (completion.tokens, completion.text, completion.finish_reason) == (kept_tokens, kept_text, reason)
    assert len(completion.logprobs) == len(completion.tokens)


@pytest.mark.parametrize("seed", range(6))
def test_stop_strings_end_at_their_first_occurrence(sampler: Sampler, engine: Engine, seed: int) -> None:
    """The end is looked for in a tail; the whole text of random bytes, with characters of several bytes, agrees."""
    free = _one(sampler, job("x", seed=seed, max_tokens=300, stop=[]))
    for start in (5, 40, 120):
        stop = free.text[start : start + 1 + seed]
        stopped = _one(sampler, job("x", seed=seed, max_tokens=300, stop=["never seen", stop])) if stop else free
        assert stopped.text == (free.text[: free.text.find(stop)] if stop else free.text)
        assert stopped.tokens == free.tokens[: len(stopped.tokens)]


def test_default_length(sampler: Sampler) -> None:
    free = sampler.submit(job("x", n=8, seed=0, top_k=4)).result().completions
    assert {len(one.tokens) for one in free if one.finish_reason == "length"} == {512}
    room = _one(sampler, job(tokens(2040, seed=0), temperature=0.0))
    assert (len(room.tokens), room.finish_reason) == (8, "length")


# --- refusals and trouble --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (job([]), "prompt: must have at least one token"),
        (job([259]), "prompt: token id 259"),
        (job([1] * 2049), "prompt: has 2049 tokens; tiny takes at most 2048"),
        (job([1] * 2048), "prompt: has 2048 tokens; prompt and completion together can have at most 2048"),
        (job([1] * 2000, max_tokens=49), "max_tokens is 49"),
        (job([1], max_tokens=0), "sampling_params: .*max_tokens"),
        (job([1], temperature=-1.0), "sampling_params: .*temperature"),
        (job([1], top_p=0.0), "sampling_params: .*top_p"),
        (job([1], n=0), "num_samples: must be at least 1"),
        (job([1], stop=["a", ""]), "stop: must not have an empty string"),
        (job([1], prompt_logprobs=21), "prompt_logprobs: must be between 0 and 20"),
        (job([1], structured_outputs={"regex": "a"}), "structured_outputs: not supported"),
        (SampleJob(prompt=ModelInput([ImageChunk(data=b"", format="png", expected_tokens=1)])), "cannot see images"),
    ],
)
def test_refusals(sampler: Sampler, asked: SampleJob, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        sampler.submit(asked)


def test_an_adapter_of_another_base_is_refused(sampler: Sampler, model_directory: Path, tmp_path: Path) -> None:
    from loops_local.engine.pytorch import load

    stranger = load(str(model_directory), cache_dir=tmp_path).trainer(2).adapter()
    with pytest.raises(RefusedError, match="adapter: is not one of the base model 'tiny'"):
        sampler.submit(job("x", stranger))


def test_cancelling_makes_room(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "MAX_ROWS", 1)
    first = sampler.submit(job("a", n=2, seed=0, max_tokens=2000))
    second = sampler.submit(job("b", max_tokens=2000))
    third = sampler.submit(job("c", max_tokens=2))
    assert second.cancel()
    assert first.cancel()
    assert len(third.result().completions[0].tokens) <= 2


def test_an_error_ends_its_requests_and_nothing_else(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    under_way = sampler.submit(job("a", n=2, max_tokens=2000))
    _one(sampler, job("b", max_tokens=1))
    broken = threading.Event()

    def pick(*_: object) -> list[int]:
        broken.set()
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(sampler_module, "pick", pick)
        assert broken.wait(PATIENCE_SECONDS)
        with pytest.raises(MemoryError, match="no room"):
            under_way.result()
        with pytest.raises(MemoryError, match="no room"):
            sampler.submit(job("c")).result()
    assert "sampling failed" in caplog.text
    assert len(_one(sampler, job("d", max_tokens=3, seed=0)).tokens) == 3


def test_closing_cancels_and_ends_the_thread(engine: Engine) -> None:
    before = threading.active_count()
    sampler = engine.sampler()
    futures: list[Future[SampleOutcome]] = [sampler.submit(job("a", n=2, max_tokens=2000)) for _ in range(80)]
    sampler.close()
    assert threading.active_count() == before
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(0)
    sampler.close()
    with pytest.raises(RuntimeError, match="closed"):
        sampler.submit(job("a"))
    idle = engine.sampler()
    idle.close()
    assert threading.active_count() == before

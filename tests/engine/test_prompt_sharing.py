"""Prompts that are computed once, rows of very different lengths, and memory that is full."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import transformers

from loops_async.types import Datum
from loops_local.engine.base import Adapter, Engine, SampleJob, SampleOutcome, Trainer
from loops_local.engine.pytorch import load
from loops_local.engine.pytorch import sampler as sampler_module
from loops_local.engine.pytorch.adapter import LoraAdapter
from loops_local.engine.pytorch.kv_cache import capacity
from loops_local.engine.pytorch.lora import Active
from loops_local.engine.pytorch.sampler import TorchSampler
from tests.support.patience import PATIENCE_SECONDS

from .tools import job, logprobs, randomize, tokens

PROMPT = tokens(100, seed=0)


@pytest.fixture
def torch_sampler(engine: Engine) -> Iterator[TorchSampler]:
    sampler = engine.sampler()
    assert isinstance(sampler, TorchSampler)
    yield sampler
    sampler.close()


def _ask(sampler: TorchSampler, jobs: Sequence[SampleJob]) -> list[SampleOutcome]:
    return [future.result() for future in [sampler.submit(one) for one in jobs]]


def _tokens(outcomes: Sequence[SampleOutcome]) -> list[list[list[int]]]:
    return [[completion.tokens for completion in outcome.completions] for outcome in outcomes]


def _adapter(engine: Engine, scratch: Path, seed: int) -> Adapter:
    trainer: Trainer = engine.trainer(4)
    randomize(trainer, scratch, seed=seed)
    return trainer.adapter()


def _held_by_event(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold each step before it picks tokens, until the event that is returned is set."""
    all_are_there = threading.Event()
    plain = sampler_module.pick

    def waiting(*args: object) -> list[int]:
        assert all_are_there.wait(PATIENCE_SECONDS)
        return plain(*args)  # type: ignore[arg-type] # passed through

    monkeypatch.setattr(sampler_module, "pick", waiting)
    return all_are_there


@pytest.mark.parametrize("samples", [16, 64, 100])
def test_a_request_computes_its_prompt_once(torch_sampler: TorchSampler, samples: int) -> None:
    torch_sampler.submit(job(PROMPT, n=samples, max_tokens=3)).result()
    torch_sampler.close()
    assert torch_sampler.usage.prefilled == len(PROMPT)
    assert torch_sampler.usage.reused == len(PROMPT) * (samples - 1)


def test_requests_of_one_prompt_compute_it_once(torch_sampler: TorchSampler) -> None:
    _ask(torch_sampler, [job(PROMPT, seed=i, max_tokens=3) for i in range(16)])
    torch_sampler.submit(job(PROMPT, max_tokens=2)).result()
    torch_sampler.close()
    assert torch_sampler.usage.prefilled == len(PROMPT)


def test_the_next_turn_computes_only_what_is_new(torch_sampler: TorchSampler, engine: Engine) -> None:
    longer = PROMPT + tokens(30, seed=1)
    torch_sampler.submit(job(PROMPT, max_tokens=1)).result()
    [found] = torch_sampler.submit(job(longer, max_tokens=20, seed=3)).result().completions
    fork = PROMPT[:60] + tokens(10, seed=2)
    [forked] = torch_sampler.submit(job(fork, max_tokens=20, seed=3)).result().completions
    torch_sampler.close()
    assert torch_sampler.usage.prefilled == len(longer) + 10
    for prompt, completion in ((longer, found), (fork, forked)):
        fresh = engine.sampler()
        [alone] = fresh.submit(job(prompt, max_tokens=20, seed=3)).result().completions
        fresh.close()
        assert completion.tokens == alone.tokens
        np.testing.assert_allclose(completion.logprobs, alone.logprobs, atol=1e-4)


def test_another_version_never_gets_the_prompt_of_the_first(
    torch_sampler: TorchSampler, engine: Engine, tmp_path: Path
) -> None:
    for seed in range(3):
        adapter = _adapter(engine, tmp_path, seed)
        [found] = torch_sampler.submit(job(PROMPT, adapter, max_tokens=5, temperature=0.0)).result().completions
        fresh = engine.sampler()
        [alone] = fresh.submit(job(PROMPT, adapter, max_tokens=5, temperature=0.0)).result().completions
        fresh.close()
        assert found.tokens == alone.tokens
        np.testing.assert_allclose(found.logprobs, alone.logprobs, atol=1e-4)
        del adapter
        gc.collect()
    torch_sampler.close()
    assert torch_sampler.usage.prefilled == 3 * len(PROMPT)


def test_a_new_prompt_beside_one_that_continues_a_kept_prompt_of_its_length(
    torch_sampler: TorchSampler, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one step, the first has computed as many tokens as the second finds; it must not be computed once more."""
    new, longer = tokens(len(PROMPT), seed=1), PROMPT + tokens(4, seed=2)
    torch_sampler.submit(job(PROMPT, max_tokens=1)).result()
    all_are_there = _held_by_event(monkeypatch)
    held = torch_sampler.submit(job("held", max_tokens=1))
    futures = [torch_sampler.submit(job(prompt, max_tokens=5, temperature=0.0)) for prompt in (new, longer)]
    all_are_there.set()
    held.result()
    for prompt, future in zip((new, longer), futures, strict=True):
        [found] = future.result().completions
        fresh = engine.sampler()
        [alone] = fresh.submit(job(prompt, max_tokens=5, temperature=0.0)).result().completions
        fresh.close()
        assert found.tokens == alone.tokens
        np.testing.assert_allclose(found.logprobs, alone.logprobs, atol=1e-4)


_LIMITS: dict[str, list[int]] = {
    "MAX_ROWS": [3, 64],
    "MAX_CACHE_BYTES": [50_000, 2**31],
    "MAX_PREFIX_BYTES": [100_000, 2**31],
    "SHARED_POSITIONS": [0, 64, 2**31],
    "PREFILL_TOKENS": [40, 200, 2048],
    "CHUNK": [7, 32],
    "CHUNK_BESIDE": [3, 16],
    "HEAD_POSITIONS": [5, 512],
}


@pytest.mark.parametrize("seed", [0, 2, 5])
def test_mixed_requests_have_the_logprobs_of_one_plain_pass(
    torch_sampler: TorchSampler, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Prompts that share beginnings and lengths, several adapters, and small limits, in one batch."""
    random = Random(seed)
    for name, values in _LIMITS.items():
        monkeypatch.setattr(sampler_module, name, random.choice(values))
    trainers = [engine.trainer(rank) for rank in (1, 2, 4)]
    for number, trainer in enumerate(trainers[1:]):
        randomize(trainer, tmp_path, seed=number, size=0.03)
    lengths = random.sample([17, 18, 33, 48], 2)
    prompts = [tokens(length, seed=length) for length in lengths]
    asked: list[tuple[Trainer, list[int], Future[SampleOutcome]]] = []
    for burst in range(3):
        all_are_there = _held_by_event(monkeypatch)
        futures = [torch_sampler.submit(job("held", max_tokens=1))]
        for number in range(12):
            new = tokens(random.choice(lengths), seed=100 * burst + number)
            old = random.choice(prompts)
            prompts.append(random.choice([new, old, old + new[:2], old + new, old[:17] + new[:3], old[: lengths[0]]]))
            trainer = random.choice(trainers)
            asked_for = job(
                prompts[-1],
                None if trainer is trainers[0] else trainer.adapter(),
                n=random.choice([1, 1, 4]),
                seed=number,
                max_tokens=random.choice([1, 5, 20]),
                prompt_logprobs=random.choice([None, None, None, 0]),
            )
            asked.append((trainer, prompts[-1], torch_sampler.submit(asked_for)))
            futures.append(asked[-1][2])
        random.choice(futures).cancel()
        all_are_there.set()
        for future in futures:
            if not future.cancelled():
                future.result()
    for trainer in trainers:
        _check_logprobs(trainer, [(prompt, future) for own, prompt, future in asked if own is trainer])


def _check_logprobs(trainer: Trainer, asked: Sequence[tuple[list[int], Future[SampleOutcome]]]) -> None:
    """Compare what was sampled with a forward pass of the whole sequences, in which nothing is cached or shared."""
    outcomes = [(prompt, future.result()) for prompt, future in asked if not future.cancelled()]
    given = [(prompt, outcome, each) for prompt, outcome in outcomes for each in outcome.completions]
    data = [Datum(model_input=prompt + each.tokens, loss_fn_inputs={}) for prompt, _, each in given]
    passed = trainer.forward(data, "cross_entropy", {}, backward=False)
    for (prompt, outcome, each), plain in zip(given, logprobs(passed), strict=True):
        np.testing.assert_allclose(each.logprobs, plain[len(prompt) - 1 : -1], atol=1e-4)
        if outcome.prompt_logprobs is not None:
            own = [
                scores[token] for token, scores in zip(prompt[1:], outcome.prompt_logprobs[1:], strict=True) if scores
            ]
            np.testing.assert_allclose(own, plain[: len(prompt) - 1], atol=1e-4)


def test_kept_prompts_are_bounded_by_bytes(torch_sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        torch_sampler.submit(job(PROMPT, max_tokens=1)).result()
    one = torch_sampler.usage.prefix_bytes
    assert one > 0
    monkeypatch.setattr(sampler_module, "MAX_PREFIX_BYTES", 3 * one)
    for seed in range(1, 10):
        torch_sampler.submit(job(tokens(100, seed=seed), max_tokens=1)).result()
    torch_sampler.submit(job(tokens(100, seed=9), max_tokens=1)).result()
    torch_sampler.submit(job(tokens(100, seed=1), max_tokens=1)).result()
    torch_sampler.close()
    assert torch_sampler.usage.prefix_bytes <= 3 * one
    assert torch_sampler.usage.prefilled == 11 * len(PROMPT)


def test_one_long_request_leaves_room_for_the_others(
    torch_sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one sequence of the longest length, many short ones run beside a request that may become long."""
    steps: list[int] = []
    plain = sampler_module.pick

    def counted(logprobs: torch.Tensor, *rest: object) -> list[int]:
        steps.append(len(logprobs))
        return plain(logprobs, *rest)  # type: ignore[arg-type] # passed through

    monkeypatch.setattr(sampler_module, "pick", counted)
    monkeypatch.setattr(sampler_module, "MAX_CACHE_BYTES", 2048 * 512 * 2)
    long = torch_sampler.submit(job("long", max_tokens=2000))
    _ask(torch_sampler, [job(tokens(20, seed=i), max_tokens=8) for i in range(40)])
    long.cancel()
    assert max(steps) > 30


def test_a_long_prompt_is_computed_in_parts_to_the_same_result(
    engine: Engine, torch_sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, longer = PROMPT, PROMPT + tokens(70, seed=7)
    jobs = [
        job(long, n=3, max_tokens=20, seed=1, prompt_logprobs=2),
        job(longer, n=2, max_tokens=20, seed=2),
        job(tokens(20, seed=3), max_tokens=20, seed=3, prompt_logprobs=0),
        job(longer[:-1], max_tokens=20, seed=2),
    ]
    expected = _ask(torch_sampler, jobs)
    monkeypatch.setattr(sampler_module, "PREFILL_TOKENS", 30)
    monkeypatch.setattr(sampler_module, "CHUNK", 17)
    monkeypatch.setattr(sampler_module, "CHUNK_BESIDE", 8)
    again = engine.sampler()
    assert isinstance(again, TorchSampler)
    found = [again.submit(jobs[1]).result(), *_ask(again, [jobs[0], *jobs[2:]])]
    again.close()
    found[:2] = found[1::-1]
    assert _tokens(found) == _tokens(expected)
    for one, other in zip(found, expected, strict=True):
        for mine, same in zip(one.completions, other.completions, strict=True):
            np.testing.assert_allclose(mine.logprobs, same.logprobs, atol=1e-4)
        assert (one.prompt_logprobs is None) == (other.prompt_logprobs is None)
        for scores, same_scores in zip(one.prompt_logprobs or [], other.prompt_logprobs or [], strict=True):
            assert scores == pytest.approx(same_scores, abs=1e-4)


def test_short_requests_proceed_while_a_long_prompt_is_computed(
    torch_sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    all_are_there = _held_by_event(monkeypatch)
    monkeypatch.setattr(sampler_module, "PREFILL_TOKENS", 100)
    monkeypatch.setattr(sampler_module, "CHUNK_BESIDE", 16)
    first = torch_sampler.submit(job("first", max_tokens=1))
    long = torch_sampler.submit(job(tokens(1000, seed=0), max_tokens=1))
    short = torch_sampler.submit(job("short", max_tokens=20))
    long.add_done_callback(lambda _: ended.append("long"))
    short.add_done_callback(lambda _: ended.append("short"))
    all_are_there.set()
    for future in (first, long, short):
        future.result()
    torch_sampler.close()
    assert ended == ["short", "long"]


def test_a_long_prompt_is_cancelled_on_its_way(torch_sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, cancelled = threading.Event(), threading.Event()
    plain = sampler_module.AdapterBatch.combine

    def waiting(batch: sampler_module.AdapterBatch, rows: Sequence[LoraAdapter | None]) -> Active | None:
        begun.set()
        assert cancelled.wait(PATIENCE_SECONDS)
        return plain(batch, rows)

    monkeypatch.setattr(sampler_module.AdapterBatch, "combine", waiting)
    monkeypatch.setattr(sampler_module, "PREFILL_TOKENS", 100)
    long = torch_sampler.submit(job(tokens(1000, seed=0), max_tokens=1))
    assert begun.wait(PATIENCE_SECONDS)
    assert long.cancel()
    cancelled.set()
    torch_sampler.submit(job("short", max_tokens=2)).result()
    torch_sampler.close()
    assert torch_sampler.usage.prefilled <= sampler_module.CHUNK + len("short")
    assert torch_sampler.usage.cache_bytes == 0


@pytest.mark.parametrize("positions", [200, 400])
def test_the_youngest_is_put_back_and_ends_the_same(
    engine: Engine, torch_sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    jobs = [job(tokens(20 + i, seed=i), n=2, seed=i, max_tokens=120) for i in range(4)]
    expected = _tokens(_ask(torch_sampler, jobs))
    assert torch_sampler.usage.put_back == 0
    bytes_of_one = 2 * 2 * 2 * 16 * 4
    monkeypatch.setattr(sampler_module, "MAX_CACHE_BYTES", positions * bytes_of_one)
    again = engine.sampler()
    assert isinstance(again, TorchSampler)
    assert _tokens(_ask(again, jobs)) == expected
    again.close()
    assert again.usage.put_back > 0


def test_a_group_is_what_transformers_generates(model_directory: Path, tmp_path: Path) -> None:
    """Greedy, in a batch that shares one prompt, beside another of a different length."""
    engine = load(str(model_directory), cache_dir=tmp_path)
    network = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    sampler = engine.sampler()
    prompts = [tokens(n, seed=n) for n in (150, 40)]
    outcomes = [
        future.result()
        for future in [sampler.submit(job(prompt, n=4, max_tokens=60, temperature=0.0)) for prompt in prompts]
    ]
    sampler.close()
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        own = network.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=60
        )[0, len(prompt) :].tolist()
        for completion in outcome.completions:
            assert completion.tokens == own


def test_prompt_logprobs_are_computed_though_the_prompt_is_kept(torch_sampler: TorchSampler) -> None:
    torch_sampler.submit(job(PROMPT, max_tokens=1)).result()
    found = torch_sampler.submit(job(PROMPT, max_tokens=1, prompt_logprobs=0)).result().prompt_logprobs
    assert found is not None
    assert len(found) == len(PROMPT)


def test_a_prompt_of_the_longest_length_can_be_scored(torch_sampler: TorchSampler) -> None:
    full = tokens(2048, seed=5)
    found = torch_sampler.submit(job(full, max_tokens=1, temperature=0.0, prompt_logprobs=0)).result()
    assert found.prompt_logprobs is not None
    assert len(found.prompt_logprobs) == 2048


def test_capacities() -> None:
    assert [capacity(n) for n in (1, 32, 33, 48, 49, 64, 65, 97, 129)] == [32, 32, 48, 48, 64, 64, 96, 128, 192]

"""Every Python example in docstrings runs, in its colour, against the service on the echo engine."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import cache
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import loops_async
import loops_local
import loops_sync
from tests.docs.snippets import Snippet, in_docstrings, run
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.templates import SMOLLM2

ROOT = Path(__file__).parents[2]
DATUM = loops_async.Datum(model_input=[104, 105], loss_fn_inputs={"target_tokens": [105, 33], "weights": [0.0, 1.0]})
COMMON = {
    "base_model": "echo",
    "prompt": loops_async.ModelInput.from_ints([104, 105]),
    "prompts": [[104, 105], [106]],
    "params": loops_async.SamplingParams(max_tokens=8),
    "data": [DATUM],
    "pair": [DATUM, DATUM],
    "pairs": [DATUM, DATUM],
    "task": "hi",
    "baseline": 0.5,
}
"""What examples in docstrings may take for granted, beside `loops`, `service`, `trainer`, `sampler` and `rollout`."""


def tasks() -> list[SimpleNamespace]:
    """Return tasks with a prompt, and a function that grades an answer."""
    grades = cycle([0.0, 1.0])
    return [SimpleNamespace(prompt=[104 + number], grade=lambda _: next(grades)) for number in range(4)]


async def rollout(ctx: loops_async.RolloutContext, task: SimpleNamespace) -> loops_async.Episode:
    episode = loops_async.Episode.start(task.prompt)
    answer = await ctx.sample(episode, loops_async.SamplingParams(max_tokens=4))
    episode.reward = task.grade(answer.tokens)
    return episode


def blocking_rollout(ctx: Any, task: SimpleNamespace) -> loops_async.Episode:
    episode = loops_async.Episode.start(task.prompt)
    answer = ctx.sample(episode, loops_async.SamplingParams(max_tokens=4))
    episode.reward = task.grade(answer.tokens)
    return episode


def optional_names(snippet: Snippet) -> dict[str, Any]:
    """What only some examples take for granted, and not every installation has."""
    if any("loops_ray" in source for source, _ in snippet.statements):
        pytest.skip("NOT TESTED here: an example on Ray; tests/on_ray has the same calls")
    if not any("torch." in source for source, _ in snippet.statements):
        return {}
    return {"torch": pytest.importorskip("torch", reason="NOT TESTED: an example that needs torch")}


def blocking_agent(base_url: str, api_key: str, task: str) -> float:
    """Make a call as any client does; return a reward."""
    body = json.dumps({"messages": [{"role": "user", "content": task}]}).encode()
    headers = {"authorization": f"Bearer {api_key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{base_url}/chat/completions", body, headers)) as answer:
        return float(len(json.load(answer)["choices"]))


async def agent(base_url: str, api_key: str, task: str) -> float:
    return await asyncio.to_thread(blocking_agent, base_url, api_key, task)


@asynccontextmanager
async def async_names() -> AsyncIterator[dict[str, Any]]:
    """What the examples of `loops_async` take for granted."""
    async with loops_async.ServiceClient() as service:
        trainer = await service.create_lora_training_client("echo", rank=8)
        sampler = await trainer.save_weights_and_get_sampling_client("start")
        clients = {"loops": loops_async, "service": service, "trainer": trainer, "sampler": sampler}
        yield {**COMMON, **clients, "rollout": rollout, "tasks": tasks(), "my_agent": agent}


@contextmanager
def blocking_names() -> Iterator[dict[str, Any]]:
    """What the examples of `loops_sync` take for granted."""
    with loops_sync.ServiceClient() as service:
        trainer = service.create_lora_training_client("echo", rank=8)
        sampler = trainer.save_weights_and_get_sampling_client("start")
        clients = {"loops": loops_sync, "service": service, "trainer": trainer, "sampler": sampler}
        yield {**COMMON, **clients, "rollout": blocking_rollout, "tasks": tasks(), "my_agent": blocking_agent}


async def tokenizer(_: loops_async.SamplingClient) -> ByteTokenizer:
    """The echo engine's own is much the same, but to read it takes transformers, whose import takes seconds."""
    return ByteTokenizer(SMOLLM2)


@pytest.fixture(autouse=True)
def service_in_environment(echo_service: loops_local.LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPS_BASE_URL", echo_service.base_url)
    monkeypatch.setenv("BASETEN_API_KEY", echo_service.api_key)


@pytest.fixture(autouse=True)
def files_of_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What examples read, in a folder where they may write."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [104, 105]}\n')


@cache
def docstrings_of(package: str) -> list[Snippet]:
    return [snippet for path in sorted((ROOT / package).rglob("*.py")) for snippet in in_docstrings(path)]


@pytest.mark.parametrize("snippet", docstrings_of("loops_async"), ids=str)
def test_docstrings_of_loops_async(snippet: Snippet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops_async.SamplingClient, "get_tokenizer", tokenizer)
    with asyncio.Runner() as runner, ExitStack() as stack:
        names = async_names()
        stack.callback(lambda: runner.run(names.__aexit__(None, None, None)))
        run(snippet, runner.run(names.__aenter__()) | optional_names(snippet), runner)


@pytest.mark.parametrize("snippet", docstrings_of("loops_sync"), ids=str)
def test_docstrings_of_loops_sync(snippet: Snippet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops_async.SamplingClient, "get_tokenizer", tokenizer)
    with asyncio.Runner() as runner, blocking_names() as names:
        run(snippet, names | optional_names(snippet), runner)


@pytest.mark.parametrize("snippet", docstrings_of("loops_local"), ids=str)
def test_docstrings_of_loops_local(snippet: Snippet) -> None:
    with asyncio.Runner() as runner:
        run(snippet, {}, runner)


def test_examples_are_found() -> None:
    """The parametrized tests above would pass without a word if nothing were found."""
    assert len(docstrings_of("loops_async")) > 5
    assert docstrings_of("loops_local")


def test_a_wrong_example_fails() -> None:
    snippet = Snippet("here", (("1 + 1\n", "3\n"),), is_interactive=True)
    with asyncio.Runner() as runner, pytest.raises(AssertionError, match="printed '2"):
        run(snippet, {}, runner)

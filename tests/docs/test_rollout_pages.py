"""The pages on rollouts: every example trains, in both forms, and the figures are those of the benchmarks."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import loops_async
import loops_local
import loops_sync
from tests.docs.snippets import Snippet, in_markdown, is_about_rollouts, run
from tools.blocking_docs import blocking_code

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "async-rl.md"
SNIPPETS = [
    snippet
    for path in (ROOT / "README.md", PAGE, ROOT / "docs" / "multi-turn.md")
    for snippet in in_markdown(path)
    if is_about_rollouts(snippet)
]
RESULTS = ROOT / "benchmarks" / "results"

ROLLOUT = """
async def rollout(ctx, task):
    question, right = task
    episode = loops.Episode.start(tokenizer.encode(question))
    answer = await ctx.sample(episode, loops.SamplingParams(max_tokens=4))
    episode.reward = float(tokenizer.decode(answer.tokens) == right)
    return episode
"""
"""What most examples take for granted, beside `loops`, `service`, `trainer`, `tokenizer`, `tasks` and `unseen`."""

TASKS = [("is fire cold?", "no"), ("is snow white?", "yes")] * 4


class Tokenizer:
    """Of bytes; what it decodes is drawn, so that the members of a group have different rewards."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int], **_: Any) -> str:
        return self._random.choice(["yes", "no", "search", "Vex", "Quillmar"])


@pytest.fixture(autouse=True)
def surroundings(echo_service: loops_local.LocalService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def tokenizer(_: loops_async.TrainingClient) -> Tokenizer:
        return Tokenizer()

    monkeypatch.setattr(loops_async.TrainingClient, "get_tokenizer", tokenizer)  # the real one takes seconds to import
    monkeypatch.setenv("LOOPS_BASE_URL", echo_service.base_url)
    monkeypatch.setenv("BASETEN_API_KEY", echo_service.api_key)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def handed_out(monkeypatch: pytest.MonkeyPatch) -> list[loops_async.RolloutBatch]:
    """The batches of all streams."""
    batches: list[loops_async.RolloutBatch] = []
    next_batch = loops_async.RolloutStream.__anext__

    async def noted(stream: loops_async.RolloutStream) -> loops_async.RolloutBatch:
        batches.append(await next_batch(stream))
        return batches[-1]

    monkeypatch.setattr(loops_async.RolloutStream, "__anext__", noted)
    return batches


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_async(snippet: Snippet, handed_out: list[loops_async.RolloutBatch]) -> None:
    source = source_of(snippet)
    with asyncio.Runner() as runner, ExitStack() as stack:
        names: dict[str, Any] = {"__name__": "__main__"}
        if not is_program(source):
            clients = async_clients()
            names |= runner.run(clients.__aenter__())
            stack.callback(lambda: runner.run(clients.__aexit__(None, None, None)))
            exec(ROLLOUT, names)
        run(snippet, names, runner)
    assert handed_out or "rollouts(" not in source


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_blocking(snippet: Snippet, handed_out: list[loops_async.RolloutBatch]) -> None:
    source = source_of(snippet)
    without_loop = source.replace("import asyncio\n\n", "").replace("asyncio.run(main())", "main()")
    blocking = Snippet(snippet.place, ((blocking_code(without_loop, "loops_async"), None),))
    with asyncio.Runner() as runner, ExitStack() as stack:
        names: dict[str, Any] = {"__name__": "__main__"}
        if not is_program(source):
            names |= stack.enter_context(blocking_clients())
            exec(blocking_code(ROLLOUT, "loops_async"), names)
        run(blocking, names, runner)
    assert handed_out or "rollouts(" not in source


def source_of(snippet: Snippet) -> str:
    ((source, _),) = snippet.statements
    return source


def is_program(source: str) -> bool:
    return "asyncio.run(" in source


@asynccontextmanager
async def async_clients() -> AsyncIterator[dict[str, Any]]:
    async with loops_async.ServiceClient() as service:
        yield names_of(loops_async, service, await service.create_lora_training_client("echo", rank=8))


@contextmanager
def blocking_clients() -> Iterator[dict[str, Any]]:
    with loops_sync.ServiceClient() as service:
        yield names_of(loops_sync, service, service.create_lora_training_client("echo", rank=8))


def names_of(loops: ModuleType, service: Any, trainer: Any) -> dict[str, Any]:
    fixed = {"tokenizer": Tokenizer(), "tasks": TASKS, "unseen": TASKS[:2]}
    return {"loops": loops, "service": service, "trainer": trainer, **fixed}


def test_the_table_is_that_of_the_benchmark() -> None:
    rows = json.loads((RESULTS / "rollouts.json").read_text())["rows"]
    wanted = [
        f"| {row['name']} | {row['of_bound']:.0%} | {row['prototype']:.0%} | {row['trainer_idle']:.0%} "
        f"| {row['staleness_mean']:.1f}, {row['staleness_max']} |"
        for row in rows
    ]
    _, table = PAGE.read_text().split("<!-- From benchmarks/results/rollouts.json")
    assert table.split("<!-- end")[0].splitlines()[4:-1] == wanted


def test_the_share_of_the_best_limit_is_that_of_the_benchmark() -> None:
    rows = json.loads((RESULTS / "adaptive.json").read_text())["rows"]
    least = min(share for row in rows for share in row["shares"])
    assert f"at least {100 * least:.0f} % of the best" in " ".join(PAGE.read_text().split())

"""The training examples run from end to end; that they learn is for the real model, which takes minutes each."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.trace import NoOpTracerProvider

import loops_async
import loops_local
import loops_sync
from tests.support import openai_stub

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORTER = {
    "STEPS": 2,
    "ROUNDS": 1,
    "EVALUATE_EVERY": 1,
    "reward": lambda *said: len(set(str(said))),
    "library": lambda fact, said: fact,
}
"""What is replaced in an example; the tiny model never says what is rewarded or answered."""

PROGRAM = """
import asyncio, itertools, os, signal, sys
import async_rl, loops_async

class Bytes:
    decode = staticmethod(lambda tokens, **options: bytes(tokens).decode())

class Curves(async_rl.Curves):
    def add_metrics(self, step, metrics):
        super().add_metrics(step, metrics)
        if step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)

async_rl.Curves, async_rl.ROUNDS, async_rl.EVALUATE_EVERY = Curves, 4, 2
async_rl.reward = lambda *said, numbers=itertools.count(): next(numbers)
async_rl.chat = lambda tokenizer, text: list(text.encode())
loops_async.TrainingClient.get_tokenizer = lambda trainer: asyncio.sleep(0, Bytes())  # the real one imports torch
asyncio.run(async_rl.main("echo"))
"""
"""The example on the echo engine, which kills itself after the step that its argument names."""


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    needs("torch")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setitem(sys.modules, "openai", openai_stub.module())
    monkeypatch.chdir(tmp_path)
    known = set(sys.modules)
    module = importlib.import_module(request.param)
    for changed in (module, *(sys.modules[name] for name in {"async_rl"} & set(sys.modules))):
        for name, value in SHORTER.items():
            if hasattr(changed, name):
                monkeypatch.setattr(changed, name, value)
    yield module
    for name in set(sys.modules) - known:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def needs(*modules: str) -> None:
    for needed in ("matplotlib", "rich", *modules):
        pytest.importorskip(needed, reason=f"NOT TESTED: the examples need {needed}")


@pytest.mark.torch
@pytest.mark.parametrize(
    "example",
    ["supervised", "dpo", "policy_gradient", "async_rl", "async_rl_sync", "multi_turn", "agent"],
    indirect=True,
)
def test_it_draws_its_curves(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result: Any = example.main("tiny")
    assert (asyncio.run(result) if inspect.iscoroutine(result) else result) in (0, 1)
    picture = tmp_path / f"{example.__name__}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"curves drawn in {picture.name}" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.parametrize("example", ["tracing"], indirect=True)
def test_it_draws_its_trace(example: ModuleType, tmp_path: Path) -> None:
    try:
        assert asyncio.run(example.main()) == 0
    finally:
        loops_async.instrument(NoOpTracerProvider(), NoOpMeterProvider())
    assert (tmp_path / "tracing.png").read_bytes().startswith(b"\x89PNG")


def test_it_continues_after_it_was_killed(echo_service: loops_local.LocalService, tmp_path: Path) -> None:
    """On a service that the environment names, as the hosted one."""
    needs()
    assert steps_of_program("3", echo_service, tmp_path) == (-signal.SIGKILL, [0, 1, 2, 3])
    before = active_runs(echo_service)
    assert steps_of_program("-1", echo_service, tmp_path) == (0, [2, 3, 4, 5, 6, 7])
    assert active_runs(echo_service) == before, "a program that ends leaves nothing running"
    assert (tmp_path / "async_rl.png").exists()
    assert not (tmp_path / "async_rl").exists()


def active_runs(service: loops_local.LocalService) -> set[str]:
    with loops_sync.ServiceClient(base_url=service.base_url, api_key=service.api_key) as client:
        return {run.id for run in client.control_plane.list_runs() if run.status.name == "ACTIVE"}


def steps_of_program(killed_after: str, service: loops_local.LocalService, folder: Path) -> tuple[int, list[int]]:
    """Run the program; return its exit code, and the steps that it has trained."""
    path = os.pathsep.join([str(EXAMPLES), *sys.path])
    environment = {"LOOPS_BASE_URL": service.base_url, "BASETEN_API_KEY": service.api_key, "PYTHONPATH": path}
    command = [sys.executable, "-c", PROGRAM, killed_after]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    return done.returncode, [int(step) for step in re.findall(r"step +(\d+) +reward", done.stdout)]

"""What many tests here need."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from aiohttp import web

from loops_async import AdamParams, Datum, SampledSequence, SamplingClient, SamplingParams, TrainingClient
from loops_local.engine.echo import logprob
from tests.support.patience import PATIENCE_SECONDS
from tests.support.warnings import WARNINGS

PROMPT = [104, 105]
FEW_TOKENS = SamplingParams(max_tokens=4)


def example(first: int = 1) -> Datum:
    """Return an example of three positions whose first token is `first`."""
    return Datum(model_input=[first, 20, 30], loss_fn_inputs={"target_tokens": [20, 30, 40]})


REFUSED = Datum(model_input=[-1, 20, 30], loss_fn_inputs={"target_tokens": [20, 30, 40]})
"""An example that the client and the service accept and the engine refuses, so that its operation fails."""


def scores(tokens: list[int], *, version: int) -> Any:
    """Return the logprobs of the tokens after the first, as the echo engine gives them at `version` of the weights."""
    return pytest.approx([logprob(a, b, version) for a, b in pairwise(tokens)], abs=1e-6)


def version_behind(prompt: list[int], sequence: SampledSequence) -> int:
    """Tell from its logprobs which version of the weights made a completion, whatever the answer claims."""
    tokens = [prompt[-1], *sequence.tokens]
    (version,) = [version for version in range(100) if sequence.logprobs == scores(tokens, version=version)]
    return version


async def version_sampled(sampler: SamplingClient) -> int:
    """Sample, and tell which version of the weights answered."""
    (sequence,) = (await sampler.sample(PROMPT, 1, FEW_TOKENS)).sequences
    return version_behind(PROMPT, sequence)


async def train(trainer: TrainingClient, steps: int = 1) -> None:
    """Do some steps of training and wait for them."""
    for _ in range(steps):
        await trainer.forward_backward([example()])
        last = await trainer.optim_step(AdamParams())
    await last


def body_of(request: web.Request) -> Any:
    """Return the JSON body of a request that the service has handled."""
    raw = request._read_bytes
    assert raw is not None
    return msgspec.json.decode(raw)


async def eventually(condition: Callable[[], object]) -> None:
    """Return as soon as the condition holds; fail if it never does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        await asyncio.sleep(0.005)


async def run_python(script: str, *arguments: str, stdin: bytes = b"", **environment: str) -> str:
    """Run a script in a Python of its own, for which every warning is an error, and return what it prints."""
    command = [sys.executable, *WARNINGS, "-c", script, *arguments]
    ended = await asyncio.to_thread(
        subprocess.run,
        command,
        input=stdin,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    said = ended.stderr.decode()
    assert ended.returncode == 0, said
    assert said == "", said
    return ended.stdout.decode().strip()

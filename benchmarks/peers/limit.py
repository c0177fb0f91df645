"""The limit: a bare aiohttp request with a typed msgspec decode of the same bytes, and nothing else."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import msgspec

from benchmarks.peers.measure import MAX_TOKENS, PROMPT, SAMPLES, Clock, batch, main, runner, sampling, training

JSON = {"Content-Type": "application/json"}


class Logprobs(msgspec.Struct):
    """The part of a completion's logprobs that a caller needs."""

    token_logprobs: list[float]


class Choice(msgspec.Struct):
    """The part of a completion that a caller needs."""

    text: str
    finish_reason: str
    logprobs: Logprobs
    token_ids: list[int]


class NamedLogprobs(Logprobs):
    """The same, where the tokens' ids are in their names."""

    tokens: list[str]


class NamedChoice(msgspec.Struct):
    """A completion without `token_ids`."""

    text: str
    finish_reason: str
    logprobs: NamedLogprobs


class NamedCompletions(msgspec.Struct):
    """The answer to a sample, without `token_ids`."""

    choices: list[NamedChoice]


class Completions(msgspec.Struct):
    """The answer to a sample."""

    choices: list[Choice]


def _run(work: Callable[[aiohttp.ClientSession, argparse.Namespace], Coroutine[Any, Any, Any]]) -> Any:
    async def with_session(given: argparse.Namespace) -> Any:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await work(session, given)

    return lambda given: runner(given)(with_session(given))


async def sample(session: aiohttp.ClientSession, given: argparse.Namespace) -> dict[str, float]:
    """Sample `count` times."""
    decode = msgspec.json.Decoder[Any](NamedCompletions if given.token_names else Completions).decode
    encode = msgspec.json.Encoder().encode
    url = f"{given.url}/sampler/sync/sample"
    body = {"prompt": PROMPT, "n": SAMPLES, "max_tokens": MAX_TOKENS, "logprobs": 0, "temperature": 1.0, "top_p": 1.0}

    async def call() -> None:
        async with session.post(url, data=encode(body), headers=JSON) as response:
            decode(await response.read())

    return await sampling(given, call)


async def train(session: aiohttp.ClientSession, given: argparse.Namespace) -> dict[str, float]:
    """Encode a batch in one call and post it; with ``--make``, building the datums is measured too."""
    rows = batch(given)
    data = [] if given.make else [datum(row) for row in rows]
    encode = msgspec.json.Encoder().encode

    async def call() -> None:
        body = encode({"data": data or [datum(row) for row in rows], "loss_fn": "importance_sampling"})
        async with session.post(f"{given.url}/trainers/run0/forward_backward", data=body, headers=JSON) as response:
            await response.read()
        async with session.get(f"{given.url}/trainers/run0/operations/forward_backward-1") as response:
            await response.read()

    return await training(given, call)


def datum(row: dict[str, Any]) -> dict[str, Any]:
    """Return a datum in the wire's format, as a dict."""
    lists = {name: values if isinstance(values, list) else values.tolist() for name, values in row.items()}
    size = len(lists["tokens"])
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": lists["tokens"]}]},
        "loss_fn_inputs": {
            name: {"data": lists[name], "dtype": dtype, "shape": [size]}
            for name, dtype in (
                ("target_tokens", "int64"),
                ("logprobs", "float32"),
                ("advantages", "float32"),
                ("mask", "float32"),
            )
        },
    }


async def provision(session: aiohttp.ClientSession, given: argparse.Namespace) -> dict[str, float]:
    """Create `count` runs, and check the health of each as a caller would that knew when it is ready."""

    async def one() -> None:
        async with session.post(f"{given.url}/v1/loops/runs", data=b"{}", headers=JSON) as response:
            run = msgspec.json.decode(await response.read())["run"]
        created = time.monotonic()
        while True:
            async with session.get(f"{run['base_url']}/health") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(max(0.05, 3.0 - (time.monotonic() - created)))

    clock = Clock(given)
    await clock.start_watching()
    await asyncio.gather(*(one() for _ in range(given.count)))
    return clock.stop(given.count)


async def listing(session: aiohttp.ClientSession, given: argparse.Namespace) -> dict[str, float]:
    """List the checkpoints of `count` runs."""

    async def one(number: int) -> None:
        async with session.get(f"{given.url}/v1/loops/checkpoints?run_id=run{number}") as response:
            msgspec.json.decode(await response.read())

    clock = Clock(given)
    await clock.start_watching()
    await asyncio.gather(*(one(number) for number in range(given.count)))
    return clock.stop(given.count)


if __name__ == "__main__":
    main(
        {
            "sample": _run(sample),
            "train": _run(train),
            "provision": _run(provision),
            "list": _run(listing),
        }
    )

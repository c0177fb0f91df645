"""The cost of each layer of `sample` above the limit: each in turn is replaced by nothing, all in one process.

The variants run in turn, many times, so that the noise of the machine affects all of them. The result is the median of
the ratios within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any, TypeVar
from unittest.mock import patch

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table

import loops_async as loops
from benchmarks.harness import serving
from benchmarks.peers.limit import JSON, Completions
from benchmarks.peers.measure import MAX_TOKENS, PROMPT, SAMPLES, in_flight
from loops_async import sampling
from loops_async._http.messages import Answer, Request

CALLS = 1024

T = TypeVar("T")

decode = msgspec.json.Decoder(Completions).decode
encode = msgspec.json.Encoder().encode

Layer = dict[str, Callable[..., Any]]


async def _once(call: Callable[[], Awaitable[T]], *_: object, **__: object) -> T:
    return await call()


async def _bare_request(_: object, runtime: Any, request: Request) -> Any:
    session = runtime.transport._session
    async with session.post(request.url, data=request.body, headers=JSON) as response:
        return Answer(response.status, response.headers, await response.read())


async def _nothing(*_: object) -> None: ...


LAYERS: dict[str, Layer] = {
    "checking the prompt": {"check_model_input": lambda prompt, *_: prompt},
    "checking the sampling parameters": {"check_kind": lambda params, *_: params},
    "reading the answer into public types": {"read_completions": lambda body, **_: decode(body)},
    "checking whether the sampler is ready": {"SamplingClient._ready": _nothing},
    "a key for each request": {"uuid4": lambda: "00000000-0000-4000-8000-000000000000"},
    "retrying": {"retry": _once},
    "headers, timeouts and the meaning of answers": {"SamplingClient._ask": _bare_request},
    "all of these": {},
}
LAYERS["all of these"] = {name: replaced for layer in LAYERS.values() for name, replaced in layer.items()}


async def measure(url: str, rounds: int, at_once: int) -> dict[str, list[float]]:
    """Return the microseconds of CPU per sample, by variant and round."""
    body = {"prompt": PROMPT, "n": SAMPLES, "max_tokens": MAX_TOKENS, "logprobs": 0, "temperature": 1.0, "top_p": 1.0}
    async with (
        loops.ServiceClient(base_url=url, api_key="benchmark", on_exit="leave") as service,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        sampler = await service.create_sampling_client("bench")
        prompt, params = loops.ModelInput.from_ints(PROMPT), loops.SamplingParams(max_tokens=MAX_TOKENS)

        async def ours() -> None:
            await sampler.sample(prompt, SAMPLES, params)

        async def limit() -> None:
            async with session.post(f"{url}/sampler/sync/sample", data=encode(body), headers=JSON) as response:
                decode(await response.read())

        variants: list[tuple[str, Callable[[], Awaitable[None]], Layer]] = [("limit", limit, {}), ("ours", ours, {})]
        variants += [(name, ours, layer) for name, layer in LAYERS.items()]
        microseconds: dict[str, list[float]] = {name: [] for name, _, _ in variants}
        for _ in range(rounds + 1):
            for name, call, layer in variants:
                microseconds[name].append(await _timed(call, layer, at_once))
    return {name: many[1:] for name, many in microseconds.items()}


async def _timed(call: Callable[[], Awaitable[None]], layer: Layer, at_once: int) -> float:
    with ExitStack() as without:
        for name, replaced in layer.items():
            without.enter_context(patch(f"{sampling.__name__}.{name}", replaced))
        begun = time.process_time()
        await in_flight(call, CALLS, at_once)
        return (time.process_time() - begun) / CALLS * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--in-flight", type=int, default=64)
    given = parser.parse_args()
    with serving() as url:
        measured = asyncio.run(measure(url, given.rounds, given.in_flight))
    table = Table(title=f"CPU of a sample with {given.in_flight} in flight")
    for heading in ("", "us, median", "x the limit", "share of the limit"):
        table.add_column(heading, justify="left" if not heading else "right")

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(measured[name], measured["limit"], strict=True))

    for name, many in measured.items():
        share = "" if name in ("limit", "ours") else f"{ratio('ours') - ratio(name):+.1%}"
        label = name if name in ("limit", "ours") else f"without {name}"
        table.add_row(label, f"{statistics.median(many):.0f}", f"{ratio(name):.3f}", share)
    Console().print(table)


if __name__ == "__main__":
    main()

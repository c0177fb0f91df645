"""What the gateway of agents adds to `sample`, and how many rollouts it serves at once.

``python -m benchmarks.agents`` prints a table, and saves it in ``results/agents.json``. Gateway, agent and embedded
service (the echo engine) share one process and its event loop, and the tokenizer is one of the `tokenizers` library, as
most are. A first turn renders and encodes the whole conversation; a continued one only what is new.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp

import loops_async as loops
from loops_local import LocalService

RESULTS: Final = Path(__file__).with_name("results") / "agents.json"
SIZES: Final = (512, 4096, 16384)
ROLLOUTS: Final = 200
TURNS: Final = 3
WORDS: Final = "the quick brown fox jumps over the lazy dog and then "
PARAMS: Final = loops.SamplingParams(max_tokens=8)


async def measure(rounds: int) -> dict[str, float]:
    """Return the figures by name: milliseconds, and seconds for all rollouts."""
    async with (
        LocalService(engine="echo", provisioning_seconds=0.0) as local,
        loops.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service,
    ):
        trainer = await service.create_lora_training_client("echo", rank=8)
        sampler = await trainer.save_weights_and_get_sampling_client("agents")
        async with (
            loops.AgentGateway(sampler, defaults={"max_tokens": 8}) as gateway,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        ):
            figures: dict[str, float] = {}
            for size in SIZES:
                figures |= await _overheads(gateway, sampler, session, size, rounds)
            began = time.perf_counter()
            await asyncio.gather(*(_converse(gateway, session, WORDS, TURNS) for _ in range(ROLLOUTS)))
            return {**figures, f"{ROLLOUTS} rollouts of {TURNS} turns, s": time.perf_counter() - began}


async def _overheads(
    gateway: loops.AgentGateway, sampler: loops.SamplingClient, session: Any, size: int, rounds: int
) -> dict[str, float]:
    """Return what a first and a continued turn take longer than `sample` with a prompt of that size."""
    tokenizer = await sampler.get_tokenizer()
    text = (WORDS * size)[: size - 30]  # one token for each byte
    prompt = tokenizer.encode(text)
    await _converse(gateway, session, text, 1)  # warms up
    direct = await _median(lambda _: sampler.sample(prompt, 1, PARAMS), rounds)
    first: list[float] = []
    continued: list[float] = []
    for _ in range(rounds):
        times = await _converse(gateway, session, text, 2)
        first.append(times[0])
        continued.append(times[1])
    return {
        f"sample of {size:,} tokens, ms": direct,
        f"first turn of {size:,}, ms more": statistics.median(first) - direct,
        f"continued turn of {size:,}, ms more": statistics.median(continued) - direct,
    }


async def _converse(gateway: loops.AgentGateway, session: aiohttp.ClientSession, text: str, turns: int) -> list[float]:
    """Let one rollout converse; return the milliseconds of each turn."""
    messages: list[Any] = [{"role": "user", "content": text}]
    times: list[float] = []
    async with gateway.rollout() as rollout:
        headers = {"authorization": f"Bearer {rollout.api_key}"}
        for _ in range(turns):
            began = time.perf_counter()
            url = f"{rollout.base_url}/chat/completions"
            async with session.post(url, json={"messages": messages}, headers=headers) as answer:
                [choice] = (await answer.json())["choices"]
            times.append(1000 * (time.perf_counter() - began))
            messages += [choice["message"], {"role": "user", "content": "and then?"}]
    return times


async def _median(call: Callable[[int], Awaitable[object]], rounds: int) -> float:
    """Return the median time of a call in milliseconds."""
    times = []
    for number in range(rounds):
        began = time.perf_counter()
        await call(number)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    figures = asyncio.run(measure(parser.parse_args().rounds))
    for name, value in figures.items():
        print(f"{name:40} {value:8.1f}")
    RESULTS.write_text(json.dumps({name: round(value, 2) for name, value in figures.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()

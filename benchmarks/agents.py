"""What the gateway of agents adds to `sample`, how long it holds its loop, and how many rollouts it serves at once.

``python -m benchmarks.agents`` prints a table, and saves it in ``results/agents.json``. The agent and the embedded
service (the echo engine) have a process each. The tokenizer is one of the `tokenizers` library, as most are, with about
4 characters in a token. A first turn renders and encodes the whole conversation; a continued one only what is new.

How long the loop was held is measured from inside: a task of it sleeps for a millisecond at a time, and notes by how
much it is late. Each figure is the median of the longest such moment in a conversation of three turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import aiohttp

import loops_async as loops
from loops_local import serve_in_thread

RESULTS: Final = Path(__file__).with_name("results") / "agents.json"
SIZES: Final = (512, 4096, 16384)
ROLLOUTS: Final = 200
TURNS: Final = 3
WORDS: Final = "the quick brown fox jumps over the lazy dog, and then Zoë of Łódź counted 1234567 sheep;\n"
TEMPLATE: Final = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}"""
PARAMS: Final = loops.SamplingParams(max_tokens=8)
ROUTES: Final = ("chat/completions", "completions", "responses", "messages")


# --- the agent, in a process of its own ------------------------------------------------------------------------------


def converse(url: str, key: str, text: str, route: str = ROUTES[0], *, stream: bool = False) -> list[float]:
    """Converse as one rollout; return the milliseconds of each turn."""
    [times] = converse_at_once([(url, key)], text, route, stream=stream)
    return times


def converse_at_once(
    rollouts: Sequence[tuple[str, str]], text: str, route: str = ROUTES[0], *, stream: bool = False
) -> list[list[float]]:
    """Converse as several rollouts at once; return the milliseconds of each turn of each."""

    async def all_of_them() -> list[list[float]]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(_turns(session, *each, text, route, stream) for each in rollouts))

    return asyncio.run(all_of_them())


async def _turns(
    session: aiohttp.ClientSession, url: str, key: str, text: str, route: str, stream: bool
) -> list[float]:
    history: Any = text if route == "completions" else [{"role": "user", "content": text}]
    times: list[float] = []
    field = {"completions": "prompt", "responses": "input"}.get(route, "messages")
    for _ in range(TURNS):
        body = {"model": "any", "stream": stream, field: history}
        began = time.perf_counter()
        async with session.post(f"{url}/{route}", json=body, headers={"authorization": f"Bearer {key}"}) as answer:
            assert answer.status == 200, await answer.text()
            said = _said(await answer.text(), route, stream)
        times.append(1000 * (time.perf_counter() - began))
        if isinstance(history, str):
            history += f"{said} and then?"
        else:
            history += [{"role": "assistant", "content": said}, {"role": "user", "content": "and then?"}]
    return times


def _said(answer: str, route: str, stream: bool) -> str:
    """Return the text of a reply."""
    bodies = [json.loads(line[6:]) for line in answer.splitlines() if line[:7] == "data: {"] if stream else []
    for body in bodies or [json.loads(answer)]:
        match route:
            case "responses":
                body = body.get("response", body)
                texts = [part["text"] for item in body.get("output") or () for part in item["content"]]
            case "messages":
                texts = [
                    block["text"] for block in [body.get("delta", {}), *body.get("content", ())] if "text" in block
                ]
            case "completions":
                texts = [choice["text"] for choice in body["choices"]]
            case _:
                said = [choice.get("message") or choice["delta"] for choice in body["choices"]]
                texts = [each["content"] for each in said if each.get("content")]
        if texts:
            return str(texts[0])
    raise AssertionError(f"no text in {answer:.300}")


# --- the service, in another -----------------------------------------------------------------------------------------


SERVING: Final = ExitStack()


def serve() -> tuple[str, str]:
    """Start the embedded service, until `SERVING` is closed; return its URL and its key."""
    local = SERVING.enter_context(serve_in_thread(engine="echo", provisioning_seconds=0.0))
    return local.base_url, local.api_key


def stop_serving() -> None:
    SERVING.close()


# --- the gateway -----------------------------------------------------------------------------------------------------


class Measured:
    """A gateway, and an agent that calls it from another process."""

    def __init__(self, sampler: loops.SamplingClient, gateway: loops.AgentGateway, agent: Executor) -> None:
        self.sampler = sampler
        self.tokenizer = trained_tokenizer()
        self._gateway = gateway
        self._agent = agent

    async def turns(self, text: str, *route: str, stream: bool = False) -> list[float]:
        """Return the milliseconds of each turn of one conversation."""
        async with self._gateway.rollout() as rollout:
            times: list[float] = await self._there(
                converse, rollout.base_url, rollout.api_key, text, *route, stream=stream
            )
        return times

    async def seconds_at_once(self, count: int, text: str) -> float:
        """Return how long so many conversations take together."""
        async with AsyncExitStack() as stack:
            rollouts = [await stack.enter_async_context(self._gateway.rollout()) for _ in range(count)]
            began = time.perf_counter()
            await self._there(converse_at_once, [(each.base_url, each.api_key) for each in rollouts], text)
            return time.perf_counter() - began

    async def longest_held(self, work: Awaitable[object]) -> float:
        """Return for how many milliseconds the event loop was held at most while something was done."""
        longest = 0.0

        async def watch() -> None:
            nonlocal longest
            while True:
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                longest = max(longest, 1000 * (time.perf_counter() - before) - 1)

        watching = asyncio.create_task(watch())
        await work
        watching.cancel()
        return longest

    async def _there(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return await asyncio.wrap_future(self._agent.submit(function, *args, **options))


@asynccontextmanager
async def measured() -> AsyncIterator[Measured]:
    """Run the service, the agent and the gateway."""
    fresh = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as service, ProcessPoolExecutor(1, mp_context=fresh) as agent:
        base_url, api_key = await asyncio.wrap_future(service.submit(serve))
        async with loops.ServiceClient(base_url=base_url, api_key=api_key, on_exit="deactivate") as client:
            trainer = await client.create_lora_training_client("echo", rank=8)
            sampler = await trainer.save_weights_and_get_sampling_client("agents")
            options: dict[str, Any] = {"tokenizer": trained_tokenizer(), "chat_template": TEMPLATE}
            async with loops.AgentGateway(sampler, defaults={"max_tokens": 8}, **options) as gateway:
                yield Measured(sampler, gateway, agent)
        await asyncio.wrap_future(service.submit(stop_serving))


def trained_tokenizer() -> Any:
    """Return a tokenizer like those of most models, small enough to be trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([WORDS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", additional_special_tokens=special)


async def measure(rounds: int) -> dict[str, float]:
    """Return the figures by name: milliseconds, and seconds for all rollouts."""
    figures: dict[str, float] = {}
    async with measured() as here:
        for size in SIZES:
            figures |= await _overheads(here, size, rounds)
        figures |= await _held(here, rounds)
        figures[f"{ROLLOUTS} rollouts of {TURNS} turns, s"] = await here.seconds_at_once(ROLLOUTS, WORDS)
    return figures


async def _overheads(here: Measured, size: int, rounds: int) -> dict[str, float]:
    """Return what a first and a continued turn take longer than `sample` with a prompt of that size."""
    text = text_of(here.tokenizer, size)
    prompt = here.tokenizer.encode(text)
    await here.turns(text)  # warms up
    direct = await _median(lambda: here.sampler.sample(prompt, 1, PARAMS), rounds)
    times = [await here.turns(text) for _ in range(rounds)]
    first, continued = (statistics.median(each[turn] for each in times) for turn in (0, 1))
    return {
        f"sample of {size:,} tokens, ms": direct,
        f"first turn of {size:,}, ms more": first - direct,
        f"continued turn of {size:,}, ms more": continued - direct,
    }


async def _held(here: Measured, rounds: int) -> dict[str, float]:
    """Return how long conversations of the largest size hold the loop, by route."""
    text = text_of(here.tokenizer, SIZES[-1])
    figures: dict[str, float] = {}
    for route in ROUTES:
        for stream in (False, True):
            longest = [await here.longest_held(here.turns(text, route, stream=stream)) for _ in range(rounds)]
            name = f"{route}, {'streamed' if stream else 'plain'}: loop held for, ms"
            figures[name] = statistics.median(longest)
    return figures


def text_of(tokenizer: Any, size: int) -> str:
    """Return a text of about so many tokens."""
    return WORDS * round(size / len(tokenizer.encode(WORDS)))


async def _median(call: Callable[[], Awaitable[object]], rounds: int) -> float:
    """Return the median time of a call in milliseconds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        await call()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    figures = asyncio.run(measure(parser.parse_args().rounds))
    for name, value in figures.items():
        print(f"{name:50} {value:8.1f}")
    RESULTS.write_text(json.dumps({name: round(value, 2) for name, value in figures.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""`loops_async`, through its public classes."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import loops_async as loops
from benchmarks.peers.measure import MAX_TOKENS, PROMPT, SAMPLES, Clock, batch, in_flight, main

Work = Callable[[loops.ServiceClient, argparse.Namespace], Coroutine[Any, Any, Any]]


def _run(work: Work) -> Callable[[argparse.Namespace], Any]:
    async def with_service(given: argparse.Namespace) -> Any:
        async with loops.ServiceClient(base_url=given.url, api_key="benchmark") as service:
            return await work(service, given)

    return lambda given: asyncio.run(with_service(given))


async def sample(service: loops.ServiceClient, given: argparse.Namespace) -> dict[str, float]:
    """Sample `count` times."""
    sampler = await service.create_sampling_client("bench")
    prompt = loops.ModelInput.from_ints(PROMPT)
    params = loops.SamplingParams(max_tokens=MAX_TOKENS)

    async def call() -> None:
        await sampler.sample(prompt, SAMPLES, params)

    await in_flight(call, given.in_flight, given.in_flight)
    clock = Clock()
    await clock.start_watching(blind=given.blind)
    await in_flight(call, given.count, given.in_flight)
    return clock.stop(given.count)


async def train(service: loops.ServiceClient, given: argparse.Namespace) -> dict[str, float]:
    """Send one batch and wait for its result."""
    rows = batch(given.count)
    if given.numpy:
        import numpy as np

        arrays = [{name: np.asarray(values) for name, values in row.items()} for row in rows]
    trainer = await service.create_lora_training_client("bench")
    data = [] if given.numpy else [_datum(row) for row in rows]
    clock = Clock()
    await clock.start_watching(blind=given.blind)
    if given.numpy:
        data = [_datum(row) for row in arrays]
    await (await trainer.forward_backward(data, "importance_sampling"))
    return clock.stop(1)


def _datum(row: dict[str, Any]) -> loops.Datum:
    return loops.Datum(
        model_input=row["tokens"],
        loss_fn_inputs={name: values for name, values in row.items() if name != "tokens"},
    )


async def provision(service: loops.ServiceClient, given: argparse.Namespace) -> dict[str, float]:
    """Provision `count` runs at once."""
    clock = Clock()
    await clock.start_watching(blind=given.blind)
    await asyncio.gather(*(service.create_lora_training_client("bench") for _ in range(given.count)))
    return clock.stop(given.count)


async def listing(service: loops.ServiceClient, given: argparse.Namespace) -> dict[str, float]:
    """List the checkpoints of `count` runs."""
    clock = Clock()
    await clock.start_watching(blind=given.blind)
    await asyncio.gather(*(service.list_checkpoints(f"run{number}") for number in range(given.count)))
    return clock.stop(given.count)


if __name__ == "__main__":
    main({"sample": _run(sample), "train": _run(train), "provision": _run(provision), "list": _run(listing)})

"""The published client, `baseten-loops`, through its asynchronous methods. Runs in its own environment."""

from __future__ import annotations

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from baseten.loops import Datum, ModelInput, SamplingParams, ServiceClient, TensorData

from benchmarks.peers.measure import MAX_TOKENS, PROMPT, SAMPLES, Clock, batch, main, sampling, training


def _service(given: argparse.Namespace) -> Any:
    return ServiceClient(base_url=given.url, api_key="benchmark")


def sample(given: argparse.Namespace) -> dict[str, float]:
    """Sample `count` times."""
    sampler = _service(given).create_sampling_client(base_model="bench")
    prompt = ModelInput.from_ints(PROMPT)
    params = SamplingParams(max_tokens=MAX_TOKENS)

    async def call() -> None:
        await sampler.sample_async(prompt, SAMPLES, params)

    return asyncio.run(sampling(given, call))


def train(given: argparse.Namespace) -> dict[str, float]:
    """Send a batch and wait for its result."""
    rows = batch(given)
    trainer = _service(given).create_lora_training_client("bench")
    data = [] if given.make else [_datum(row) for row in rows]

    async def call() -> None:
        await (await trainer.forward_backward_async(data or [_datum(row) for row in rows], "importance_sampling"))

    return asyncio.run(training(given, call))


def _datum(row: dict[str, Any]) -> Any:
    lists = {name: values if isinstance(values, list) else values.tolist() for name, values in row.items()}
    return Datum(
        model_input=ModelInput.from_ints(lists["tokens"]),
        loss_fn_inputs={
            name: TensorData.from_list(values, "int64" if name == "target_tokens" else "float32")
            for name, values in lists.items()
            if name != "tokens"
        },
    )


def provision(given: argparse.Namespace) -> dict[str, float]:
    """Provision `count` runs at once, from threads, as its asynchronous form does too."""
    service = _service(given)
    clock = Clock(given)
    clock.start()
    with ThreadPoolExecutor(given.count) as pool:
        list(pool.map(lambda _: service.create_lora_training_client("bench"), range(given.count)))
    return clock.stop(given.count)


def listing(given: argparse.Namespace) -> dict[str, float]:
    """List the checkpoints of `count` runs; it has no asynchronous form."""
    service = _service(given)
    clock = Clock(given)
    clock.start()
    for number in range(given.count):
        service.list_checkpoints(f"run{number}")
    return clock.stop(given.count)


if __name__ == "__main__":
    main({"sample": sample, "train": train, "provision": provision, "list": listing})

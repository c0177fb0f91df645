"""`loops_async`, through its public classes."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

import loops_async as loops
from benchmarks.peers.measure import MAX_TOKENS, PROMPT, SAMPLES, Clock, batch, main, runner, sampling, training

GROUP_SIZE = 8
STEP_GROUPS = 64

Work = Callable[[loops.ServiceClient, argparse.Namespace], Coroutine[Any, Any, Any]]


def _run(work: Work) -> Callable[[argparse.Namespace], Any]:
    async def with_service(given: argparse.Namespace) -> Any:
        async with loops.ServiceClient(base_url=given.url, api_key="benchmark", on_exit="leave") as service:
            return await work(service, given)

    return lambda given: runner(given)(with_service(given))


async def sample(service: loops.ServiceClient, given: argparse.Namespace) -> dict[str, float]:
    """Sample `count` times."""
    sampler = await service.create_sampling_client("bench")
    prompt = loops.ModelInput.from_ints(PROMPT)
    params = loops.SamplingParams(max_tokens=MAX_TOKENS)

    async def call() -> None:
        await sampler.sample(prompt, SAMPLES, params)

    return await sampling(given, call)


async def sample_many(service: loops.ServiceClient, given: argparse.Namespace) -> dict[str, float]:
    """Sample `count` prompts through `sample_many`, including the start of its processes."""
    sampler = await service.create_sampling_client("bench")
    params = loops.SamplingParams(max_tokens=MAX_TOKENS)
    os.environ["BASETEN_API_KEY"] = "benchmark"
    clock = Clock(given)
    await clock.start_watching()
    prompts = (PROMPT for _ in range(given.count))
    answers = sampler.sample_many(
        prompts, num_samples=SAMPLES, sampling_params=params, limit=given.in_flight, processes=given.processes
    )
    done = sum([1 async for _ in answers])
    assert done == given.count
    return clock.stop(given.count)


async def episodes(service: loops.ServiceClient, given: argparse.Namespace) -> dict[str, float]:
    """Roll out `count` episodes of one answer, and sample as often without a stream; ``above_us`` is the difference."""
    trainer = await service.create_lora_training_client("bench")
    sampler = await trainer.save_weights_and_get_sampling_client("bench")
    params = loops.SamplingParams(max_tokens=MAX_TOKENS)

    async def call() -> None:
        await sampler.sample(PROMPT, 1, params, affinity_key="group")

    async def rollout(ctx: Any, task: int) -> loops.Episode:
        episode = loops.Episode.start(PROMPT)
        await ctx.sample(episode, params)
        episode.reward = float(ctx.member % 2)
        return episode

    alone = {} if given.cold else await sampling(given, call)
    clock = Clock(given)
    await clock.start_watching()
    async with trainer.rollouts(
        rollout,
        range(given.count // GROUP_SIZE),
        group_size=GROUP_SIZE,
        groups_per_step=STEP_GROUPS,
        max_staleness=1 + given.in_flight // (GROUP_SIZE * STEP_GROUPS),
        limit=given.in_flight,
    ) as stream:
        done = 0
        async for batch in stream:
            done += len(batch.data)
            await stream.publish()
        numbers = clock.stop(given.count)
    assert done == given.count
    return numbers | {"above_us": numbers["cpu_us"] - alone.get("cpu_us", 0.0)}


async def train(service: loops.ServiceClient, given: argparse.Namespace) -> dict[str, float]:
    """Send a batch and wait for its result."""
    rows = batch(given)
    trainer = await service.create_lora_training_client("bench")
    data = [] if given.make else [_datum(row) for row in rows]

    async def call() -> None:
        await (await trainer.forward_backward(data or [_datum(row) for row in rows], "importance_sampling"))

    return await training(given, call)


def _datum(row: dict[str, Any]) -> loops.Datum:
    return loops.Datum(
        model_input=row["tokens"],
        loss_fn_inputs={name: values for name, values in row.items() if name != "tokens"},
    )


async def provision(service: loops.ServiceClient, given: argparse.Namespace) -> dict[str, float]:
    """Provision `count` runs at once."""
    clock = Clock(given)
    await clock.start_watching()
    await asyncio.gather(*(service.create_lora_training_client("bench") for _ in range(given.count)))
    return clock.stop(given.count)


async def listing(service: loops.ServiceClient, given: argparse.Namespace) -> dict[str, float]:
    """List the checkpoints of `count` runs."""
    clock = Clock(given)
    await clock.start_watching()
    await asyncio.gather(*(service.list_checkpoints(f"run{number}") for number in range(given.count)))
    return clock.stop(given.count)


if __name__ == "__main__":
    main(
        {
            "sample": _run(sample),
            "sample_many": _run(sample_many),
            "episodes": _run(episodes),
            "train": _run(train),
            "provision": _run(provision),
            "list": _run(listing),
        }
    )

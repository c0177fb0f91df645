"""A program with a journal, in a process of its own, which another one kills: a training loop, or one of rollouts.

Usage: python -m tests.chaos.journaled LOOP BASE_URL API_KEY JOURNAL STEPS

It says ``ready`` when it begins, and prints at its end what it saw, as one line of JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

import loops_async as loops

MODEL: Final = "tiny"
GROUPS: Final = 2
MEMBERS: Final = 2
SAMPLED: Final = loops.SamplingParams(max_tokens=6)


class Seen(Struct):
    """What a program saw: the run, the hash of its final weights, and what each call returned."""

    run_id: str
    weights: str
    results: list[Any]


async def main(loop: str, base_url: str, api_key: str, journal: str, steps: int) -> Seen:
    """Run one loop to its end."""
    client = loops.ServiceClient(
        base_url=base_url, api_key=api_key, on_exit="leave", journal=journal, journal_samples=True
    )
    async with client as service:
        trainer = await service.create_lora_training_client(MODEL, rank=4, seed=1)
        results = await (train(trainer, steps) if loop == "training" else learn(trainer, steps))
        await (await trainer.save_state("final"))
        return Seen(trainer.run_id, await weights_of(service, trainer), results)


async def train(trainer: loops.TrainingClient, steps: int) -> list[Any]:
    """Train on examples, each step under way while the next one is submitted, and save at times."""
    results: list[Any] = []
    before: loops.OperationFuture[loops.StepResult] | None = None
    for step in range(steps):
        tokens = [step + 1, 20, 30, 40]
        datum = loops.Datum(model_input=tokens, loss_fn_inputs={"target_tokens": [20, 30, 40, 50]})
        now = await trainer.step([datum], "cross_entropy", loops.AdamParams(learning_rate=rate(step)))
        if before is not None:
            results.append((await before).loss)
        if step % 4 == 3:
            results.append((await (await trainer.save_state(f"step-{step}"))).path.rpartition("/")[2])
        before = now
    return results if before is None else [*results, (await before).loss]


async def learn(trainer: loops.TrainingClient, steps: int) -> list[Any]:
    """Train on rollouts, and publish after each step."""
    results: list[Any] = []
    tasks = range(steps * GROUPS)
    async with trainer.rollouts(
        rollout, tasks, group_size=MEMBERS, groups_per_step=GROUPS, max_staleness=0, seed=5, keep_constant_groups=True
    ) as stream:
        async for batch in stream:
            params = loops.AdamParams(learning_rate=rate(batch.step))
            step = await trainer.step([weighted(each) for each in batch.data], "cross_entropy", params)
            await stream.publish()
            results.append([(await step).loss, [group.rewards for group in batch.groups]])
    return results


def weighted(datum: loops.Datum) -> loops.Datum:
    """Return an example whose gradient is that of plain policy gradient, and which needs no logprobs of the sampler.

    Their last bits differ with what is computed beside a sample, while its tokens follow from its seed.
    """
    inputs = datum.loss_fn_inputs
    kept = {"target_tokens": inputs["target_tokens"], "weights": inputs["advantages"]}
    return loops.Datum(model_input=datum.model_input, loss_fn_inputs=kept)


async def rollout(ctx: loops.RolloutContext, task: int) -> loops.Episode:
    """Sample one answer; its reward is made of its tokens."""
    episode = loops.Episode.start(list(prompt(task)))
    await ctx.sample(episode, SAMPLED)
    episode.reward = sum(episode.tokens) % 7 + ctx.member / 10
    return episode


def rate(step: int) -> float:
    """Return the learning rate of a step, which no other step has."""
    return (step + 1) * 1e-4


def prompt(task: int) -> tuple[int, ...]:
    """Return the prompt of a task, which no other task has."""
    return task + 1, 60, 70


async def weights_of(service: loops.ServiceClient, trainer: loops.TrainingClient) -> str:
    """Return the hash of the weights that were saved last."""
    (saved,) = [one for one in await trainer.list_checkpoints() if one.checkpoint_id == "final"]
    with tempfile.TemporaryDirectory() as directory:
        await service.download_checkpoint(saved.id, dest_dir=directory)
        content = (Path(directory) / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    print("ready", flush=True)
    seen = asyncio.run(main(*sys.argv[1:5], int(sys.argv[5])))
    print(msgspec.json.encode(seen).decode(), flush=True)

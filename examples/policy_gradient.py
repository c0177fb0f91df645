"""Policy gradient with PPO: the model learns the right one-word answers from rewards alone.

Each batch of samples is used for two updates, which the clipped ratio of PPO allows. The measure is the mean reward of
fresh samples before and after. Runs on the embedded service, or on Baseten with a key:

    python examples/policy_gradient.py
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from _curves import Curves
from _lessons import YES_NO, chat, policy_examples, rewards
from quickstart import BASE_MODEL, connected

import loops_async as loops

STEPS = 10
GROUP = 4
UPDATES = 2


async def sampled_groups(
    sampler: loops.SamplingClient, tokenizer: Any, seed: int
) -> tuple[list[loops.Datum], list[float]]:
    """Sample every question `GROUP` times; return training examples made of the answers, and their rewards."""
    params = loops.SamplingParams(max_tokens=8, seed=seed)
    prompts = [chat(tokenizer, f"{question} answer yes or no") for question in YES_NO]
    groups = await asyncio.gather(
        *(sampler.sample(prompt, GROUP, params, affinity_key=str(i)) for i, prompt in enumerate(prompts))
    )
    examples, graded = [], []
    for prompt, group, right in zip(prompts, groups, YES_NO.values(), strict=True):
        grades = rewards(tokenizer, group.sequences, right)
        examples += policy_examples(prompt, group.sequences, grades)
        graded += grades
    return examples, graded


async def main(base_model: str) -> int:
    """Train and measure; return the exit code."""
    curves = Curves(
        "PPO: right answers in one word",
        {"reward": "mean reward", "drift within the step": "median |log ratio| (nats)"},
    )
    async with connected(base_model) as service, service.training_run(base_model, rank=16, seed=1) as trainer:
        tokenizer = await trainer.get_tokenizer()
        for step in range(STEPS + 1):
            sampler = await trainer.save_weights_and_get_sampling_client("policy")
            examples, graded = await sampled_groups(sampler, tokenizer, seed=step)
            curves.add(step, reward=sum(graded) / len(graded))
            if step == STEPS or not examples:
                continue
            for _ in range(UPDATES):
                forward = await trainer.forward_backward(examples, "ppo")
                update = await trainer.optim_step(loops.AdamParams(learning_rate=1e-4))
            # The second pass scored the samples with weights that had moved since they were drawn.
            logprobs = [one["logprobs"] for one in (await forward).loss_fn_outputs]
            drift = loops.loops_compute_kl_sample_train(examples, logprobs, prefix="")
            curves.add(step + 1, drift_within_the_step=drift["diff_abs_p50"])
            await update
    curves.draw(Path("policy_gradient.png"))
    points = [reward for _, reward in curves.points["reward"]]
    before, after = sum(points[:2]) / 2, sum(points[-3:]) / 3
    print(f"mean reward: {before:.2f} in the first two batches, {after:.2f} in the last three")
    return 0 if after > before + 0.2 else 1


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else BASE_MODEL)))
    except loops.LoopsError as error:
        sys.exit(f"error: {error}")

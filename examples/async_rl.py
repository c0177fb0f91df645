"""Asynchronous RL: the model learns to answer in one right word, and is sampled while it is trained.

Rollouts run ahead of training, by two steps at most. Every few steps the weights are evaluated on other questions,
beside training, and saved: if the program is killed, start it again, and it continues. Runs on the embedded service,
or on Baseten with a key:

    python examples/async_rl.py
    BASETEN_API_KEY=... python examples/async_rl.py Qwen/Qwen3-8B

`async_rl_sync.py` is the same without `await`, and `multi_turn.py` has longer episodes.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _curves import ROLLOUTS, Curves
from _lessons import UNSEEN_YES_NO, YES_NO, chat, reward
from quickstart import BASE_MODEL, connected

import loops_async as loops

ROUNDS = 12
EVALUATE_EVERY = 5
ADAM = loops.AdamParams(learning_rate=2e-4)


def one_word(tokenizer: Any) -> loops.Rollout:
    """Return the rollout: a question, and one answer to it."""

    async def rollout(ctx: loops.RolloutContext, task: tuple[str, str]) -> loops.Episode:
        question, right = task
        episode = loops.Episode.start(chat(tokenizer, f"{question} answer yes or no"))
        answer = await ctx.sample(episode, loops.SamplingParams(max_tokens=8))
        episode.reward = reward(tokenizer.decode(answer.tokens, skip_special_tokens=True), right)
        return episode

    return rollout


async def learn(
    base_model: str,
    rollout_with: Callable[[Any], loops.Rollout],
    tasks: Sequence[tuple[str, str]],
    unseen: Sequence[tuple[str, str]],
    *,
    work: Path,
    title: str,
) -> int:
    """Train on all tasks, from where `work` says that it was interrupted; return the exit code."""
    saved = work / "state.json"
    state = loops.RolloutState.read(saved)
    curves = Curves(title, ROLLOUTS, work / "curves.jsonl", resumed_at=state.version if state else 0)

    async with connected(base_model, work / "service") as service:
        if state is None or state.path is None:
            trainer = await service.create_lora_training_client(base_model, rank=16, seed=1)
        else:
            trainer = await service.create_training_client_from_state_with_optimizer(state.path)
        rollout = rollout_with(await trainer.get_tokenizer())

        async with trainer.rollouts(
            rollout, tasks, group_size=8, groups_per_step=4, max_staleness=2, seed=1, state=state
        ) as stream:
            evaluation = await stream.evaluate(rollout, unseen, group_size=4)  # begins now, beside training
            async for batch in stream:
                step = await trainer.step(batch.data, "ppo", ADAM)
                await stream.publish()
                curves.add_metrics(batch.step, batch.report(await step))
                if stream.version % EVALUATE_EVERY == 0:
                    curves.add_evaluation(await evaluation)
                    (await stream.save(f"step-{stream.version}")).write(saved)
                    evaluation = await stream.evaluate(rollout, unseen, group_size=4)
            curves.add_evaluation(await evaluation)

    curves.draw(Path(f"{work.name}.png"))
    shutil.rmtree(work)  # it is done: the next start begins anew
    return 0 if curves.rise("reward/mean") > 0.2 else 1


async def main(base_model: str) -> int:
    """Train and measure; return the exit code."""
    tasks, unseen = [*YES_NO.items()] * ROUNDS, [*UNSEEN_YES_NO.items()]
    title = "Asynchronous RL: right answers in one word"
    return await learn(base_model, one_word, tasks, unseen, work=Path("async_rl"), title=title)


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else BASE_MODEL)))
    except loops.LoopsError as error:
        sys.exit(f"error: {error}")

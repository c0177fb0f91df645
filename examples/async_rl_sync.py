"""The blocking twin of `async_rl.py`: the same job through `loops_sync`, for scripts without an event loop.

Each running rollout has a worker thread of its own, so it may block; the loop stays in this thread.

    python examples/async_rl_sync.py
    BASETEN_API_KEY=... python examples/async_rl_sync.py Qwen/Qwen3-8B
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _curves import ROLLOUTS, Curves
from _lessons import UNSEEN_YES_NO, YES_NO, chat, reward
from quickstart_sync import BASE_MODEL, connected

import loops_sync as loops

ROUNDS = 12
EVALUATE_EVERY = 5
ADAM = loops.AdamParams(learning_rate=2e-4)


def one_word(tokenizer: Any) -> loops.Rollout:
    """Return the rollout: a question, and one answer to it."""

    def rollout(ctx: loops.RolloutContext, task: tuple[str, str]) -> loops.Episode:
        question, right = task
        episode = loops.Episode.start(chat(tokenizer, f"{question} answer yes or no"))
        answer = ctx.sample(episode, loops.SamplingParams(max_tokens=8))
        episode.reward = reward(tokenizer.decode(answer.tokens, skip_special_tokens=True), right)
        return episode

    return rollout


def learn(
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

    with connected(base_model, work / "service") as service:
        if state is None or state.path is None:
            trainer = service.create_lora_training_client(base_model, rank=16, seed=1)
        else:
            trainer = service.create_training_client_from_state_with_optimizer(state.path)
        rollout = rollout_with(trainer.get_tokenizer())

        with trainer.rollouts(
            rollout, tasks, group_size=8, groups_per_step=4, max_staleness=2, seed=1, state=state
        ) as stream:
            evaluation = stream.evaluate(rollout, unseen, group_size=4)  # begins now, beside training
            for batch in stream:
                step = trainer.step(batch.data, "ppo", ADAM)
                stream.publish()
                curves.add_metrics(batch.step, batch.report(step.result()))
                if stream.version % EVALUATE_EVERY == 0:
                    curves.add_evaluation(evaluation.result())
                    stream.save(f"step-{stream.version}").write(saved)
                    evaluation = stream.evaluate(rollout, unseen, group_size=4)
            curves.add_evaluation(evaluation.result())

    curves.draw(Path(f"{work.name}.png"))
    shutil.rmtree(work)  # it is done: the next start begins anew
    return 0 if curves.rise("reward/mean") > 0.2 else 1


def main(base_model: str) -> int:
    """Train and measure; return the exit code."""
    tasks, unseen = [*YES_NO.items()] * ROUNDS, [*UNSEEN_YES_NO.items()]
    title = "Asynchronous RL: right answers in one word"
    return learn(base_model, one_word, tasks, unseen, work=Path("async_rl_sync"), title=title)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else BASE_MODEL))
    except loops.LoopsError as error:
        sys.exit(f"error: {error}")

"""Rollouts beside training: reinforcement learning that keeps the trainer and the sampler busy.

- `RolloutStream`: made by `TrainingClient.rollouts`; yields each `RolloutBatch` to train on.
- `RolloutContext`: what a rollout samples with. `Episode`: one rollout, of one or many turns, as tokens with what
  training needs to know of each.
- `group_advantages`: how much better each member of a group is than the others.
- `StalenessGate`: bounds how far rollouts run ahead of training; for loops of your own.
- `FailurePolicy`: which failures are tolerated. `RolloutState`: where to continue.

Example:
    ::

        async def rollout(ctx, task):
            episode = loops.Episode.start(task.prompt)
            answer = await ctx.sample(episode, loops.SamplingParams(max_tokens=64))
            episode.reward = task.grade(answer.tokens)
            return episode

        async with trainer.rollouts(rollout, tasks, group_size=8, groups_per_step=4, max_staleness=2) as stream:
            async for batch in stream:
                step = await trainer.step(batch.data, "ppo", loops.AdamParams(learning_rate=1e-4))
                await stream.publish()
                print(batch.report(await step))
"""

from ._rollouts.advantages import AdvantageMethod, group_advantages
from ._rollouts.batch import RolloutBatch, RolloutGroup
from ._rollouts.context import Rollout, RolloutContext
from ._rollouts.episode import Episode
from ._rollouts.evaluation import EvaluationResult
from ._rollouts.executor import Executor
from ._rollouts.failures import FailurePolicy
from ._rollouts.gate import GateState, StalenessGate, Ticket
from ._rollouts.options import Advantages
from ._rollouts.state import RolloutState
from ._rollouts.stream import RolloutStream, RunningGroup

__all__: list[str] = [
    "AdvantageMethod",
    "Advantages",
    "Episode",
    "EvaluationResult",
    "Executor",
    "FailurePolicy",
    "GateState",
    "Rollout",
    "RolloutBatch",
    "RolloutContext",
    "RolloutGroup",
    "RolloutState",
    "RolloutStream",
    "RunningGroup",
    "StalenessGate",
    "Ticket",
    "group_advantages",
]

"""What a stream hands out: groups of episodes with their advantages, as one batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from .._arguments import check_finite
from .._kinds import is_iterable
from .._values import Value
from ..drift import loops_compute_kl_sample_train
from ..errors import InputError
from ..types import Datum, StepResult
from .advantages import group_advantages
from .episode import Episode, fit
from .options import Options

__all__ = ["RolloutBatch", "RolloutGroup", "add_examples", "prepare"]

DRIFT_PREFIX: Final = "drift/"


class RolloutGroup(Value, Struct, kw_only=True):
    """The finished episodes of one task, each with its advantage.

    `index` is the number of the task, from 0; `version` counts the steps whose weights were published when the group
    began. `data` has the training example of each episode, and those of its branches. A member that the
    `FailurePolicy` could spare is missing.
    """

    index: int
    task: Any
    version: int
    episodes: list[Episode]
    advantages: list[float] = []
    data: list[Datum] = []

    @property
    def rewards(self) -> list[float]:
        """The reward of each episode."""
        return [0.0 if episode.reward is None else episode.reward for episode in self.episodes]


class RolloutBatch(Value, Struct, kw_only=True):
    """Groups to train on: a whole step, or a part of it (`minibatches`).

    `step` is the number of the step, from 0. After the last of its batches, for which `is_last_of_step` is True, call
    `optim_step` and publish the weights. `data` has one training example for each episode, in the order of `episodes`;
    where an agent's conversation branched, further ones follow (`Episode.branches`).

    `metrics` describe this batch and what happened since the last one. They are also in the row of the step that is
    trained on it, where a `WandbConfig` or an `on_step` is given; there, ``step`` is the trainer's number of the step.

    - ``step``, and ``version``: the steps whose weights are published.
    - ``reward/mean``, also over groups that were dropped; ``reward/trained_mean``, over this batch.
    - ``groups/submitted``, ``accepted``, ``dropped``, ``failed`` and ``running``, since the beginning of the run;
      ``groups/constant_share``, the part of the finished groups whose rewards are equal; ``episodes/retries``, since
      the stream began.
    - ``staleness/mean`` and ``max``: the step minus the group's version; ``staleness/token_mean`` and ``token_max``:
      the published policy version minus the token's.
    - ``episode/tokens_mean`` and ``tokens_max`` (sampled tokens), ``turns_mean``, and ``truncated_share``;
      ``episode/<name>``, the mean of each of your own `Episode.metrics`.
    - ``time/step``, seconds since the last batch; ``time/trainer_wait``, those of them in which this one was waited
      for; ``idle/trainer`` and ``idle/sampler``, the parts of the time in which the program waited for a batch, and in
      which no request was in flight.
    - ``sampler/limit``, ``in_flight`` and ``rejections``, those of the `Limiter`.
    - ``loop/lag_max``: by how many seconds the program held up its rollouts at most.
    """

    groups: list[RolloutGroup]
    step: int
    is_last_of_step: bool
    metrics: dict[str, float] = {}

    @property
    def episodes(self) -> list[Episode]:
        """The episodes of all groups, in order."""
        return [episode for group in self.groups for episode in group.episodes]

    @property
    def data(self) -> list[Datum]:
        """The training examples of all groups, in order."""
        return [datum for group in self.groups for datum in group.data]

    def report(self, step_result: StepResult) -> dict[str, float]:
        """Return the metrics together with those of training on this batch.

        Args:
            step_result: the result of `TrainingClient.step` with `data`.

        Returns:
            `metrics`, ``train/loss``, ``train/<name>`` for each metric of the optimizer, and, with numpy,
            ``drift/<name>`` for each of `loops_compute_kl_sample_train`.
        """
        optim = step_result.optim.metrics or {}
        return {
            **self.metrics,
            "train/loss": step_result.loss,
            **{f"train/{name}": value for name, value in optim.items()},
            **self._drift(step_result),
        }

    def _drift(self, step_result: StepResult) -> dict[str, float]:
        trained = [outputs["logprobs"] for outputs in step_result.forward_backward.loss_fn_outputs]
        try:
            return loops_compute_kl_sample_train(self.data, trained, prefix=DRIFT_PREFIX)
        except ImportError:  # numpy is optional
            return {}


async def prepare(group: RolloutGroup, options: Options, longest: int | None) -> bool:
    """Give a group its advantages and training examples; return whether there is something to learn.

    Truncated episodes that are masked have no advantage, but their rewards are part of the others' baseline. An
    observation at the end of an episode may exceed `longest`: the trainer would refuse the whole batch for it.
    """
    if longest is not None:
        for episode in group.episodes:
            fit(episode, longest)
    for episode, advantage in zip(group.episodes, _advantages(group.rewards, options), strict=True):
        is_masked = options.mask_truncated and episode.is_truncated
        group.advantages.append(0.0 if is_masked else advantage)
    await add_examples(group)
    return any(group.advantages)


async def add_examples(group: RolloutGroup) -> None:
    """Give a group that has its advantages its training examples."""
    for episode, advantage in zip(group.episodes, group.advantages, strict=True):
        for sequence in (episode, *episode.branches):
            group.data.append(sequence.datum(advantage))
            await asyncio.sleep(0)  # long episodes take a while


def _advantages(rewards: list[float], options: Options) -> Sequence[float]:
    if not callable(options.advantages):
        return group_advantages(rewards, options.advantages)
    returned: Any = options.advantages(list(rewards))
    if not is_iterable(returned):
        raise InputError("advantages", f"must return one number for each reward; got {returned!r:.100}")
    advantages = [check_finite(number, "advantages") for number in returned]
    if len(advantages) != len(rewards):
        raise InputError("advantages", f"must return one number for each of {len(rewards)}; got {len(advantages)}")
    return advantages

"""Evaluating the weights of one moment, beside training."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any

from msgspec import Struct

from .._sampling.limiter import FIRST
from .._sampling.many import BoundedMap, each
from .._values import Value
from ..errors import RolloutError
from ..sampling import SamplingClient
from .batch import RolloutGroup
from .context import Group, Resources
from .metrics import mean, means_of_own_metrics
from .policy import Policy
from .rolling import Dropped, Failed, Roller

__all__ = ["EvaluationResult", "evaluate"]


class EvaluationResult(Value, Struct, kw_only=True):
    """The rewards of one version of the weights.

    `version` is the service's number of them: the optimizer steps that led there. `groups` are those of the tasks that
    were finished, in order, without advantages; `failed` counts the others. `metrics` are ``evaluation/reward_mean``
    (over all episodes), ``evaluation/version``, ``evaluation/failed``, and ``evaluation/<name>``, the mean of each of
    your own `Episode.metrics`.
    """

    version: int
    groups: list[RolloutGroup]
    failed: int
    metrics: dict[str, float] = {}


async def evaluate(
    roller: Roller,
    tasks: Iterable[Any] | AsyncIterable[Any],
    resources: Resources,
    *,
    policy: Policy[SamplingClient],
    step: int,
    key: str,
) -> EvaluationResult:
    """Roll out a group for each task, as far ahead that whenever a place is free, a request waits for it.

    Raises:
        RolloutError: every group has failed.
    """
    failures: Counter[str] = Counter()
    last: BaseException | None = None
    groups: list[RolloutGroup] = []

    async def roll_out(numbered: tuple[int, Any]) -> RolloutGroup | Dropped | Failed:
        index, task = numbered
        group = Group(index, task, step, affinity_key=f"{key}/{index}", priority=FIRST)
        result = await roller.roll_out(group)
        if isinstance(result, list):
            return RolloutGroup(index=index, task=task, version=step, episodes=result)
        return result

    def most() -> int:
        return 1 + 2 * resources.limiter.limit // resources.group_size

    results = BoundedMap(_numbered(tasks), roll_out, most=most, ordered=True).results()
    async with aclosing(results):
        async for _, result in results:
            if isinstance(result, RolloutGroup):
                groups.append(result)
            elif isinstance(result, Failed):
                last = result.error
                failures[type(last).__name__] += 1
            else:
                failures["left out"] += 1
    if last is not None and not groups:
        raise RolloutError(f"every group of the evaluation has failed: {last}", failures=failures) from last
    failed = failures.total()
    metrics = {
        **means_of_own_metrics([episode for group in groups for episode in group.episodes], "evaluation/"),
        "evaluation/reward_mean": mean([reward for group in groups for reward in group.rewards]),
        "evaluation/version": policy.version,
        "evaluation/failed": failed,
    }
    return EvaluationResult(version=policy.version, groups=groups, failed=failed, metrics=metrics)


async def _numbered(tasks: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[tuple[int, Any]]:
    index = 0
    async for task in each(tasks):
        yield index, task
        index += 1

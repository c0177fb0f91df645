"""Rollouts of agents: what their calls recorded, as an episode."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from .._agents.trajectories import Trajectory
from .episode import UNKNOWN_VERSION, Episode

__all__ = ["episode_of"]

log = logging.getLogger("loops_async")


def episode_of(trajectories: Sequence[Trajectory], reward: float) -> Episode | None:
    """Return the episode of one rollout: its first sequence, with the others as its branches; None if there is none."""
    if not trajectories:
        log.warning("an agent's rollout is left out: none of its calls was answered")
        return None
    first, *others = map(_episode, trajectories)
    last = max((call for each in trajectories for call in each.calls), key=lambda call: call.started)
    first.reward = reward
    first.stop_reason = last.stop_reason
    first.turns = len({call.id for each in trajectories for call in each.calls})
    first.branches = others
    return first


def _episode(trajectory: Trajectory) -> Episode:
    return Episode(
        tokens=trajectory.tokens,
        logprobs=[each if on else math.nan for each, on in zip(trajectory.logprobs, trajectory.mask, strict=True)],
        mask=trajectory.mask,
        versions=[
            version if on and version is not None else UNKNOWN_VERSION
            for version, on in zip(trajectory.policy_versions, trajectory.mask, strict=True)
        ],
    )

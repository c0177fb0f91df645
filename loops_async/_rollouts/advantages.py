"""Advantages of the members of a group, relative to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

from .._arguments import check_finite, check_not_negative
from .._kinds import is_iterable
from ..errors import InputError
from ..types.tensors import SupportsToList

__all__ = ["AdvantageMethod", "group_advantages"]

AdvantageMethod: TypeAlias = Literal["centered", "standardized", "leave_one_out"]
"""How rewards become advantages; see `group_advantages`."""

SMALLEST_SPREAD: Final = 1e-9
"""Relative to the largest reward: rewards that differ by less are equal, but for rounding."""

LARGEST_REWARD: Final = 1e150
"""The square of a larger one is not finite."""


def group_advantages(
    rewards: Sequence[float] | SupportsToList, method: AdvantageMethod = "centered", *, epsilon: float = 1e-4
) -> list[float]:
    """Return the advantage of each member of a group, which says how much better its reward is than the others'.

    Args:
        rewards: one for each member: a list or an array of n finite numbers.
        method: with m the mean of the rewards,

            - ``"centered"``: r - m (Liu et al., "Understanding R1-Zero-Like Training", 2025).
            - ``"standardized"``: (r - m) / (s + epsilon), s the population's standard deviation (Shao et al.,
              "DeepSeekMath", 2024: GRPO). Groups with nearly equal rewards then weigh as much as others.
            - ``"leave_one_out"``: r - (the mean of the other rewards) = (r - m) * n / (n - 1) (Ahmadian et al., "Back
              to Basics", 2024: RLOO).
        epsilon: added to the standard deviation; not negative.

    Returns:
        n numbers. All are exactly 0.0 when nothing can be learned: fewer than two members, or rewards that differ by
        no more than rounding (1e-9 relative to the largest).

    Raises:
        InputError: a reward is not finite or beyond 1e150, or `method` or `epsilon` is invalid.

    Example:
        >>> from loops_async import group_advantages
        >>> group_advantages([1.0, 0.0, 0.0, 1.0])
        [0.5, -0.5, -0.5, 0.5]
        >>> group_advantages([0.1, 0.1, 0.1], "standardized")
        [0.0, 0.0, 0.0]
    """
    if method not in get_args(AdvantageMethod):
        raise InputError("method", f"must be one of {', '.join(get_args(AdvantageMethod))}; got {method!r}")
    check_not_negative(epsilon, "epsilon")
    listed: Any = rewards.tolist() if isinstance(rewards, SupportsToList) else rewards
    if not is_iterable(listed):
        raise InputError("rewards", f"expected a list or an array, got {type(listed).__name__}")
    numbers = [_reward(reward, f"rewards[{index}]") for index, reward in enumerate(listed)]
    if not _differ(numbers):
        return [0.0] * len(numbers)
    mean = math.fsum(numbers) / len(numbers)
    deviations = [reward - mean for reward in numbers]
    match method:
        case "centered":
            return deviations
        case "standardized":
            # Of deviations: the difference of two means of squares would be rounding noise for nearly equal rewards.
            spread = math.sqrt(math.fsum(each * each for each in deviations) / len(numbers))
            return [each / (spread + epsilon) for each in deviations]
        case "leave_one_out":
            return [each * len(numbers) / (len(numbers) - 1) for each in deviations]


def _reward(value: Any, path: str) -> float:
    reward = check_finite(value, path)
    if abs(reward) > LARGEST_REWARD:
        raise InputError(path, f"must not be beyond {LARGEST_REWARD:g}; got {value!r}")
    return reward


def _differ(numbers: list[float]) -> bool:
    """Whether there are differences to learn from."""
    if len(numbers) < 2:
        return False
    largest = max(map(abs, numbers))
    return max(numbers) - min(numbers) > SMALLEST_SPREAD * max(1.0, largest)

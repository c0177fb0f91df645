"""The options of a stream of rollouts, and their rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

from msgspec import Struct
from msgspec.structs import replace

from .._arguments import check, check_at_least, check_positive
from ..errors import InputError
from ..protocol import check_checkpoint_name
from .advantages import AdvantageMethod
from .failures import FailurePolicy

__all__ = ["Advantages", "Options", "Unit", "check_options", "members_needed"]

Unit: TypeAlias = Literal["episode", "group"]
"""What one call of a rollout makes: one member of a group, or all of them."""

Advantages: TypeAlias = AdvantageMethod | Callable[[list[float]], Sequence[float]]
"""How the rewards of a group become advantages."""


class Options(Struct, frozen=True, kw_only=True):
    """The arguments of `TrainingClient.rollouts` that are plain values; that describes them."""

    group_size: int
    groups_per_step: int
    max_staleness: int = 1
    run_ahead: int | None = None
    minibatches: int = 1
    unit: Unit = "episode"
    advantages: Advantages = "centered"
    keep_constant_groups: bool = False
    mask_truncated: bool = False
    on_failure: FailurePolicy = FailurePolicy()
    episode_timeout: float | None = None
    max_episode_tokens: int | None = None
    drop_last: bool = False
    seed: int | None = None
    name: str = "policy"


def check_options(options: Options) -> None:
    """Raise `InputError` if an option breaks a rule; the gate checks `max_staleness` and `run_ahead`."""
    check_at_least(options.group_size, 1, "group_size")
    check_at_least(options.groups_per_step, 1, "groups_per_step")
    check_at_least(options.minibatches, 1, "minibatches")
    if options.groups_per_step % options.minibatches:
        raise InputError(
            "minibatches", f"must divide groups_per_step={options.groups_per_step}; got {options.minibatches}"
        )
    _check_choice(options.unit, get_args(Unit), "unit")
    if not callable(options.advantages):
        _check_choice(options.advantages, get_args(AdvantageMethod), "advantages", "or a function of a group's rewards")
    check_failure_policy(options.on_failure, options.group_size)
    if options.episode_timeout is not None:
        check_positive(options.episode_timeout, "episode_timeout")
    if options.max_episode_tokens is not None:
        check_at_least(options.max_episode_tokens, 2, "max_episode_tokens")
    if options.seed is not None:
        check_at_least(options.seed, 0, "seed")
    check_checkpoint_name(options.name)


def check_failure_policy(policy: FailurePolicy, group_size: int) -> None:
    """Raise `InputError` unless `policy` is valid, and possible for groups of `group_size`."""
    if not isinstance(policy, FailurePolicy):
        raise InputError("on_failure", f"expected a FailurePolicy, got {type(policy).__name__}")
    check(replace(policy, retry_on=()), path="on_failure")  # classes are no plain values; the policy has checked them
    if policy.min_group_size is not None and policy.min_group_size > group_size:
        raise InputError(
            "on_failure.min_group_size", f"must be at most group_size={group_size}; got {policy.min_group_size}"
        )


def members_needed(policy: FailurePolicy, group_size: int) -> int:
    """Return how many members of a group must be complete for it to count."""
    return group_size if policy.min_group_size is None else min(policy.min_group_size, group_size)


def _check_choice(value: Any, choices: Sequence[str], path: str, others: str = "") -> None:
    if value not in choices:
        named = " ".join(filter(None, (", ".join(map(repr, choices)), others)))
        raise InputError(path, f"must be one of {named}; got {value!r}")

"""Advantages of a group."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loops_async import AdvantageMethod, InputError, group_advantages

METHODS: tuple[AdvantageMethod, ...] = get_args(AdvantageMethod)
every_method = pytest.mark.parametrize("method", METHODS)

rewards = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=16)


def spread(numbers: list[float]) -> float:
    return max(numbers) - min(numbers)


@given(rewards)
def test_centered_is_the_difference_from_the_mean(rewards: list[float]) -> None:
    assume(spread(rewards) > 1e-5)
    mean = sum(map(Fraction, rewards)) / len(rewards)
    exact = [float(Fraction(reward) - mean) for reward in rewards]
    assert group_advantages(rewards) == pytest.approx(exact, rel=1e-9, abs=1e-9)


@given(rewards, st.floats(0.0, 1.0))
def test_standardized_divides_by_the_deviation(rewards: list[float], epsilon: float) -> None:
    assume(spread(rewards) > 1e-5)
    scale = statistics.pstdev(rewards) + epsilon
    expected = [each / scale for each in group_advantages(rewards)]
    assert group_advantages(rewards, "standardized", epsilon=epsilon) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(rewards)
def test_leave_one_out_compares_with_the_others(rewards: list[float]) -> None:
    assume(spread(rewards) > 1e-5)
    exact = list(map(Fraction, rewards))
    others = [(sum(exact) - one) / (len(exact) - 1) for one in exact]
    expected = [float(one - other) for one, other in zip(exact, others, strict=True)]
    given = group_advantages(rewards, "leave_one_out")
    assert given == pytest.approx(expected, rel=1e-9, abs=1e-9)
    n = len(rewards)
    centered = [each * n / (n - 1) for each in group_advantages(rewards)]
    assert given == pytest.approx(centered, rel=1e-12)


@every_method
@given(value=st.floats(-1e9, 1e9), size=st.integers(1, 16), noise=st.randoms(use_true_random=False))
def test_rewards_that_differ_by_rounding_teach_exactly_nothing(
    method: AdvantageMethod, value: float, size: int, noise: Any
) -> None:
    rewards = [value * (1.0 + noise.uniform(-1e-10, 1e-10)) for _ in range(size)]
    assert group_advantages(rewards, method) == [0.0] * size


@every_method
def test_too_few_to_compare(method: AdvantageMethod) -> None:
    assert group_advantages([], method) == []
    assert group_advantages([3.0], method) == [0.0]


def test_a_small_difference_above_a_large_offset_is_kept() -> None:
    # By E[x^2] - E[x]^2 the variance would be 0 or negative: 1e16 has no room for a quarter.
    assert group_advantages([1e8, 1e8 + 1.0], "standardized", epsilon=0.0) == [-1.0, 1.0]


@every_method
def test_advantages_are_finite_for_the_largest_rewards(method: AdvantageMethod) -> None:
    assert all(map(math.isfinite, group_advantages([-1e150, 1e150, 0.0], method)))


@pytest.mark.parametrize("given", [(0.0, 1.0), np.array([0.0, 1.0]), [np.float32(0), np.float32(1)], [False, True]])
def test_rewards_of_every_kind(given: Any) -> None:
    advantages = group_advantages(given)
    assert advantages == [-0.5, 0.5]
    assert {type(each) for each in advantages} == {float}


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, None, "1", 1e151], ids=repr)
@every_method
def test_other_rewards_are_refused_by_name(method: AdvantageMethod, wrong: Any) -> None:
    with pytest.raises(InputError) as refused:
        group_advantages([0.0, wrong], method)
    assert refused.value.path == "rewards[1]"


@pytest.mark.parametrize("rewards", [None, 1.0])
def test_what_is_no_list_is_refused(rewards: Any) -> None:
    with pytest.raises(InputError, match="rewards: expected a list or an array, got"):
        group_advantages(rewards)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(InputError, match="method: must be one of centered, standardized, leave_one_out; got 'grpo'"):
        group_advantages([0.0, 1.0], "grpo")  # type: ignore[arg-type]


@pytest.mark.parametrize("epsilon", [-1e-4, math.nan])
def test_epsilon_must_not_be_negative(epsilon: float) -> None:
    with pytest.raises(InputError, match="epsilon"):
        group_advantages([0.0, 1.0], "standardized", epsilon=epsilon)

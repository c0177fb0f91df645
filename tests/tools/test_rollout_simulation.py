"""The simulation of asynchronous RL: the real stream keeps its bound, and reaches what it promises."""

from __future__ import annotations

import logging
import math
import statistics
from statistics import NormalDist

import pytest

from benchmarks.rollouts import WAYS, Way, simulate
from benchmarks.simulated import LONGEST, MEDIAN, SIGMA, Service

STEPS = 24
POINTS = 0.03


def way(name: str) -> Way:
    return next(each for each in WAYS if each.name == name)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "loops_async")  # waiting for half a minute is normal here


@pytest.mark.parametrize("name", ["max_staleness=4", "run_ahead=2, max_staleness=8"])
def test_the_stream_reaches_what_was_promised(name: str) -> None:
    result = simulate(way(name), steps=STEPS, seed=2)
    assert result.of_bound >= way(name).prototype - POINTS
    assert result.staleness_max <= way(name).max_staleness


def test_equal_runs_have_equal_results() -> None:
    first, second, other = (simulate(way("max_staleness=2"), steps=2, warm_up=1, seed=seed) for seed in (0, 0, 1))
    assert first == second
    assert first != other


def test_a_generation_takes_as_long_as_it_should() -> None:
    normal, cut = NormalDist(), math.log(LONGEST / MEDIAN) / SIGMA
    below = MEDIAN * math.exp(SIGMA**2 / 2) * normal.cdf(cut - SIGMA)
    assert below + LONGEST * (1 - normal.cdf(cut)) == pytest.approx(1.0, abs=1e-3), "the mean of the cut lognormal"
    seconds = [Service().generation_seconds(seed) for seed in range(2_000)]
    assert max(seconds) == 33.0 * LONGEST
    assert statistics.median(seconds) == pytest.approx(33.0 * MEDIAN, rel=0.1)

"""`Adaptive` on the simulated samplers of its benchmark, in virtual time."""

from __future__ import annotations

import pytest

from benchmarks.adaptive import SAMPLERS, SPEED, TARGET, Sampler, simulate
from loops_async import Adaptive


@pytest.mark.parametrize("kind", SAMPLERS)
def test_an_adaptive_limit_is_almost_as_fast_as_the_best_fixed_one(kind: type[Sampler]) -> None:
    before, after = simulate(kind, 64, Adaptive()).rates

    # No fixed limit is faster than the sampler with as many sequences as it has places.
    assert before >= TARGET * 64 * SPEED
    assert after >= TARGET * 32 * SPEED

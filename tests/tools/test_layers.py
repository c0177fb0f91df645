"""The layers that `benchmarks.layers` replaces; the benchmark itself runs by hand."""

from __future__ import annotations

from operator import attrgetter

import pytest

from benchmarks.layers import LAYERS
from loops_async import sampling


@pytest.mark.parametrize("name", LAYERS["all of these"])
def test_every_layer_exists(name: str) -> None:
    assert callable(attrgetter(name)(sampling))

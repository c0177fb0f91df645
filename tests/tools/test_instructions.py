"""The verdict on the instructions of the hot paths; CI runs the counting itself."""

from __future__ import annotations

import pytest

from benchmarks.instructions import verdict


@pytest.mark.parametrize(("ratio", "is_dearer"), [(1.0, False), (1.14, False), (1.16, True)])
def test_a_path_that_is_over_15_percent_dearer_is_refused(ratio: float, is_dearer: bool) -> None:
    lines, refused = verdict({"sample": ratio, "batch": 2.0}, {"sample": 1.0, "batch": 2.0})
    assert refused is is_dearer
    assert [("DEARER" in line) for line in lines] == [is_dearer, False]
    assert f"{ratio:.3f}" in lines[0], "both numbers are told"
    assert "1.000" in lines[0]

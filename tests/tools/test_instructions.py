"""The verdict on the instructions of the hot paths; CI runs the counting itself."""

from __future__ import annotations

import pytest

from benchmarks.instructions import verdict


@pytest.mark.parametrize(("ratio", "has_grown"), [(1.0, False), (1.14, False), (1.16, True)])
def test_a_path_that_grew_by_over_15_percent_is_refused(ratio: float, has_grown: bool) -> None:
    lines, refused = verdict({"sample": ratio, "batch": 2.0}, {"sample": 1.0, "batch": 2.0})
    assert refused is has_grown
    assert [("GROWN" in line) for line in lines] == [has_grown, False]
    assert f"{ratio:.3f}" in lines[0], "the line has both numbers"
    assert "1.000" in lines[0]

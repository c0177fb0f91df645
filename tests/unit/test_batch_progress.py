"""The line that says how far a batch is."""

from __future__ import annotations

from loops_async import BatchReport
from loops_async._batch.progress import progress_line


def test_a_line_has_the_rate_of_the_last_minute_and_the_time_left() -> None:
    reading, before = BatchReport(), BatchReport(rows=9_000, already=500, answered=990, failed=10)
    now = BatchReport(rows=9_000, already=500, answered=3_980, failed=20)
    assert progress_line(reading, before, 60.0) == "990 of 9,000 prompts answered, 10 failed"
    assert progress_line(before, now, 60.0) == (
        "3,980 of 9,000 prompts answered, 20 failed; 50.0 a second, about 0:01:40 left"
    )
    assert progress_line(now, now, 60.0) == "3,980 of 9,000 prompts answered, 20 failed; none in the last 60 s"

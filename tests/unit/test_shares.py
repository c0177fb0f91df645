"""The law of a limit that workers share, without the engine that carries the reports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops_async import Adaptive, InputError
from loops_async._ray.shares import SILENT_SECONDS, Report, Shares


class Worker:
    """A worker that follows its share: it begins as much as that allows, and ends what it is told to."""

    def __init__(self, shares: Shares, name: str, wanted: int) -> None:
        self.shares = shares
        self.name = name
        self.wanted = wanted
        self.share = 0
        self.in_flight = 0

    def report(self, now: float) -> None:
        waiting = max(0, self.wanted - self.in_flight)
        self.share = self.shares.report(self.name, Report(self.share, self.in_flight, waiting), now)

    def begin(self) -> None:
        self.in_flight = max(self.in_flight, min(self.share, self.wanted))

    def end(self, count: int) -> None:
        self.in_flight = max(0, self.in_flight - count)


@given(
    limit=st.integers(4, 40),
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 30)), max_size=60),
)
def test_workers_together_never_exceed_the_limit(limit: int, steps: list[tuple[int, int, int]]) -> None:
    shares = Shares(limit, workers=4)
    workers = [Worker(shares, str(number), wanted=10) for number in range(4)]
    for now, (number, ended, wanted) in enumerate(steps):
        worker = workers[number]
        for each in workers:  # none is silent, but only one has news
            each.report(now)
            each.begin()
            assert sum(one.in_flight for one in workers) <= limit
        worker.end(ended)
        worker.wanted = wanted
    assert sum(shares.places.values()) <= limit


def test_the_limit_goes_where_the_work_is() -> None:
    shares = Shares(20, workers=2)
    busy, idle = Worker(shares, "busy", wanted=100), Worker(shares, "idle", wanted=100)
    busy.report(0)
    busy.begin()
    idle.report(1)
    busy.report(1)
    assert (busy.share, busy.in_flight, idle.share) == (10, 19, 1)  # what is in flight is not granted to the other one
    busy.end(9)
    busy.report(2)
    idle.report(2)
    idle.begin()
    assert (busy.in_flight, idle.in_flight) == (10, 10)
    idle.wanted = 0
    idle.end(100)
    for now in (6, 7):
        idle.report(now)
        busy.report(now)
    assert busy.share >= 18
    assert idle.share == 1


def test_a_worker_that_is_silent_loses_its_share() -> None:
    shares = Shares(20, workers=2)
    gone, left = Worker(shares, "gone", wanted=100), Worker(shares, "left", wanted=100)
    for now in range(4):
        left.report(now)
        gone.report(now)
    left.report(3 + SILENT_SECONDS)
    assert left.share == 10
    left.report(3.1 + SILENT_SECONDS)
    assert left.share == 19  # one place is for the worker that takes its place
    new = Worker(shares, "new", wanted=100)
    new.report(9)
    assert new.share == 1


def test_an_adaptive_limit_follows_all_workers() -> None:
    shares = Shares(Adaptive(initial=8, minimum=2, maximum=64), workers=2)
    now = 0.0
    names = ("a", "b")
    share = dict.fromkeys(names, 0)
    for _ in range(60):  # each sequence takes one second, however many there are: more are always better
        now += 0.5
        for name in names:
            finished = ((1, 10, 1.0),) * (share[name] // 2)
            share[name] = shares.report(name, Report(share[name], share[name], 100, finished), now)
    assert shares.limit > 32
    before = shares.limit
    shares.report("a", Report(share["a"], share["a"], 100, (), 1), now)
    assert shares.limit < before


@pytest.mark.parametrize("limit", [1, Adaptive(initial=1, maximum=1)])
def test_each_worker_has_a_place(limit: int | Adaptive) -> None:
    with pytest.raises(InputError, match="limit: must be at least the number of workers, 2"):
        Shares(limit, workers=2)

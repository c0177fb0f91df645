"""The limit of sequences in flight: order, conservation, cancellation, event loops, and what an adaptive limit does."""

from __future__ import annotations

import asyncio
import random
from heapq import heappop, heappush
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from loops_async import Adaptive, ApiError, ConfigError, InputError, Limiter
from loops_async._sampling.adaptive import HillClimb
from loops_async._sampling.limiter import report_rejection, slots


class Request:
    """A request that holds its places until it is told to end."""

    def __init__(self, limiter: Limiter, loop: asyncio.AbstractEventLoop, count: int, key: tuple[int, int]) -> None:
        self.count = count
        self.key = key
        self.is_admitted = False
        self.end = asyncio.Event()
        self.task = loop.create_task(self._run(limiter))

    async def _run(self, limiter: Limiter) -> None:
        async with slots(limiter, self.count, priority=self.key[0]):
            self.is_admitted = True
            await self.end.wait()


class LimiterMachine(RuleBasedStateMachine):
    """Requests come, end, and are cancelled at any moment, also between the end of one and the start of the next."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.SelectorEventLoop()
        self.limiter = Limiter(5)
        self.live: list[Request] = []
        self.arrivals = 0

    def teardown(self) -> None:
        for request in self.live:
            request.task.cancel()
        self.settle()
        assert (self.limiter.in_flight, self.limiter.waiting) == (0, 0)
        self.loop.close()

    def settle(self) -> None:
        before = [request for request in self.live if request.is_admitted]

        self.loop.run_until_complete(asyncio.sleep(0))
        while self.loop._ready:  # type: ignore[attr-defined]  # until nothing more happens by itself
            self.loop.run_until_complete(asyncio.sleep(0))
        self.live = [request for request in self.live if not request.task.done()]
        admitted = [request.key for request in self.live if request.is_admitted and request not in before]
        waiting = [request.key for request in self.live if not request.is_admitted]
        assert all(one < other for one in admitted for other in waiting)

    @rule(target=requests, count=st.integers(1, 7), priority=st.integers(-1, 3))
    def arrive(self, count: int, priority: int) -> Request:
        self.arrivals += 1
        request = Request(self.limiter, self.loop, count, (priority, self.arrivals))
        self.live.append(request)
        self.settle()
        return request

    @rule(request=consumes(requests))
    def finish(self, request: Request) -> None:
        request.end.set()
        self.settle()

    @rule(request=consumes(requests))
    def cancel(self, request: Request) -> None:
        request.task.cancel()
        self.settle()

    @precondition(lambda self: self.limiter.waiting)
    @rule(cancelled=st.integers(1, 3), turns=st.integers(0, 2))
    def cancel_those_to_whom_places_pass(self, cancelled: int, turns: int) -> None:
        ending = next(request for request in self.live if request.is_admitted)
        waiting = sorted((request for request in self.live if not request.is_admitted), key=lambda one: one.key)

        async def pass_turns_and_cancel() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            for request in waiting[:cancelled]:
                request.task.cancel()

        ending.end.set()
        self.loop.run_until_complete(pass_turns_and_cancel())
        self.settle()

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        held = [request.count for request in self.live if request.is_admitted]
        waiting = sorted((request.key, request.count) for request in self.live if not request.is_admitted)
        assert self.limiter.in_flight == sum(held)
        assert self.limiter.waiting == sum(count for _, count in waiting)
        assert sum(held) <= 5 or len(held) == 1
        if waiting:  # the first does not fit
            assert held
            assert sum(held) + waiting[0][1] > 5


TestLimiterMachine: Any = LimiterMachine.TestCase
TestLimiterMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


async def test_a_request_that_is_larger_than_the_limit_runs_alone() -> None:
    limiter = Limiter(2)

    async with slots(limiter, 5):
        small = asyncio.create_task(_enter_and_leave(limiter, 1))
        await asyncio.sleep(0)
        assert (limiter.in_flight, limiter.waiting) == (5, 1)
    await small
    assert (limiter.in_flight, limiter.waiting) == (0, 0)


async def _enter_and_leave(limiter: Limiter, count: int) -> None:
    async with slots(limiter, count):
        pass


def test_a_limiter_serves_one_event_loop_after_the_other() -> None:
    limiter = Limiter(1)
    for _ in range(2):
        asyncio.run(_enter_and_leave(limiter, 1))


def test_a_limiter_that_is_in_use_in_another_event_loop_says_so() -> None:
    limiter = Limiter(1)

    async def main() -> None:
        async with slots(limiter, 1):
            with pytest.raises(ConfigError, match="in use in another event loop; give each event loop a Limiter"):
                await asyncio.to_thread(asyncio.run, _enter_and_leave(limiter, 1))

    asyncio.run(main())
    assert limiter.in_flight == 0


def test_places_of_a_loop_that_was_closed_are_free() -> None:
    limiter = Limiter(1)
    loop = asyncio.new_event_loop()
    held = slots(limiter, 1)
    loop.run_until_complete(held.__aenter__())
    loop.close()

    async def main() -> None:
        async with slots(limiter, 1):
            await held.__aexit__(None, None, None)  # as garbage collection does
            assert limiter.in_flight == 1

    asyncio.run(main())
    assert limiter.in_flight == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (0, "limit: must be a whole number of at least 1; got 0"),
        ("8", "limit: must be a whole number of at least 1; got '8'"),
        (Adaptive(initial=0), r"limit.initial: expected `int` >= 1; got 0"),
        (Adaptive(minimum=9, maximum=8), "limit.minimum: must not exceed maximum=8; got 9"),
    ],
)
def test_limits_that_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Limiter(wrong)


def test_an_initial_limit_outside_the_bounds_is_moved_to_them() -> None:
    assert Limiter(Adaptive(maximum=8)).limit == 8
    assert Limiter(Adaptive(minimum=32)).limit == 32


async def test_rejections_are_counted_where_they_happen() -> None:
    fixed, adaptive = Limiter(8), Limiter(Adaptive(initial=100))
    report_rejection(ApiError("nobody holds a place", status=429))

    async with slots(fixed, 1):
        report_rejection(ApiError("busy", status=429))
        async with slots(adaptive, 1):
            report_rejection(ApiError("busy", status=503))
            report_rejection(ApiError("busy", status=429))
        report_rejection(ApiError("broken", status=500))

    assert (fixed.rejections, fixed.limit) == (1, 8)
    assert (adaptive.rejections, adaptive.limit) == (2, 85)  # one overload


class Simulated:
    """A sampler all of whose sequences share its rate equally and have 50 to 150 tokens.

    There are always enough requests, of `count` sequences each, for `demand` sequences to be in flight.
    """

    def __init__(self, adaptive: Adaptive, *, count: int = 1, demand: int = 10_000) -> None:
        self.climb = HillClimb(adaptive)
        self.count = count
        self.demand = demand
        self.now = self.generated = 0.0
        self.flying: list[tuple[float, int, float]] = []
        self.random = random.Random(0)

    def run(self, rate: Any, requests: int) -> None:
        """Let this many requests finish; `rate` is that of a number of sequences."""
        for _ in range(requests):
            while not self.flying or self.in_flight + self.count <= min(self.climb.limit, self.demand):
                self.occupied()
                tokens = self.random.randint(50, 150)
                heappush(self.flying, (self.generated + tokens, tokens, self.climb.clock))
            end, tokens, began = self.flying[0]
            self.now += (end - self.generated) * self.in_flight / rate(self.in_flight)
            self.generated = end
            self.occupied()
            heappop(self.flying)
            self.climb.finished(self.count, tokens * self.count, began)

    @property
    def in_flight(self) -> int:
        return len(self.flying) * self.count

    def occupied(self) -> None:
        self.climb.occupied(self.now, self.in_flight, max(0, self.demand - self.in_flight))


def queueing(capacity: int) -> Any:
    return lambda in_flight: float(min(in_flight, capacity))


def thrashing(capacity: int) -> Any:
    return lambda in_flight: in_flight if in_flight <= capacity else capacity * capacity / in_flight


@pytest.mark.parametrize("sampler", [queueing, thrashing])
@pytest.mark.parametrize("capacity", [3, 40, 700])
def test_an_adaptive_limit_finds_the_capacity(sampler: Any, capacity: int) -> None:
    simulated = Simulated(Adaptive())

    simulated.run(sampler(capacity), 60 * (capacity + 16))

    assert 0.8 * capacity - 1 <= simulated.climb.limit <= 1.3 * capacity + 1


@pytest.mark.parametrize("sampler", [queueing, thrashing])
@pytest.mark.parametrize(("before", "after"), [(100, 40), (40, 100)])
def test_an_adaptive_limit_follows_a_change(sampler: Any, before: int, after: int) -> None:
    simulated = Simulated(Adaptive(initial=before))

    simulated.run(sampler(before), 2000)
    simulated.run(sampler(after), 6000)

    assert 0.8 * after <= simulated.climb.limit <= 1.3 * after


def test_an_adaptive_limit_counts_whole_requests() -> None:
    simulated = Simulated(Adaptive(), count=8)

    simulated.run(queueing(120), 600)

    assert 96 <= simulated.climb.limit <= 150


def test_a_limit_that_is_not_reached_stays() -> None:
    simulated = Simulated(Adaptive(), demand=8)

    simulated.run(queueing(64), 1000)

    assert simulated.climb.limit == 16


@pytest.mark.parametrize("demand", [80, 100, 128, 140])
def test_few_requests_do_not_keep_a_limit_that_is_too_large(demand: int) -> None:
    simulated = Simulated(Adaptive(), demand=demand)

    simulated.run(thrashing(40), 4000)

    assert 32 <= simulated.climb.limit <= 53


def test_an_adaptive_limit_keeps_its_bounds() -> None:
    low, high = Simulated(Adaptive(minimum=10, initial=20)), Simulated(Adaptive(maximum=50))

    low.run(queueing(2), 500)
    high.run(queueing(500), 500)

    assert (low.climb.limit, high.climb.limit) == (10, 50)


def test_one_overload_shrinks_the_limit_once() -> None:
    simulated = Simulated(Adaptive(initial=100))
    for _ in range(20):
        simulated.climb.rejected()
    assert simulated.climb.limit == 85

    simulated.run(queueing(10), 90)  # all that were in flight have finished
    before = simulated.climb.limit
    simulated.climb.rejected()

    assert simulated.climb.limit < before

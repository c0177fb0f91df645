"""The gate: places, their order, and that none trains too late."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from loops_async import ClosedError, GateState, InputError, RolloutError, StalenessGate, Ticket


def admitted(gate: StalenessGate, count: int) -> list[Ticket]:
    tickets = [gate.try_admit() for _ in range(count)]
    assert None not in tickets
    return [ticket for ticket in tickets if ticket is not None]


def accepted(gate: StalenessGate, count: int) -> list[Ticket]:
    tickets = admitted(gate, count)
    for ticket in tickets:
        ticket.accept()
    return tickets


# --- places ---


def test_places_are_those_that_run_ahead_allows() -> None:
    gate = StalenessGate(groups_per_step=4, max_staleness=2, run_ahead=1)
    assert gate.capacity == 8
    admitted(gate, 8)
    assert (gate.capacity, gate.try_admit()) == (0, None)


def test_run_ahead_is_the_bound_unless_given() -> None:
    assert StalenessGate(groups_per_step=4, max_staleness=2).capacity == 12
    assert StalenessGate(groups_per_step=4, max_staleness=0).capacity == 4


def test_what_ends_without_training_gives_its_place_back() -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=1)
    first, second = admitted(gate, 2)
    first.drop()
    assert gate.capacity == 1
    second.fail()
    assert gate.capacity == 2
    admitted(gate, 1)[0].accept()
    assert gate.capacity == 1
    assert (gate.submitted, gate.accepted, gate.dropped, gate.failed, gate.running) == (3, 1, 1, 1, 0)


def test_publishing_makes_places() -> None:
    gate = StalenessGate(groups_per_step=2, max_staleness=0)
    accepted(gate, 2)
    assert gate.take(2) is not None
    assert (gate.step, gate.version, gate.capacity) == (1, 0, 0)
    gate.publish()
    assert (gate.step, gate.version, gate.capacity) == (1, 1, 2)
    assert [ticket.version for ticket in admitted(gate, 2)] == [1, 1]


def test_publishing_names_steps_that_were_handed_out() -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=2)
    accepted(gate, 3)
    for _ in range(2):
        gate.take(1)
    gate.publish(1)
    assert gate.version == 1
    gate.publish(0)
    assert gate.version == 1, "weights that come late do not take places away"
    with pytest.raises(InputError, match="step: must be at most 2, the steps handed out; got 3"):
        gate.publish(3)


@pytest.mark.parametrize("first", [Ticket.accept, Ticket.drop, Ticket.fail])
@pytest.mark.parametrize("second", [Ticket.accept, Ticket.drop, Ticket.fail])
def test_a_group_ends_once(first: Callable[[Ticket], None], second: Callable[[Ticket], None]) -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=1)
    ticket = admitted(gate, 1)[0]
    first(ticket)
    numbers = (gate.submitted, gate.accepted, gate.dropped, gate.failed, gate.running, gate.capacity)
    with pytest.raises(RolloutError, match="has ended before"):
        second(ticket)
    assert numbers == (gate.submitted, gate.accepted, gate.dropped, gate.failed, gate.running, gate.capacity)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"groups_per_step": 0}, "groups_per_step"),
        ({"groups_per_step": 1.5}, "groups_per_step"),
        ({"max_staleness": -1}, "max_staleness"),
        ({"run_ahead": -1}, "run_ahead"),
        ({"run_ahead": 3}, "run_ahead"),
        ({"state": {"version": 1}}, "state"),
        ({"state": GateState(version=-1)}, "state.version"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], path: str) -> None:
    with pytest.raises(InputError) as refused:
        StalenessGate(**({"groups_per_step": 1, "max_staleness": 2} | arguments))
    assert refused.value.path == path


# --- batches ---


def test_the_oldest_finished_groups_come_first() -> None:
    gate = StalenessGate(groups_per_step=2, max_staleness=1)
    first, second, third, fourth = admitted(gate, 4)
    for ticket in (fourth, second, third):
        ticket.accept()
    assert gate.take(2) == [second, third]
    gate.publish()
    fifth = admitted(gate, 1)[0]
    fifth.accept()
    first.accept()
    assert gate.take(2) == [first, fourth]


def test_a_slow_group_is_waited_for_when_its_last_step_has_come() -> None:
    gate = StalenessGate(groups_per_step=2, max_staleness=1)
    slow, *others = admitted(gate, 4)
    for ticket in others:
        ticket.accept()
    assert gate.take(2) == others[:2], "there is a place in the next step"
    gate.publish()
    accepted(gate, 2)
    assert gate.take(2) is None, "step 1 is the last one for version 0"
    slow.accept()
    assert gate.take(2) == [slow, others[2]]


def test_groups_due_later_count_as_well() -> None:
    """Two due now and two due at the next step, with one place too few: a take that looked at `now` would fit."""
    gate = StalenessGate(groups_per_step=2, max_staleness=2)
    slow = admitted(gate, 3)
    ready = accepted(gate, 3)
    assert gate.take(2) == ready[:2]
    # Four groups of version 0 are left, and exactly the four places of steps 1 and 2.
    gate.publish()
    accepted(gate, 2)
    assert gate.take(2) is None
    slow[0].accept()
    assert gate.take(2) == [slow[0], ready[2]]


def test_a_step_may_be_handed_out_in_parts() -> None:
    gate = StalenessGate(groups_per_step=4, max_staleness=0)
    first, second, third, fourth = admitted(gate, 4)
    third.accept()
    assert gate.take(1) == [third]
    assert gate.step == 0
    with pytest.raises(InputError, match="count: must be at most 3, the groups that the step still needs; got 4"):
        gate.take(4)
    for ticket in (second, first, fourth):
        ticket.accept()
    assert gate.take(2) == [first, second]
    assert gate.take(1) == [fourth]
    assert gate.step == 1


def test_at_the_end_of_the_data_fewer_will_do() -> None:
    gate = StalenessGate(groups_per_step=4, max_staleness=1)
    running, *ready = admitted(gate, 3)
    for ticket in ready:
        ticket.accept()
    assert gate.take(4) is None
    assert gate.take(4, flush=True) is None, "one still runs"
    running.drop()
    assert gate.take(4) is None
    assert gate.take(4, flush=True) == ready
    assert gate.step == 1, "so the step has ended"
    assert gate.take(4, flush=True) is None, "and nothing is left"


def test_the_last_part_of_the_data_ends_its_step() -> None:
    gate = StalenessGate(groups_per_step=4, max_staleness=0)
    ready = accepted(gate, 2)
    assert gate.take(1, flush=True) == ready[:1]
    assert gate.step == 0
    assert gate.take(1, flush=True) == ready[1:]
    assert gate.step == 1


def test_a_short_step_leaves_no_places_behind() -> None:
    """Otherwise more groups of a version were admitted than its steps can hold, and one would be too late."""
    gate = StalenessGate(groups_per_step=4, max_staleness=0)
    accepted(gate, 1)
    assert gate.take(4, flush=True) is not None
    gate.publish()
    assert gate.capacity == 4


# --- waiting ---


async def settled() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_first_come_first_served() -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=0)
    ticket = await gate.admit()
    waiting = [asyncio.create_task(gate.admit()) for _ in range(3)]
    for waiter in waiting:
        await settled()
        assert not waiter.done()
        ticket.drop()
        assert gate.try_admit() is None, "those that wait come first"
        ticket = await waiter
    assert gate.running == 1


async def test_a_call_that_waited_gets_the_version_of_its_admission() -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=0)
    (await gate.admit()).accept()
    waiter = asyncio.create_task(gate.admit())
    await settled()
    gate.take(1)
    gate.publish()
    assert (await waiter).version == 1


@pytest.mark.parametrize("is_woken", [False, True])
async def test_a_cancelled_call_takes_no_place(*, is_woken: bool) -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=0)
    ticket = await gate.admit()
    first, second = (asyncio.create_task(gate.admit()) for _ in range(2))
    await settled()
    if is_woken:
        ticket.drop()
        first.cancel()
    else:
        first.cancel()
        await settled()
        ticket.drop()
    await asyncio.wait([first])
    assert first.cancelled()
    (await second).drop()
    assert (gate.submitted, gate.dropped, gate.running, gate.capacity) == (2, 2, 0, 1)


async def test_closing_ends_all_waiting() -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=0)
    ticket = await gate.admit()
    waiter = asyncio.create_task(gate.admit())
    await settled()
    gate.close()
    gate.close()
    with pytest.raises(ClosedError, match="the gate is closed"):
        await waiter
    with pytest.raises(ClosedError):
        await gate.admit()
    ticket.accept()
    assert gate.try_admit() is None
    assert gate.take(1) == [ticket], "what is finished can be trained"


async def test_other_threads_may_end_groups() -> None:
    gate = StalenessGate(groups_per_step=8, max_staleness=0)
    count = 2000

    async def group(executor: ThreadPoolExecutor) -> None:
        ticket = await gate.admit()
        await asyncio.get_running_loop().run_in_executor(executor, ticket.drop)

    with ThreadPoolExecutor(4) as executor:
        async with asyncio.timeout(60):
            await asyncio.gather(*(group(executor) for _ in range(count)))
    assert (gate.submitted, gate.dropped, gate.capacity) == (count, count, 8)


async def test_a_loop_that_has_closed_takes_no_place() -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=0)
    ticket = await gate.admit()

    kept: list[Any] = []
    loop = asyncio.new_event_loop()

    async def begin() -> None:
        call = gate.admit()
        call.send(None)
        kept.append(call)

    thread = threading.Thread(target=lambda: loop.run_until_complete(begin()))
    thread.start()
    await asyncio.to_thread(thread.join)
    loop.close()
    ticket.drop()
    assert gate.try_admit() is not None


# --- restarts ---


def test_a_restored_gate_counts_what_was_trained() -> None:
    gate = StalenessGate(groups_per_step=2, max_staleness=1)
    accepted(gate, 4)
    gate.take(2)
    gate.publish()
    admitted(gate, 1)[0].fail()
    admitted(gate, 1)[0].drop()
    gate.take(2)
    assert gate.state() == GateState(version=2, dropped=1, failed=1)

    restored = StalenessGate(groups_per_step=2, max_staleness=1, state=gate.state())
    assert (restored.version, restored.step, restored.accepted, restored.running) == (2, 2, 4, 0)
    assert restored.submitted == 6
    assert restored.capacity == 4, "as many as a new gate"
    assert admitted(restored, 1)[0].version == 2


# --- properties, from any state ---


class GateMachine(RuleBasedStateMachine):
    """Any program of any number of callers; the invariants are those of the contract's section 5."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.running: list[Ticket] = []
        self.calls: list[asyncio.Task[Ticket]] = []
        self.taken: set[Ticket] = set()
        self.in_step = 0

    def teardown(self) -> None:
        for call in self.calls:
            call.cancel()
        self.turn()
        self.loop.close()

    def turn(self) -> None:
        self.loop.run_until_complete(settled())
        kept = [call for call in self.calls if not (call.done() and call.cancelled())]
        admitted = [call.result() for call in kept if call.done()]
        self.calls = kept[len(admitted) :]
        assert not any(call.done() for call in self.calls), "the calls that have waited longest come first"
        self.running += admitted

    @initialize(per_step=st.integers(1, 4), max_staleness=st.integers(0, 3), data=st.data())
    def start(self, per_step: int, max_staleness: int, data: st.DataObject) -> None:
        self.per_step, self.max_staleness = per_step, max_staleness
        self.run_ahead = data.draw(st.integers(0, max_staleness))
        state = data.draw(st.none() | st.builds(GateState, version=st.integers(0, 5), failed=st.integers(0, 5)))
        self.gate = StalenessGate(
            groups_per_step=per_step, max_staleness=max_staleness, run_ahead=self.run_ahead, state=state
        )

    @rule()
    def try_to_admit(self) -> None:
        must = self.gate.capacity > 0 and not self.calls
        ticket = self.gate.try_admit()
        assert (ticket is not None) == must
        if ticket is not None:
            self.running.append(ticket)

    @rule()
    def call_admit(self) -> None:
        self.calls.append(self.loop.create_task(self.gate.admit()))
        self.turn()

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), first=st.sampled_from(["cancel", "give"]))
    def cancel_a_call_while_a_place_comes_free(self, data: st.DataObject, first: str) -> None:
        call = data.draw(st.sampled_from(self.calls))
        ending = data.draw(st.sampled_from(self.running)) if self.running else None
        if first == "cancel":
            call.cancel()
        if ending is not None:
            self.running.remove(ending)
            ending.drop()
        call.cancel()
        self.turn()
        assert call.cancelled()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), end=st.sampled_from([Ticket.accept, Ticket.accept, Ticket.drop, Ticket.fail]))
    def end_a_group(self, data: st.DataObject, end: Callable[[Ticket], None]) -> None:
        ticket = data.draw(st.sampled_from(self.running))
        self.running.remove(ticket)
        end(ticket)
        self.turn()

    @rule(steps=st.integers(1, 4), slow=st.integers(0, 2), publishes=st.booleans())
    def train_beside_slow_groups(self, steps: int, slow: int, *, publishes: bool) -> None:
        for _ in range(steps):
            while (ticket := self.gate.try_admit()) is not None:
                self.running.append(ticket)
            for ticket in reversed(self.running[slow:]):
                ticket.accept()
            del self.running[slow:]
            self.taking(self.per_step - self.in_step, flush=False)
            if publishes:
                self.gate.publish()
            self.turn()

    @rule(data=st.data(), flush=st.booleans())
    def take(self, data: st.DataObject, *, flush: bool) -> None:
        self.taking(data.draw(st.integers(1, self.per_step - self.in_step)), flush=flush)

    def taking(self, count: int, *, flush: bool) -> int:
        step = self.gate.step
        groups = self.gate.take(count, flush=flush)
        if groups is None:
            assert self.gate.step == step
            return 0
        assert 0 < len(groups) <= count
        assert len(groups) == count or (flush and not self.running)
        for ticket in groups:
            assert 0 <= step - ticket.version <= self.max_staleness
            assert ticket not in self.taken
            self.taken.add(ticket)
        self.in_step = 0 if self.gate.step > step else self.in_step + len(groups)
        return len(groups)

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        step = data.draw(st.none() | st.integers(0, self.gate.step))
        version = self.gate.version
        self.gate.publish(step)
        assert self.gate.version == max(version, self.gate.step if step is None else step)
        self.turn()

    @rule(data=st.data())
    def a_step_can_always_be_completed(self, data: st.DataObject) -> None:
        for ticket in data.draw(st.permutations(self.running)):
            ticket.accept()
        self.running.clear()
        self.gate.publish()
        self.turn()
        step = self.gate.step
        while self.gate.step == step:
            for ticket in self.running:
                ticket.accept()
            self.running.clear()
            while (ticket := self.gate.try_admit()) is not None:
                ticket.accept()
            self.turn()
            if not self.running:
                assert self.taking(self.per_step - self.in_step, flush=False)

    @invariant()
    def never_over_capacity(self) -> None:
        gate = self.gate
        assert gate.accepted + gate.running <= (self.run_ahead + gate.version + 1) * self.per_step
        assert gate.capacity >= 0
        assert not (self.calls and gate.capacity), "a call waits although there is a place"

    @invariant()
    def every_group_is_counted_once(self) -> None:
        gate = self.gate
        assert gate.submitted == gate.accepted + gate.dropped + gate.failed + gate.running
        assert gate.running == len(self.running)


def test_any_program_keeps_the_bounds() -> None:
    run_state_machine_as_test(GateMachine, settings=settings(max_examples=60, stateful_step_count=40))  # type: ignore[no-untyped-call]

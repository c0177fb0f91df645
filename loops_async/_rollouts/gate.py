"""How far rollouts may run ahead of training: places for groups, and the order in which groups are trained."""

from __future__ import annotations

import asyncio
import threading
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from .._arguments import check_at_least, check_kind
from .._values import Value
from ..errors import ClosedError, InputError, RolloutError

__all__ = ["GateState", "StalenessGate", "Ticket"]

_Count = Annotated[int, Meta(ge=0)]
_End = Literal["accepted", "dropped", "failed"]

_CLOSED: Final = "the gate is closed: no further group is admitted"


class GateState(Value, Struct, frozen=True, kw_only=True):
    """What continues over a restart: `version` is the number of steps handed out; `dropped` and `failed` are counts."""

    version: _Count = 0
    dropped: _Count = 0
    failed: _Count = 0


class Ticket:
    """The place of one group, from its admission to its end: exactly one of `accept`, `drop` and `fail` ends it.

    `version` is the gate's when the group was admitted, and `number` counts admissions from 0.
    """

    __slots__ = ("_settle", "number", "version")

    def __init__(self, settle: Callable[[Ticket, _End], None], version: int, number: int) -> None:
        self._settle = settle
        self.version: int = version
        self.number: int = number

    def accept(self) -> None:
        """Offer the finished group for training.

        Raises:
            RolloutError: the group has ended before; so do `drop` and `fail`.
        """
        self._settle(self, "accepted")

    def drop(self) -> None:
        """Give the place back: there is nothing to learn from the group."""
        self._settle(self, "dropped")

    def fail(self) -> None:
        """Give the place back: the group has failed."""
        self._settle(self, "failed")

    def __repr__(self) -> str:
        return f"<Ticket {self.number} of version {self.version}>"


class _Waiter:
    """One call of `admit` that waits for a place; the gate gives it a ticket and wakes it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.woken: asyncio.Future[None] = self._loop.create_future()
        self.ticket: Ticket | None = None

    def wake(self) -> bool:
        """Let the call continue, from any thread; False if its event loop is closed, and with it the call."""
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            return False
        return True

    def _wake(self) -> None:
        if not self.woken.done():
            self.woken.set_result(None)


class StalenessGate:
    """Bounds the age of the weights that sampled what is trained. It makes rollouts wait, and never discards any.

    Training goes in steps of `groups_per_step` groups. `step` counts the steps that were handed out (`take`), `version`
    those of them whose weights are published (`publish`); this is not the service's policy version. A group of version
    v, the gate's when it was admitted, is trained at a step from v to v + `max_staleness`:

    - It is admitted only while `capacity` = (run_ahead + version + 1) * groups_per_step - (accepted + running) is
      positive. So `run_ahead` sets the usual staleness.
    - `take` hands out the oldest finished groups, and waits for a slow group rather than let it become too old.

    Counters: `submitted` = `accepted` + `dropped` + `failed` + `running`. Any thread may use a gate and its tickets.

    Args:
        groups_per_step: groups in one training step, at least 1.
        max_staleness: the most steps that a group may be trained after those its weights have seen; 0: exactly
            on-policy.
        run_ahead: how many steps rollouts may be ahead of the published weights; `max_staleness` when None, and never
            more than it. Less keeps the usual staleness low and still waits for the slowest groups.
        state: continue from this state; groups that were admitted but not trained then have to be admitted again.

    Raises:
        InputError: an argument is not a whole number in its range.

    Example:
        ::

            gate = loops.StalenessGate(groups_per_step=2, max_staleness=1)
            for _ in range(2):
                ticket = await gate.admit()  # roll out a group, then:
                ticket.accept()
            groups = gate.take(2)  # train on them, publish the weights, then:
            gate.publish()
    """

    def __init__(
        self, *, groups_per_step: int, max_staleness: int, run_ahead: int | None = None, state: GateState | None = None
    ) -> None:
        self._groups_per_step: Final = check_at_least(groups_per_step, 1, "groups_per_step")
        self._max_staleness: Final = check_at_least(max_staleness, 0, "max_staleness")
        self._run_ahead: Final = check_at_least(max_staleness if run_ahead is None else run_ahead, 0, "run_ahead")
        if self._run_ahead > self._max_staleness:
            raise InputError(
                "run_ahead", f"must not be greater than max_staleness={self._max_staleness}; got {run_ahead}"
            )
        restored = GateState() if state is None else check_kind(state, GateState, "state")
        self._version = self._step = restored.version
        # A counter that restarted at 0 would let `version` more steps run ahead.
        self._ended: Counter[str] = Counter(
            accepted=restored.version * self._groups_per_step, dropped=restored.dropped, failed=restored.failed
        )
        self._running: set[Ticket] = set()
        self._finished: list[Ticket] = []
        """Accepted and not yet taken, oldest first."""
        self._taken = 0
        """Groups handed out of the current step."""
        self._unfilled = 0
        """Places of steps that ended short, at the end of the data."""
        self._admitted = 0
        self._waiters: deque[_Waiter] = deque()
        self._is_closed = False
        self._lock = threading.Lock()

    # --- numbers ---

    @property
    def version(self) -> int:
        """The steps whose weights are published."""
        return self._version

    @property
    def step(self) -> int:
        """The steps that were handed out whole."""
        return self._step

    @property
    def submitted(self) -> int:
        """All groups that were ever admitted."""
        with self._lock:
            return self._ended.total() + len(self._running)

    @property
    def accepted(self) -> int:
        """All groups that were ever accepted, also those already trained."""
        return self._ended["accepted"]

    @property
    def dropped(self) -> int:
        """All groups that were ever dropped."""
        return self._ended["dropped"]

    @property
    def failed(self) -> int:
        """All groups that have ever failed."""
        return self._ended["failed"]

    @property
    def running(self) -> int:
        """The groups that were admitted and have not ended."""
        with self._lock:
            return len(self._running)

    @property
    def capacity(self) -> int:
        """How many groups could be admitted now."""
        with self._lock:
            return self._capacity()

    def _capacity(self) -> int:
        places = (self._run_ahead + self._version + 1) * self._groups_per_step - self._unfilled
        return places - self._ended["accepted"] - len(self._running)

    # --- admission ---

    def try_admit(self) -> Ticket | None:
        """Admit a group now; None when there is no place or the gate is closed."""
        with self._lock:
            if self._is_closed or self._capacity() <= 0:
                return None
            return self._issue()

    async def admit(self) -> Ticket:
        """Admit a group as soon as there is a place: first come, first served.

        Raises:
            ClosedError: the gate is closed, or was closed meanwhile.
        """
        with self._lock:
            if self._is_closed:
                raise ClosedError(_CLOSED)
            if self._capacity() > 0:  # so none waits
                return self._issue()
            waiter = _Waiter()
            self._waiters.append(waiter)
        try:
            await waiter.woken
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise
        if waiter.ticket is None:
            raise ClosedError(_CLOSED)
        return waiter.ticket

    def _issue(self) -> Ticket:
        ticket = Ticket(self._settle, self._version, self._admitted)
        self._admitted += 1
        self._running.add(ticket)
        return ticket

    def _admit_waiters(self) -> None:
        while self._waiters and self._capacity() > 0:
            waiter = self._waiters.popleft()
            waiter.ticket = self._issue()
            if not waiter.wake():
                self._running.discard(waiter.ticket)

    def _withdraw(self, waiter: _Waiter) -> None:
        """Forget a call that was cancelled, perhaps after it had been given a place."""
        with self._lock:
            if waiter.ticket is not None:
                self._running.discard(waiter.ticket)
                self._admit_waiters()
            elif waiter in self._waiters:
                self._waiters.remove(waiter)

    def _settle(self, ticket: Ticket, end: _End) -> None:
        with self._lock:
            if ticket not in self._running:
                raise RolloutError(f"{ticket!r} has ended before, so it cannot be {end}: call one of its methods, once")
            self._running.remove(ticket)
            self._ended[end] += 1
            if end == "accepted":
                insort(self._finished, ticket, key=_age)
            else:
                self._admit_waiters()

    # --- training ---

    def take(self, count: int, *, flush: bool = False) -> list[Ticket] | None:
        """Hand out the `count` oldest finished groups; a step ends with its last group.

        Args:
            count: groups to hand out, at most those that the current step still needs.
            flush: no further group will be admitted. When none runs either, fewer than `count` are handed out, and the
                step ends with the last finished group.

        Returns:
            The groups' tickets, oldest first. None while too few are finished, or while handing out these would let
            another one, running or finished, miss its last step: for each k >= 0, the groups that are due by step + k
            must not be more than the places left in this step and k further ones.

        Raises:
            InputError: `count` is less than 1, or more than the step still needs.
        """
        count = check_at_least(count, 1, "count")
        with self._lock:
            left = self._groups_per_step - self._taken
            if count > left:
                raise InputError("count", f"must be at most {left}, the groups that the step still needs; got {count}")
            is_last = flush and len(self._finished) <= count and not len(self._running)
            if is_last:
                count = len(self._finished)
            if not self._finished or count > len(self._finished) or not self._can_wait(count, left - count):
                return None
            taken = self._finished[:count]
            del self._finished[:count]
            self._hand_out(count, is_last_of_step=is_last or count == left)
            return taken

    def _skip(self, count: int, *, is_last_of_step: bool, state: GateState) -> None:
        """Count groups that were handed out before a restart, after which the gate had this state."""
        with self._lock:
            self._ended.update(accepted=count)
            self._ended.update(dropped=state.dropped - self._ended["dropped"])
            self._ended.update(failed=state.failed - self._ended["failed"])
            self._hand_out(count, is_last_of_step=is_last_of_step)

    def _hand_out(self, count: int, *, is_last_of_step: bool) -> None:
        self._taken += count
        if is_last_of_step:
            self._unfilled += self._groups_per_step - self._taken
            self._step += 1
            self._taken = 0

    def _can_wait(self, count: int, places: int) -> bool:
        """Whether all groups but the `count` oldest finished ones can be trained in time.

        `places` are those left in the current step.
        """
        others = Counter(ticket.version for ticket in (*self._running, *self._finished[count:]))
        due = 0
        for version in sorted(others):
            due += others[version]
            further_steps = version + self._max_staleness - self._step
            if due > places + further_steps * self._groups_per_step:
                return False
        return True

    def publish(self, step: int | None = None) -> None:
        """Say that the weights of the first `step` steps are published, which makes room for further groups.

        Args:
            step: None for all steps handed out. A smaller one than before changes nothing.

        Raises:
            InputError: so many steps were not handed out.
        """
        with self._lock:
            published = self._step if step is None else check_at_least(step, 0, "step")
            if published > self._step:
                raise InputError("step", f"must be at most {self._step}, the steps handed out; got {step}")
            self._version = max(self._version, published)
            self._admit_waiters()

    # --- life ---

    def state(self) -> GateState:
        """Return what `StalenessGate` needs to continue after the steps handed out so far."""
        with self._lock:
            return GateState(version=self._step, dropped=self._ended["dropped"], failed=self._ended["failed"])

    def close(self) -> None:
        """Admit no further group: calls that wait raise `ClosedError`. Groups that run can still end."""
        with self._lock:
            self._is_closed = True
            while self._waiters:
                self._waiters.popleft().wake()

    def __repr__(self) -> str:
        return f"<StalenessGate version {self.version}, step {self.step}, {self.running} running>"


def _age(ticket: Ticket) -> tuple[int, int]:
    return ticket.version, ticket.number

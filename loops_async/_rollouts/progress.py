"""Which tasks of a stream are done, so that a restored one rolls out each of them once."""

from __future__ import annotations

from collections.abc import Sequence

from .gate import GateState
from .state import RolloutState

__all__ = ["Progress", "gate_state"]


class Progress:
    """The numbers of the tasks that were begun and are not done.

    A task is done when its group was dropped, has failed, or belongs to a step that was handed out whole: only what is
    trained in whole steps is part of the saved training state.
    """

    def __init__(self, state: RolloutState) -> None:
        self._part: list[int] = []
        """Handed out in a step that is not whole yet."""
        self.restore(state)

    def restore(self, state: RolloutState) -> None:
        """Go on from this state, before any task is begun."""
        self._first_new = state.next_index
        self._again = frozenset(state.pending)
        self._next_index = state.next_index
        self._pending = set(state.pending)

    @property
    def first_new(self) -> int:
        """The number of tasks that had been begun before the stream was restored."""
        return self._first_new

    def is_wanted(self, index: int) -> bool:
        """Whether to roll out this task; otherwise that was done before the stream was restored."""
        return (index >= self._first_new or index in self._again) and index not in self._part

    def begun(self, index: int) -> None:
        """Count a task whose group was admitted."""
        self._pending.add(index)
        self._next_index = max(self._next_index, index + 1)

    def ended(self, index: int) -> None:
        """Count a task whose group was dropped or has failed."""
        self._pending.discard(index)

    def handed_out(self, indices: Sequence[int], *, is_last_of_step: bool) -> None:
        """Count the tasks of a batch."""
        self._part += indices
        if is_last_of_step:
            self._pending.difference_update(self._part)
            self._part = []

    def state(self, gate: GateState) -> RolloutState:
        """Return the state of the steps handed out."""
        return RolloutState(
            version=gate.version,
            next_index=self._next_index,
            pending=sorted(self._pending),
            dropped=gate.dropped,
            failed=gate.failed,
        )


def gate_state(state: RolloutState) -> GateState:
    """Return the part of the state that belongs to the gate."""
    return GateState(version=state.version, dropped=state.dropped, failed=state.failed)

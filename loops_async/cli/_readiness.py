"""A live display of provisioning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from time import monotonic

from rich.live import Live
from rich.table import Table

from ..types import ProvisioningEvent
from ._show import as_text, errors, is_live, note

MAX_LINES = 16


class Readiness:
    """Shows a line for each run or sampler, or, if there are many, how many are in each state."""

    def __init__(self) -> None:
        self._last: dict[str, ProvisioningEvent] = {}
        self._started = monotonic()

    def update(self, event: ProvisioningEvent) -> None:
        """Show an event."""
        self._last[event.id] = event
        if not is_live():
            note(f"{event.kind} {event.id}: {_state(event)}, {event.seconds:.1f} s")

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        seconds = f"{monotonic() - self._started:.0f} s"
        if len(self._last) <= MAX_LINES:
            for event in self._last.values():
                took = f"{event.seconds:.0f} s" if event.stage == "ready" else seconds
                table.add_row(event.kind, as_text(event.id), as_text(_state(event)), took)
        else:
            counted = Counter(_state(event) for event in self._last.values())
            for state, count in counted.most_common():
                table.add_row(str(count), as_text(state), seconds)
        return table


def _state(event: ProvisioningEvent) -> str:
    return event.status if event.stage == "waiting" and event.status else event.stage


@contextmanager
def readiness() -> Generator[Readiness]:
    """Show progress on standard error while the block runs."""
    shown = Readiness()
    if not is_live():
        yield shown
        return
    with Live(shown, console=errors, refresh_per_second=4, transient=True):
        yield shown

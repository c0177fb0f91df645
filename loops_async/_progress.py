"""How the stages of provisioning are shown: as lines of the log, and to a person who waits."""

from __future__ import annotations

import os
import sys
import threading
from typing import Final, TextIO

from ._text import one_line
from .types import ProvisioningEvent

__all__ = ["print_progress", "stage_line"]

LONGEST_STATUS: Final = 100


def stage_line(event: ProvisioningEvent) -> str:
    """Return e.g. ``run cqbn0bvm2z: DEPLOYING, 3.6 s``."""
    stage = event.status if event.stage == "waiting" and event.status else event.stage
    return f"{event.kind} {one_line(event.id, 200)}: {one_line(stage, LONGEST_STATUS)}, {event.seconds:.1f} s"


class _Printer:
    """Prints events, those of one run or sampler over each other where the output allows that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._id = ""
        """Whose line the cursor stands in; "" at the beginning of a line."""
        self._length = 0

    def show(self, event: ProvisioningEvent, stream: TextIO) -> None:
        line, width = stage_line(event), _width(stream)
        with self._lock:
            if self._id and self._id != event.id:
                self._leave(stream)
            if len(line) >= width:  # it would wrap, and only its last row could be written over
                if self._id:
                    self._leave(stream)
                print(line, file=stream)
            else:
                self._write_over(event, line, stream)
            stream.flush()

    def _write_over(self, event: ProvisioningEvent, line: str, stream: TextIO) -> None:
        stream.write(f"\r{line:<{self._length}}" if self._id else line)
        self._id, self._length = event.id, len(line)
        if event.stage in ("ready", "failed", "deactivated"):
            self._leave(stream)

    def _leave(self, stream: TextIO) -> None:
        stream.write("\n")
        self._id, self._length = "", 0


def _width(stream: TextIO) -> int:
    """Return how many characters fit into a line that can be written over; 0 if none can."""
    if type(stream).__module__.startswith("ipykernel"):  # a notebook
        return sys.maxsize
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return 0
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


_printer: Final = _Printer()


def print_progress(event: ProvisioningEvent) -> None:
    """Print a stage of provisioning on standard error: give it as the `on_progress` of any call that provisions.

    In a terminal and in a notebook, each stage replaces the one before; elsewhere, and where the line does not fit into
    the terminal, each has a line of its own.
    """
    if sys.stderr is not None:  # e.g. in a service without standard streams
        _printer.show(event, sys.stderr)

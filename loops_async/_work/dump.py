"""All that is under way, as text for a person who looks for what hangs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from time import monotonic
from typing import Final, TextIO

from .._text import one_line
from ..types import InFlight
from .registry import Work, open_works
from .watchdog import stack_of_loop

__all__ = ["dump", "dump_all", "inflight"]

MOST_SHOWN: Final = 50
LONGEST_NEWS: Final = 200
LEAST_LAG: Final = 0.1
"""In seconds; less is no hold."""


def inflight(work: Work) -> list[InFlight]:
    """Return what is under way, the oldest first."""
    now = monotonic()
    return [entry.shown(now) for entry in work.all()]


def dump(work: Work, file: TextIO | None = None) -> str:
    """Return what a client has under way as text, and write it to `file`."""
    return _written(_described(work), file)


def dump_all(file: TextIO | None = None) -> str:
    """Return what every open client of this process has under way, as text; see `ServiceClient.dump`.

    It makes no request and waits for nothing, so it may be called in any thread, also when nothing else answers, and in
    a signal handler.

    Args:
        file: also write it there, e.g. ``sys.stderr``.

    Example:
        ::

            import signal, sys

            signal.signal(signal.SIGUSR1, lambda *_: loops.dump_all(sys.stderr))  # then: kill -USR1 PID
    """
    described = [_described(work) for work in open_works()]
    return _written("\n".join(described) or "no client is open\n", file)


def _described(work: Work) -> str:
    shown = inflight(work)
    lines = [f"{work.client}: {len(shown)} under way", *_counts(shown)]
    lines += [f"  {name}: {fact()}" for name, fact in list(work.facts.items())]
    lines.append(f"  event loop: {_loop(work)}")
    lines.append(f"  used: {_used(work)}")
    lines += [f"  {_line(each)}" for each in shown[:MOST_SHOWN]]
    if len(shown) > MOST_SHOWN:
        lines.append(f"  … and {len(shown) - MOST_SHOWN} younger ones")
    return "\n".join(lines) + "\n"


def _counts(shown: Sequence[InFlight]) -> list[str]:
    counts = Counter((each.kind, each.waiting_for or "-") for each in shown)
    return [f"  {count} {kind}, waiting for {waiting_for}" for (kind, waiting_for), count in sorted(counts.items())]


def _used(work: Work) -> str:
    usage = work.usage()
    used = {name: getattr(usage, name) for name in usage.__struct_fields__ if name != "by_run"}
    return ", ".join(f"{number:,.10g} {name}" for name, number in used.items() if number) or "nothing"


def _loop(work: Work) -> str:
    if work.lag < LEAST_LAG:
        return "runs"
    stack = stack_of_loop(work)
    return f"held for {work.lag:.1f} s" + (f", in {', called by '.join(stack)}" if stack else "")


def _line(each: InFlight) -> str:
    parts = [
        f"{each.age:8.1f} s  {each.kind} {one_line(each.what, LONGEST_NEWS)}",
        f"id {each.id}" if each.id else "",
        f"run {each.run_id}" if each.run_id and each.run_id != each.id else "",
        f"sampler {each.sampler_id}" if each.sampler_id and each.sampler_id != each.id else "",
        f"waits for {each.waiting_for}" if each.waiting_for else "",
        f"attempt {each.attempt}" if each.attempt > 1 else "",
        "" if each.next_try_in is None else f"next try in {each.next_try_in:.1f} s",
        "" if each.last_status is None else f"last status {each.last_status}",
        "" if each.last_error is None else f"last news: {one_line(each.last_error, LONGEST_NEWS)}",
    ]
    return ", ".join(filter(None, parts))


def _written(text: str, file: TextIO | None) -> str:
    if file is not None:
        try:
            file.write(text)
            file.flush()
        except RuntimeError:  # a signal handler that interrupted a write to the same file
            os.write(file.fileno(), text.encode("utf-8", "replace"))
    return text

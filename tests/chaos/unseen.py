"""What went wrong where no caller saw it: errors that were logged, and warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

OF_THE_SERVICE = ("logged by aiohttp.server", "/loops-local-")
"""Parts of lines that are not about a client: the service refuses what a changed answer led to, and says so; aiohttp
forgets a file of its data directory when the caller leaves while it is opened."""


@contextmanager
def unseen_errors() -> Iterator[list[str]]:
    """Collect them; the library's own warnings about repetitions, thousands of lines, stay off the screen."""
    lines: list[str] = []

    def note(line: str) -> None:
        if not any(part in line for part in OF_THE_SERVICE):
            lines.append(line)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            cause = record.exc_info[1] if record.exc_info else None
            note(f"logged by {record.name}: {record.getMessage():.300} {cause!r:.300}")

    handler = Handler(logging.ERROR)
    logging.lastResort = logging.NullHandler()  # type: ignore[assignment]  # typeshed wants one that writes
    logging.getLogger().addHandler(handler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            yield lines
        finally:
            logging.getLogger().removeHandler(handler)
            for warning in warned:
                note(f"warned: {warning.category.__name__}: {warning.message}"[:300])

"""What went wrong where no caller saw it: errors that were logged, and warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unseen_errors() -> Iterator[list[str]]:
    """Collect them; the library's own warnings about repetitions, thousands of lines, stay off the screen."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            cause = record.exc_info[1] if record.exc_info else None
            lines.append(f"logged by {record.name}: {record.getMessage():.300} {cause!r:.300}")

    handler = Handler(logging.ERROR)
    logging.lastResort = logging.NullHandler()  # type: ignore[assignment]  # typeshed wants one that writes
    logging.getLogger().addHandler(handler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            yield lines
        finally:
            logging.getLogger().removeHandler(handler)
            lines.extend(f"warned: {warning.category.__name__}: {warning.message}"[:300] for warning in warned)

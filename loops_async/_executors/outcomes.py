"""What comes of a call in a worker, as bytes: its result, or its error with the worker's traceback."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any

from ..errors import WorkerError

__all__ = ["failed", "outcome_of", "portable", "read", "succeeded"]


def succeeded(value: Any) -> bytes:
    """Return the outcome of a call that returned `value`.

    Raises:
        Exception: `value` cannot be pickled.
    """
    return pickle.dumps((True, value, None))


def failed(error: BaseException, worker: str) -> bytes:
    """Return the outcome of a call that raised `error` in this process, which is called `worker`."""
    text = "".join(traceback.format_exception(error))
    return pickle.dumps((False, portable(error, worker, text), _note(worker, text)))


def outcome_of(worker: str, function: Callable[..., Any], *args: Any) -> bytes:
    """Call a function, and return the outcome."""
    try:
        return succeeded(function(*args))
    except BaseException as error:
        return failed(error, worker)


def read(outcome: bytes) -> tuple[Any, Exception | None]:
    """Return the result of a call, or its error with the worker's traceback as a note."""
    has_succeeded, value, note = pickle.loads(outcome)  # noqa: S301 - from a worker of our own
    if has_succeeded:
        return value, None
    value.add_note(note)
    return None, value


def portable(error: BaseException, worker: str, text: str | None = None) -> Exception:
    """Return an error, or a `WorkerError` for one that must not, or cannot, be raised in another process.

    Args:
        error: what was raised.
        worker: the name of the process.
        text: the traceback; None when the error is raised in the same process, which then gets the note here.
    """
    shown = "".join(traceback.format_exception(error)) if text is None else text
    found = error if isinstance(error, Exception) and _survives(error) else _described(error, worker, shown)
    if text is None:
        found.add_note(_note(worker, shown))
    return found


def _note(worker: str, text: str) -> str:
    return f"In {worker}:\n{text}"


def _described(error: BaseException, worker: str, text: str) -> WorkerError:
    message = "".join(traceback.format_exception_only(error)).strip()
    return WorkerError(f"{worker}: {message}", error_type=type(error).__name__, traceback=text, worker=worker)


def _survives(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)  # noqa: S301 - just made
    except Exception:
        return False

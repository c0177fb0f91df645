"""The outcome of an operation: what polls answer once it has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec

from loops_async.errors import InputError
from loops_async.protocol import encode
from loops_async.types import LogLevel

from .._errors import HttpError
from .._storage.logs import DeploymentLog
from ..engine import RefusedError

__all__ = ["Work", "run_to_outcome"]

logger = logging.getLogger("loops_local.operations")

Work: TypeAlias = Callable[[], Awaitable[Any]]


async def run_to_outcome(work: Work, *, name: str, operation_id: str, log: DeploymentLog | None = None) -> bytes:
    """Run an operation and return its outcome as JSON.

    Args:
        work: runs it and returns its result as the wire shows it.
        name: the operation's name on the wire.
        operation_id: the id that the caller gave it.
        log: gets one line on how it ended.
    """

    def write(level: LogLevel, message: str) -> None:
        if log is not None:
            log.write(level, f"{name} {message}", request_id=operation_id)

    started = time.perf_counter()
    try:
        outcome = encode({"status": "done", "result": await work()})
    except (RefusedError, InputError, HttpError) as refused:
        write("WARNING", f"refused: {refused}")
        # The wire's examples name Python's own class for a bad argument.
        return _failure(str(refused), "ValueError")
    except Exception as error:
        logger.exception("operation %s (%s) failed", operation_id, name)
        write("ERROR", f"failed: {error!r}")
        return _failure(str(error) or repr(error), type(error).__name__)
    write("INFO", f"done in {time.perf_counter() - started:.3f} s")
    return outcome


def _failure(message: str, error_class: str) -> bytes:
    return msgspec.json.encode({"status": "error", "error": message, "error_class": error_class})

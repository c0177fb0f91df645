"""Waiting for a rollout in a worker, up to its time limit."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

from ..errors import WorkerTimeoutError

__all__ = ["out_of_time", "outcome_in_time"]


async def outcome_in_time(call: Future[Any], started: Future[None], *, name: str, timeout: float | None) -> Any:
    """Return the result of a call, or raise its error; one that is no longer waited for is cancelled.

    Args:
        call: what a worker does.
        started: done when a worker has the call: the time limit begins.
        name: what to call it in an error.
        timeout: the time limit in seconds; None for no limit.

    Raises:
        WorkerTimeoutError: the time limit was reached.
    """
    waiter = asyncio.wrap_future(call)
    try:
        if timeout is not None:
            await asyncio.wait([waiter, asyncio.wrap_future(started)], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([waiter], timeout=timeout)
            if not waiter.done():
                raise out_of_time(name, timeout)
        return await waiter
    finally:
        waiter.cancel()  # which cancels the call, unless it has ended


def out_of_time(name: str, timeout: float) -> WorkerTimeoutError:
    """Return the error of a rollout that took too long."""
    return WorkerTimeoutError(
        f"{name} took longer than its time limit of {timeout:g} s, and was ended", timeout=timeout
    )

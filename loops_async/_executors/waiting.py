"""Waiting for what runs in workers: for a rollout up to its time limit, and for the end of all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from .._arguments import check_positive
from .._tasks import run_to_completion
from ..errors import WorkerTimeoutError
from .processes import Processes

__all__ = ["close_all", "out_of_time", "run_rollout"]


async def run_rollout(workers: Processes, rollout: Callable[..., Any], *args: Any, timeout: float | None) -> Any:
    """Run a rollout in one of some workers, and return its result.

    Raises:
        InputError: `timeout` is not a positive number.
    """
    limit = None if timeout is None else check_positive(timeout, "timeout")
    call = workers.start(rollout, args)
    return await _outcome_in_time(call, call.started, name=call.name, timeout=limit)


async def close_all(*workers: Processes) -> None:
    """End all calls and processes, and wait for their end, also if the caller is cancelled."""
    for each in workers:
        await run_to_completion(asyncio.to_thread(each.close))


async def _outcome_in_time(call: Future[Any], started: Future[None], *, name: str, timeout: float | None) -> Any:
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

"""Executors: where graders and whole rollouts run, so that the others go on.

Each has `submit`, for functions such as graders (`RolloutContext.run` calls it when the executor is given to
`TrainingClient.rollouts`), and `run`, for whole rollouts. One law holds for all of them:

- An error is the original exception, with the worker's traceback as a note. One that cannot be raised in another
  process becomes a `WorkerError`, which describes it.
- A rollout that reaches its time limit fails with `WorkerTimeoutError`. It is cancelled; if it has not ended
  after 5 s, its process is.
- When a process ends, what ran in it fails with `WorkerDiedError`, which is retryable, and nothing else does.
- Cancelling a call of `submit` ends its process, so that a function that hangs takes no place from others.

`ProcessExecutor` has processes on this machine, `loops_async.ray.RayExecutor` on a cluster, and `InLoopExecutor` none.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Final, TypeVar

from ._arguments import check_at_least, check_positive
from ._executors.outcomes import portable
from ._executors.processes import LocalProcess, Processes
from ._executors.waiting import close_all, out_of_time, run_rollout
from ._rollouts.policy import Policy
from .errors import WorkerDiedError, WorkerError, WorkerTimeoutError

__all__: list[str] = [
    "InLoopExecutor",
    "Policy",
    "ProcessExecutor",
    "WorkerDiedError",
    "WorkerError",
    "WorkerTimeoutError",
]

P = TypeVar("P")
K = TypeVar("K")
T = TypeVar("T")

HERE: Final = "this process"


class ProcessExecutor:
    """Runs functions and whole rollouts in processes of this machine, which start when they are needed.

    A function has a process to itself; rollouts run beside one another. As always with
    `multiprocessing`, functions, arguments and results are pickled, so a function must be found by its name in a
    module, and the script needs ``if __name__ == "__main__":``. What the processes log arrives in the `logging` of this
    one.

    Args:
        workers: how many functions run at the same time, and in how many processes rollouts do; None is the number of
            cores.
        per_worker: how many rollouts run at the same time in each of these processes.

    Raises:
        InputError: an argument is not a whole number of at least 1.

    Example:
        ::

            async with loops.ProcessExecutor(4) as executor:
                stream = trainer.rollouts(rollout, tasks, group_size=8, groups_per_step=4, executor=executor)
    """

    def __init__(self, workers: int | None = None, *, per_worker: int = 8) -> None:
        workers = check_at_least((os.cpu_count() or 1) if workers is None else workers, 1, "workers")
        per_worker = check_at_least(per_worker, 1, "per_worker")
        self._workers = workers
        self._capacity = workers * per_worker
        self._functions = Processes(workers, 1, partial(LocalProcess, are_rollouts=False))
        self._rollouts = Processes(workers, per_worker, partial(LocalProcess, are_rollouts=True))

    @property
    def capacity(self) -> int:
        """How many rollouts run at the same time; further ones wait for a place."""
        return self._capacity

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Start ``fn(*args)`` in a process; cancelling the future that is returned also ends a call that runs.

        It may be called in any thread, and returns at once. The future raises what `fn` raises.

        Args:
            fn: a function that can be pickled, e.g. a grader.
            args: its arguments.

        Returns:
            The future of the result; `WorkerDiedError` if the process ends.

        Raises:
            ClosedError: the executor is closed.
        """
        return self._functions.start(fn, args)

    async def run(
        self, rollout: Callable[[P, K], Awaitable[T]], policy: P, task: K, *, timeout: float | None = None
    ) -> T:
        """Return ``rollout(policy, task)``, which runs in a process, beside others.

        Args:
            rollout: what to run there; it can be pickled, and is unpickled once in each process.
            policy: what to sample with, e.g. a `Policy` of the newest weights.
            task: what to roll out.
            timeout: the time limit in seconds from when a process has the rollout; None for no limit.

        Raises:
            WorkerTimeoutError: the time limit was reached.
            WorkerDiedError: the process ended.
            WorkerError: the rollout failed with an error that cannot be raised here.
            ConfigError: a process could not start.
            ClosedError: the executor is closed.
            Exception: what the rollout raises.
        """
        result: T = await run_rollout(self._rollouts, rollout, policy, task, timeout=timeout)
        return result

    async def close(self) -> None:
        """End all calls and processes, and wait for their end."""
        await close_all(self._functions, self._rollouts)

    async def __aenter__(self) -> ProcessExecutor:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<ProcessExecutor workers={self._workers} capacity={self._capacity}>"


class InLoopExecutor:
    """Runs everything where it is called: for tests, debuggers, and rollouts that need no other process.

    Errors are those of the other executors, also where an exception could not be pickled. A function that hangs cannot
    be ended.

    Example:
        ::

            async def rollout(policy, prompt):
                answer = await policy.sampler.sample(prompt)
                return answer.sequences[0].tokens

            async with loops.InLoopExecutor() as executor:
                tokens = await executor.run(rollout, loops.Policy(sampler, 0), prompt)
    """

    def __init__(self) -> None:
        pass

    @property
    def capacity(self) -> None:
        """None: there is no limit."""
        return

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call ``fn(*args)`` here and now, and return a future that is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            future.set_exception(portable(error, HERE))
        return future

    async def run(
        self, rollout: Callable[[P, K], Awaitable[T]], policy: P, task: K, *, timeout: float | None = None
    ) -> T:
        """Return ``rollout(policy, task)``; arguments and errors are those of `ProcessExecutor.run`."""
        limit = None if timeout is None else check_positive(timeout, "timeout")
        deadline = asyncio.timeout(limit)
        try:
            async with deadline:
                return await rollout(policy, task)
        except Exception as error:
            if limit is not None and deadline.expired() and isinstance(error, TimeoutError):
                raise out_of_time(getattr(rollout, "__qualname__", repr(rollout)), limit) from None
            raise portable(error, HERE) from None

    async def close(self) -> None:
        """Do nothing: what runs here belongs to its caller."""

    async def __aenter__(self) -> InLoopExecutor:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

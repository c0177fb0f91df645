"""Functions and whole rollouts on the machines of a cluster, with the law of all executors."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from logging.handlers import QueueHandler
from types import TracebackType
from typing import Any, TypeVar

import ray
from ray import cloudpickle

from .._arguments import check_at_least
from .._executors.outcomes import outcome_of
from .._executors.processes import Call, Process, Processes, log_here
from .._executors.waiting import close_all, run_rollout
from .._executors.worker import Rollouts, called
from ..errors import WorkerDiedError

__all__ = ["RayExecutor"]

P = TypeVar("P")
K = TypeVar("K")
T = TypeVar("T")


class RayExecutor:
    """Runs functions and whole rollouts in actors of a Ray cluster, which start when they are needed.

    A function has an actor to itself; rollouts run beside one another, on one event loop for each actor. Functions,
    arguments and results are pickled by Ray, so functions may also be lambdas. What they log arrives in the `logging`
    of this process when their call ends.

    Args:
        workers: how many functions run at the same time, and in how many actors rollouts do.
        per_worker: how many rollouts run at the same time in each of these actors.
        num_cpus: the cores that Ray counts for an actor.
        options: further options of a Ray actor, e.g. ``resources``.

    Raises:
        InputError: `workers` or `per_worker` is not a whole number of at least 1.

    Example:
        ::

            async with loops_ray.RayExecutor(64) as executor:
                stream = trainer.rollouts(rollout, tasks, group_size=8, groups_per_step=4, executor=executor)
    """

    def __init__(self, workers: int, *, per_worker: int = 8, num_cpus: float = 1, **options: Any) -> None:
        workers = check_at_least(workers, 1, "workers")
        per_worker = check_at_least(per_worker, 1, "per_worker")
        self._capacity = workers * per_worker
        options = {"num_cpus": num_cpus, "max_restarts": 0, **options}
        self._functions = Processes(workers, 1, partial(_Actor, 1, options, are_rollouts=False))
        self._rollouts = Processes(workers, per_worker, partial(_Actor, per_worker, options, are_rollouts=True))

    @property
    def capacity(self) -> int:
        """How many rollouts run at the same time; further ones wait for a place."""
        return self._capacity

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Start ``fn(*args)`` in an actor; cancelling the future that is returned also ends a call that runs.

        Errors are those of `ProcessExecutor.submit`.
        """
        return self._functions.start(fn, args)

    async def run(
        self, rollout: Callable[[P, K], Awaitable[T]], policy: P, task: K, *, timeout: float | None = None
    ) -> T:
        """Return ``rollout(policy, task)``, which runs in an actor, beside others.

        `policy` goes with each call: after `RolloutStream.publish`, the next rollout has the new one. Arguments and
        errors are those of `ProcessExecutor.run`.
        """
        result: T = await run_rollout(self._rollouts, rollout, policy, task, timeout=timeout)
        return result

    async def close(self) -> None:
        """End all calls and actors, and wait for their end."""
        await close_all(self._functions, self._rollouts)

    async def __aenter__(self) -> RayExecutor:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _Actor(Process):
    """An actor that makes calls."""

    def __init__(self, places: int, options: dict[str, Any], freed: Callable[[], None], *, are_rollouts: bool) -> None:
        super().__init__(freed, are_rollouts=are_rollouts)
        actor: Any = ray.remote(concurrency_groups={"control": 8})(_Worker)
        self._actor: Any = actor.options(max_concurrency=places, **options).remote(
            logging.getLogger().getEffectiveLevel()
        )
        self._actor.name.remote().future().add_done_callback(self._is_there)
        self._life: Any = self._actor.live.remote()
        self._life.future().add_done_callback(self._ended)

    def _pickled(self, value: Any) -> bytes:
        pickled: bytes = cloudpickle.dumps(value)
        return pickled

    def _begin(self, number: int, function: bytes, args: bytes) -> None:
        method = self._actor.run if self._are_rollouts else self._actor.call
        method.remote(number, function, args).future().add_done_callback(partial(self._returned, number))

    def _cancel(self, number: int) -> None:
        self._actor.cancel.remote(number)

    def _kill(self) -> None:
        ray.kill(self._actor)

    # --- in threads of Ray ---

    def _is_there(self, future: Future[Any]) -> None:
        if future.exception() is None:  # otherwise `_ended` tells why
            self._got_ready()

    def _returned(self, number: int, future: Future[Any]) -> None:
        error = future.exception()
        if isinstance(error, ray.exceptions.RayActorError):
            self._ended(future)
        elif error is not None:
            self._got(number, error if isinstance(error, Exception) else RuntimeError(repr(error)))
        else:
            outcome, records = future.result()
            for record in records:
                log_here(record)
            self._got(number, outcome)

    def _ended(self, future: Future[Any]) -> None:
        why = self._reason or str(future.exception()).strip().split("\n")[0]

        def died(call: Call) -> WorkerDiedError:
            return WorkerDiedError(f"the Ray actor that ran {call.name} has ended: {why}", worker="a Ray actor")

        self._got_end(died)


class _Worker:
    """The actor: an event loop for the calls, and one for its control, which also answers when the first hangs."""

    def __init__(self, level: int) -> None:
        self._worker = f"Ray worker process {os.getpid()} on {socket.gethostname()}"
        self._rollouts = Rollouts(self._worker)
        self._records = _Records()
        root = logging.getLogger()
        root.setLevel(level)
        root.addHandler(self._records)

    async def run(self, number: int, function: bytes, args: bytes) -> tuple[bytes, list[logging.LogRecord]]:
        outcome = await self._rollouts.run(number, function, args)
        return outcome, self._records.taken()

    async def call(self, number: int, function: bytes, args: bytes) -> tuple[bytes, list[logging.LogRecord]]:
        # In a thread: functions may start event loops of their own.
        outcome = await asyncio.to_thread(outcome_of, self._worker, called, function, args)
        return outcome, self._records.taken()

    @ray.method(concurrency_group="control")
    async def cancel(self, number: int) -> None:
        self._rollouts.cancel(number)

    @ray.method(concurrency_group="control")
    async def name(self) -> str:
        return self._worker

    @ray.method(concurrency_group="control")
    async def live(self) -> None:
        await asyncio.Event().wait()


class _Records(QueueHandler):
    """Keeps log records until a call ends."""

    def __init__(self) -> None:
        super().__init__(queue=None)  # type: ignore[arg-type] # `enqueue` is the only method that uses it
        self._records: list[logging.LogRecord] = []

    def enqueue(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def taken(self) -> list[logging.LogRecord]:
        records, self._records = self._records, []
        return records

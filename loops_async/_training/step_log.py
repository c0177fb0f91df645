"""Logging of training steps to Weights & Biases. It never delays training, and its errors do not stop it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import anyio
from msgspec import Struct
from msgspec.structs import replace

from .._operations.batch import merged
from .._operations.future import OperationFuture
from .._tasks import TaskOwner
from ..types import ForwardBackwardOutput, OptimStepResponse, WandbConfig

log = logging.getLogger("loops_async.operations")

CLOSE_SECONDS: Final = 30.0
FORWARD_PREFIX: Final = "forward_backward/"


def require_wandb() -> None:
    """Raise `ImportError` unless Weights & Biases is installed."""
    if find_spec("wandb") is None:
        raise ImportError("wandb_config needs Weights & Biases: pip install 'loops-async[wandb]'")


class _Pending(Struct, frozen=True):
    """An operation whose metrics will be logged; `datums` is 0 for an optimizer step."""

    future: OperationFuture[Any]
    datums: int


class StepLog:
    """Logs each optimizer step of one training client, with the metrics of the passes since the previous step.

    Operations are added in the order in which they were accepted; their results need no other waiter.
    """

    def __init__(self, config: WandbConfig, about: Mapping[str, Any], tasks: TaskOwner) -> None:
        self._writer = _Writer(lambda: _start_run(config, about))
        self._pending: deque[_Pending] = deque()
        self._has_pending = asyncio.Event()
        self._passes: list[tuple[ForwardBackwardOutput, int]] = []
        self._task = tasks.start(self._follow(), name=f"log to wandb project {config.project}")

    def add_pass(self, future: OperationFuture[ForwardBackwardOutput], datums: int) -> None:
        """Log the metrics of this pass together with the next step."""
        self._add(_Pending(future, datums))

    def add_step(self, future: OperationFuture[OptimStepResponse]) -> None:
        """Log this step."""
        self._add(_Pending(future, 0))

    async def close(self) -> None:
        """Log the steps whose results are known, and finish the W&B run; takes 30 s at most."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def _add(self, pending: _Pending) -> None:
        if self._writer.is_working and not self._task.done():
            self._pending.append(pending)
            self._has_pending.set()

    async def _follow(self) -> None:
        try:
            while True:
                await self._has_pending.wait()
                while self._pending:
                    self._log(self._pending[0], await self._pending[0].future.settled())
                    self._pending.popleft()
                self._has_pending.clear()
        finally:
            for pending in self._pending:
                if pending.future.done():
                    self._log(pending, await pending.future.settled())
            await self._writer.close()

    def _log(self, pending: _Pending, outcome: ForwardBackwardOutput | OptimStepResponse | None) -> None:
        if isinstance(outcome, ForwardBackwardOutput):
            self._passes.append((replace(outcome, loss_fn_outputs=[]), pending.datums))
        elif outcome is not None:
            self._writer.put(self._forward_metrics() | dict(outcome.metrics or {}))

    def _forward_metrics(self) -> dict[str, float]:
        passes, self._passes = self._passes, []
        if not passes:
            return {}
        output = merged([one for one, _ in passes], [datums for _, datums in passes])
        return {FORWARD_PREFIX + name: value for name, value in ({"loss": output.loss} | output.metrics).items()}


def _start_run(config: WandbConfig, about: Mapping[str, Any]) -> Any:
    wandb: Any = import_module("wandb")  # optional: the type checkers may not find it
    # Several training clients may log at once, each to its own run.
    return wandb.init(project=config.project, name=config.name, config=dict(about), reinit="create_new")


class _Writer:
    """A thread that starts a W&B run, logs to it and finishes it: each of these may block for long or forever."""

    def __init__(self, start_run: Callable[[], Any]) -> None:
        self._start_run = start_run
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._has_ended = asyncio.Event()
        self.is_working = True
        threading.Thread(target=self._work, name="loops-wandb", daemon=True).start()

    def put(self, metrics: dict[str, Any]) -> None:
        """Log these metrics after those put before."""
        if self.is_working:
            self._queue.put(metrics)

    async def close(self) -> None:
        """Wait until everything is logged; a thread that hangs is abandoned after 30 s."""
        self._queue.put(None)
        with anyio.move_on_after(CLOSE_SECONDS, shield=True) as scope:
            await self._has_ended.wait()
        if scope.cancelled_caught:
            log.warning("Weights & Biases did not finish within %g s; its last steps may be missing", CLOSE_SECONDS)

    def _work(self) -> None:
        try:
            run = self._start_run()
            while (metrics := self._queue.get()) is not None:
                run.log(metrics)
            run.finish()
        except Exception as error:
            log.warning("training continues without logging to Weights & Biases: %s: %s", type(error).__name__, error)
        finally:
            self.is_working = False
            with suppress(RuntimeError):  # the loop was closed before the thread ended
                self._loop.call_soon_threadsafe(self._has_ended.set)

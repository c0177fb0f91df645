"""Steps of training, logged to Weights & Biases without anybody waiting for it and without harm when it fails."""

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

log = logging.getLogger("loops_async")

CLOSE_SECONDS: Final = 30.0
FORWARD_PREFIX: Final = "forward_backward/"


def require_wandb() -> None:
    """Raise `ImportError` unless Weights & Biases is installed."""
    if find_spec("wandb") is None:
        raise ImportError("wandb_config needs Weights & Biases: pip install 'loops-async[wandb]'")


class _Noted(Struct, frozen=True):
    """An operation whose numbers are wanted; `datums` is 0 for an optimizer step."""

    future: OperationFuture[Any]
    datums: int


class StepLog:
    """Logs each optimizer step of one training client, with what the passes since the step before reported.

    Operations are noted in the order in which they were accepted, and nobody else has to wait for their results.
    """

    def __init__(self, config: WandbConfig, about: Mapping[str, Any], tasks: TaskOwner) -> None:
        self._writer = _Writer(lambda: _begin(config, about))
        self._noted: deque[_Noted] = deque()
        self._is_noted = asyncio.Event()
        self._passes: list[tuple[ForwardBackwardOutput, int]] = []
        self._task = tasks.start(self._follow(), name=f"log to wandb project {config.project}")

    def note_pass(self, future: OperationFuture[ForwardBackwardOutput], datums: int) -> None:
        """Log what this pass reports with the next step."""
        self._note(_Noted(future, datums))

    def note_step(self, future: OperationFuture[OptimStepResponse]) -> None:
        """Log this step."""
        self._note(_Noted(future, 0))

    async def close(self) -> None:
        """Log the steps whose results are known, and end the run; takes 30 s at most."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def _note(self, noted: _Noted) -> None:
        if self._writer.is_working and not self._task.done():
            self._noted.append(noted)
            self._is_noted.set()

    async def _follow(self) -> None:
        try:
            while True:
                await self._is_noted.wait()
                while self._noted:
                    self._take(self._noted[0], await self._noted[0].future.settled())
                    self._noted.popleft()
                self._is_noted.clear()
        finally:
            for noted in self._noted:
                if noted.future.done():
                    self._take(noted, await noted.future.settled())
            await self._writer.close()

    def _take(self, noted: _Noted, outcome: ForwardBackwardOutput | OptimStepResponse | None) -> None:
        if isinstance(outcome, ForwardBackwardOutput):
            self._passes.append((replace(outcome, loss_fn_outputs=[]), noted.datums))
        elif outcome is not None:
            self._writer.put(self._forward_metrics() | dict(outcome.metrics or {}))

    def _forward_metrics(self) -> dict[str, float]:
        passes, self._passes = self._passes, []
        if not passes:
            return {}
        output = merged([one for one, _ in passes], [datums for _, datums in passes])
        return {FORWARD_PREFIX + name: value for name, value in ({"loss": output.loss} | output.metrics).items()}


def _begin(config: WandbConfig, about: Mapping[str, Any]) -> Any:
    wandb: Any = import_module("wandb")  # an extra, of which the type checkers need know nothing
    # Several training clients may log at once, each to a run of its own.
    return wandb.init(project=config.project, name=config.name, config=dict(about), reinit="create_new")


class _Writer:
    """A thread that begins a run, logs to it and ends it: each of these may take its time, or never return."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin = begin
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self.is_working = True
        threading.Thread(target=self._work, name="loops-wandb", daemon=True).start()

    def put(self, metrics: dict[str, Any]) -> None:
        """Log this, after what was put before."""
        if self.is_working:
            self._waiting.put(metrics)

    async def close(self) -> None:
        """Wait until everything is logged; a thread that hangs is left to itself after 30 s."""
        self._waiting.put(None)
        with anyio.move_on_after(CLOSE_SECONDS, shield=True) as patience:
            await self._ended.wait()
        if patience.cancelled_caught:
            log.warning("Weights & Biases did not finish within %g s; its last steps may be missing", CLOSE_SECONDS)

    def _work(self) -> None:
        try:
            run = self._begin()
            while (metrics := self._waiting.get()) is not None:
                run.log(metrics)
            run.finish()
        except Exception as error:
            log.warning(
                "training goes on without being logged to Weights & Biases: %s: %s", type(error).__name__, error
            )
        finally:
            self.is_working = False
            with suppress(RuntimeError):  # the loop is closed: nobody waited so long
                self._loop.call_soon_threadsafe(self._ended.set)

"""What is told of each training step: to a run of Weights & Biases or of another tracker, and to `on_step`.

Both get the same rows, in threads of their own. So they never delay training, and their errors do not stop it. A
service that shows metrics gets the caller's own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Protocol, TypeAlias

import anyio
from msgspec import Struct
from msgspec.structs import replace

from .._arguments import check_kind
from .._operations.batch import merged
from .._operations.future import OperationFuture
from .._tasks import TaskOwner
from ..errors import InputError
from ..types import ForwardBackwardOutput, OptimStepResponse, StepMetrics, WandbConfig
from .own_metrics import OwnMetricsSender

log = logging.getLogger("loops_async.operations")

OnStep: TypeAlias = Callable[[StepMetrics], object]

BEGIN_SECONDS: Final = 30.0
"""How long a new training client waits for its run to begin; later steps are kept until it has."""
CLOSE_SECONDS: Final = 30.0
FORWARD_PREFIX: Final = "forward_backward/"

OF_PASSES: Final = frozenset({"loss", "tokens"})
"""Metrics of the passes that are known without the prefix."""
COPIES: Final = {"lr": "learning_rate"}
"""Names under which some trainers repeat a metric."""
TOKENS: Final = "tokens:sum"
"""The number of tokens of all passes, where the trainer reports it; ``tokens`` would be their mean."""


class StepOptions(Struct, frozen=True):
    """Who is told of the steps of a training client."""

    wandb_config: WandbConfig | None = None
    on_step: OnStep | None = None

    def checked(self) -> StepOptions:
        """Check everything, which happens before anything is provisioned, and return this.

        Raises:
            InputError: `on_step` cannot be called, or `wandb_config` contradicts itself.
            ImportError: Weights & Biases is needed and not installed.
        """
        if self.on_step is not None and not callable(self.on_step):
            raise InputError("on_step", f"must be a function; got {type(self.on_step).__name__}")
        if self.wandb_config is not None:
            _check_config(self.wandb_config)
        return self


def _check_config(config: WandbConfig) -> None:
    if isinstance(config, WandbConfig) and config.run is not None:
        if config.project is not None or config.name is not None:
            raise InputError(
                "wandb_config", "give either a `run` that exists, or the `project` and `name` of a new one"
            )
        if not callable(getattr(config.run, "log", None)):
            raise InputError("wandb_config.run", f"must have a method log(dict); {type(config.run).__name__} has none")
        return
    if check_kind(config, WandbConfig, "wandb_config").project is None:
        raise InputError("wandb_config", "needs a `project`, or a `run` that exists")
    if find_spec("wandb") is None:
        raise ImportError("wandb_config needs Weights & Biases: pip install 'loops-async[wandb]'")


class _Pending(Struct, frozen=True):
    """An operation whose metrics will be told; `datums` is 0 for an optimizer step, whose row also has `own`."""

    future: OperationFuture[Any]
    datums: int
    own: Mapping[str, Any] = {}


class StepLog:
    """Tells of each optimizer step of one training client, with the metrics of the passes since the previous step.

    Operations are added in the order in which they were accepted; their results need no other waiter.
    """

    def __init__(
        self, options: StepOptions, run_id: str, about: Mapping[str, Any], tasks: TaskOwner, sender: OwnMetricsSender
    ) -> None:
        self._run_id = run_id
        self._tasks = tasks
        self._sender = sender
        self._tracked = None if options.wandb_config is None else _TrackedRun(options.wandb_config, about)
        sinks: list[_Sink] = [] if self._tracked is None else [self._tracked]
        sinks += [] if options.on_step is None else [_Callback(options.on_step)]
        self._tellers = [_Teller(sink) for sink in sinks]
        self._own: dict[str, Any] = {}
        self._pending: deque[_Pending] = deque()
        self._has_pending = asyncio.Event()
        self._passes: list[tuple[ForwardBackwardOutput, int]] = []
        self._is_closed = False
        self._task: asyncio.Task[None] | None = None
        if sinks:
            self._start()

    @property
    def run(self) -> Any:
        """The tracker's run; None without one, and until it has begun."""
        return None if self._tracked is None else self._tracked.run

    async def begun(self) -> None:
        """Wait until the run has begun, or has failed to, up to 30 s."""
        with anyio.move_on_after(BEGIN_SECONDS) as scope:
            for teller in self._tellers:
                await teller.has_begun.wait()
        if scope.cancelled_caught:
            log.warning("Weights & Biases has not begun after %g s; steps are kept until it has", BEGIN_SECONDS)

    def own(self, metrics: Mapping[str, Any]) -> None:
        """Add the user's metrics to the next step that is submitted."""
        self._own |= metrics

    @contextmanager
    def next_step(self) -> Generator[Mapping[str, Any]]:
        """Give the user's metrics to the step that the block submits; if that fails, they belong to the next one."""
        own, self._own = self._own, {}
        try:
            yield own
        except BaseException:
            self._own = own | self._own
            raise

    def add_pass(self, future: OperationFuture[ForwardBackwardOutput], datums: int) -> None:
        """Tell the metrics of this pass together with the next step."""
        if self._is_telling:
            self._add(_Pending(future, datums))

    def add_step(self, future: OperationFuture[OptimStepResponse], own: Mapping[str, Any]) -> None:
        """Tell of this step."""
        if self._is_telling or (own and self._sender.is_wanted):
            self._add(_Pending(future, 0, own))

    async def close(self) -> None:
        """Tell of the steps whose results are known, finish the W&B run, send what waits; takes 35 s at most."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    @property
    def _is_telling(self) -> bool:
        return any(each.is_working for each in self._tellers)

    def _start(self) -> asyncio.Task[None]:
        self._task = self._tasks.start(self._follow(), name=f"tell of the steps of run {self._run_id}")
        return self._task

    def _add(self, pending: _Pending) -> None:
        if not self._is_closed and not (self._task or self._start()).done():
            self._pending.append(pending)
            self._has_pending.set()

    async def _follow(self) -> None:
        try:
            while True:
                await self._has_pending.wait()
                while self._pending:
                    self._tell(self._pending[0], await self._pending[0].future.settled())
                    self._pending.popleft()
                self._has_pending.clear()
        finally:
            for pending in self._pending:
                if pending.future.done():
                    self._tell(pending, await pending.future.settled())
            for teller in self._tellers:
                teller.end()
            for teller in self._tellers:
                await teller.ended()
            await self._sender.flush()

    def _tell(self, pending: _Pending, outcome: ForwardBackwardOutput | OptimStepResponse | None) -> None:
        if isinstance(outcome, ForwardBackwardOutput):
            self._passes.append((replace(outcome, loss_fn_outputs=[]), pending.datums))
        elif outcome is not None:
            passes, self._passes = self._passes, []
            metrics = row(passes, outcome)
            step = metrics.get("step", 0.0)
            number = int(step) if math.isfinite(step) else 0
            told = StepMetrics(step=number, metrics=dict(pending.own) | metrics, run_id=self._run_id)
            for teller in self._tellers:
                teller.tell(told)
            if number > 0:
                self._sender.add(number, pending.own)


def row(passes: Sequence[tuple[ForwardBackwardOutput, int]], step: OptimStepResponse) -> dict[str, float]:
    """Return the metrics of a step and of the passes before it, each number under one name."""
    metrics = dict(step.metrics or {})
    for copy, name in COPIES.items():
        if copy in metrics:
            metrics.setdefault(name, metrics.pop(copy))
    return _of_passes(passes) | metrics


def _of_passes(passes: Sequence[tuple[ForwardBackwardOutput, int]]) -> dict[str, float]:
    if not passes:
        return {}
    output = merged([one for one, _ in passes], [datums for _, datums in passes])
    metrics = {"loss": output.loss} | output.metrics
    if TOKENS in metrics:
        metrics["tokens"] = metrics.pop(TOKENS)
    return {name if name in OF_PASSES else FORWARD_PREFIX + name: value for name, value in metrics.items()}


class _Sink(Protocol):
    """Who is told. The calls come from one thread, may block for long, and end it when they fail."""

    name: str

    def begin(self) -> None: ...

    def tell(self, step: StepMetrics) -> None: ...

    def end(self) -> None: ...


class _TrackedRun:
    """A run of Weights & Biases that is begun and finished here, or one of the user's, of any tracker."""

    name: str = "Weights & Biases"

    def __init__(self, config: WandbConfig, about: Mapping[str, Any]) -> None:
        self.run: Any = config.run
        self._config = config
        self._about = dict(about)
        if config.run is not None:
            self.name = f"the run of {type(config.run).__module__.partition('.')[0]}"

    def begin(self) -> None:
        if self.run is not None:
            return
        wandb: Any = import_module("wandb")  # optional: the type checkers may not find it
        # Several training clients may log at once, each to its own run.
        self.run = wandb.init(
            project=self._config.project, name=self._config.name, config=self._about, reinit="create_new"
        )

    def tell(self, step: StepMetrics) -> None:
        self.run.log(dict(step.metrics))

    def end(self) -> None:
        if self._config.run is None:
            self.run.finish()


class _Callback:
    """The user's `on_step`, which is also called after a call that failed."""

    name: str = "on_step"

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def begin(self) -> None: ...

    def tell(self, step: StepMetrics) -> None:
        try:
            self._on_step(step)
        except BaseException as error:  # also of `sys.exit`, which would end only this thread, without a word
            log.warning("on_step failed for step %d, training continues: %s: %s", step.step, _kind(error), error)

    def end(self) -> None: ...


class _Teller:
    """The thread of one who is told. It sees the context variables of the call that created the training client."""

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink
        self._queue: queue.SimpleQueue[StepMetrics | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._has_ended = asyncio.Event()
        self.has_begun: asyncio.Event = asyncio.Event()
        self.is_working: bool = True
        work = copy_context().run
        threading.Thread(target=work, args=(self._work,), name="loops-steps", daemon=True).start()

    def tell(self, step: StepMetrics) -> None:
        """Tell of this step after those before."""
        if self.is_working:
            self._queue.put(step)

    def end(self) -> None:
        """End the thread when everything is told."""
        self._queue.put(None)

    async def ended(self) -> None:
        """Wait for that; a thread that hangs is abandoned after 30 s."""
        with anyio.move_on_after(CLOSE_SECONDS, shield=True) as scope:
            await self._has_ended.wait()
        if scope.cancelled_caught:
            log.warning("%s did not finish within %g s; its last steps may be missing", self._sink.name, CLOSE_SECONDS)

    def _work(self) -> None:
        try:
            self._sink.begin()
            self._set(self.has_begun)
            while (step := self._queue.get()) is not None:
                self._sink.tell(step)
            self._sink.end()
        except BaseException as error:
            log.warning("training continues without logging to %s: %s: %s", self._sink.name, _kind(error), error)
        finally:
            self.is_working = False
            self._set(self.has_begun)
            self._set(self._has_ended)

    def _set(self, event: asyncio.Event) -> None:
        with suppress(RuntimeError):  # the loop was closed before the thread ended
            self._loop.call_soon_threadsafe(event.set)


def _kind(error: BaseException) -> str:
    return type(error).__name__

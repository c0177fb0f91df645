"""Engines for services under test: one that can be broken, and one that shows what it is asked to do."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from loops_async.types import AdamParams, Datum, ForwardBackwardOutput
from loops_local import RefusedError
from loops_local.engine.base import SampleJob, SampleOutcome
from loops_local.engine.echo import EchoAdapter, EchoEngine, EchoSampler, EchoTrainer
from tests.support.patience import PATIENCE_SECONDS


def echo_unless_broken(name: str) -> EchoEngine:
    """Load the echo engine under any name but ``broken``, whose provisioning fails."""
    if name == "broken":
        raise RefusedError("its weights are corrupt")
    return EchoEngine(name)


class WatchedEngine(EchoEngine):
    """The echo engine, with a note of all that its trainers did.

    Attributes:
        done: what was done, in order: ``("forward", first token)``, ``("forward_backward", first token)`` and
            ``("optim_step", learning rate)``.
        begun: how many operations its trainers have begun, done or not.
        training: trainers wait while this is cleared.
        reading: whatever reads a checkpoint waits while this is cleared.
        reads: how many times a checkpoint was read, or is about to be.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name
        self.done: list[tuple[str, float]] = []
        self.begun = 0
        self.training = threading.Event()
        self.training.set()
        self.reading = threading.Event()
        self.reading.set()
        self.reads = 0
        self._held: list[tuple[SampleJob, Future[SampleOutcome]]] = []
        self._is_holding = False
        self._lock = threading.Lock()

    @property
    def waiting_samples(self) -> int:
        """How many samples wait to be let go; those that their callers gave up do not."""
        return sum(not future.cancelled() for _, future in self._held)

    def begin(self) -> None:
        """Wait, as a trainer, until training may go on."""
        self.begun += 1
        self.training.wait(PATIENCE_SECONDS)

    def read(self) -> None:
        """Wait until checkpoints may be read."""
        self.reads += 1
        self.reading.wait(PATIENCE_SECONDS)

    def load_adapter(self, directory: Path) -> EchoAdapter:
        self.read()
        return super().load_adapter(directory)

    def hold_samples(self) -> None:
        """Answer no sample until `release_samples`."""
        self._is_holding = True

    def release_samples(self) -> None:
        """Answer the samples that wait, and every later one at once."""
        with self._lock:
            self._is_holding = False
            held, self._held = self._held, []
        for job, future in held:
            if future.set_running_or_notify_cancel():
                future.set_result(EchoSampler().submit(job).result())

    def sample(self, job: SampleJob) -> Future[SampleOutcome]:
        with self._lock:
            if not self._is_holding:
                return EchoSampler().submit(job)
            future: Future[SampleOutcome] = Future()
            self._held.append((job, future))
            return future

    def trainer(self, rank: int, seed: int | None = None) -> EchoTrainer:
        return _Trainer(self, rank)

    def sampler(self) -> EchoSampler:
        return _Sampler(self)


class _Trainer(EchoTrainer):
    def __init__(self, engine: WatchedEngine, rank: int) -> None:
        super().__init__(rank)
        self._engine = engine

    def forward(
        self, data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any], *, backward: bool, top_k: int = 0
    ) -> ForwardBackwardOutput:
        self._engine.begin()
        output = super().forward(data, loss_fn, config, backward=backward, top_k=top_k)
        name = "forward_backward" if backward else "forward"
        self._engine.done.append((name, data[0].model_input.to_ints()[0]))
        return output

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        self._engine.begin()
        self._engine.done.append(("optim_step", params.learning_rate))
        return super().optim_step(params)

    def load(self, directory: Path, *, optimizer: bool) -> None:
        self._engine.read()
        super().load(directory, optimizer=optimizer)


class _Sampler(EchoSampler):
    def __init__(self, engine: WatchedEngine) -> None:
        self._engine = engine

    def submit(self, job: SampleJob) -> Future[SampleOutcome]:
        return self._engine.sample(job)


class Engines:
    """Makes the engines of a service, which tests may have made before."""

    def __init__(self) -> None:
        self._engines: dict[str, WatchedEngine] = {}

    def __call__(self, name: str) -> WatchedEngine:
        return self._engines.setdefault(name, WatchedEngine(name))

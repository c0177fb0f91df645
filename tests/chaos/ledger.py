"""The truth about what a service executed: an engine that notes each call."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeAlias

from loops_async.types import AdamParams, Datum, ForwardBackwardOutput
from loops_local.engine import Engine, ModelInfo
from loops_local.engine.base import Adapter, SampleJob, SampleOutcome, Sampler, SamplerUsage, Trainer

Prompt: TypeAlias = tuple[int, ...]
Operation: TypeAlias = tuple[str, float]
"""``("forward_backward", first token)`` or ``("optim_step", learning rate)``; a program gives each its own."""


class Ledger:
    """What was executed, in order."""

    def __init__(self) -> None:
        self.training: list[Operation] = []
        self.samples: Counter[Prompt] = Counter()
        self._lock = threading.Lock()

    def note_training(self, operation: Operation) -> None:
        """Note an operation that was executed."""
        self.training.append(operation)  # by the one training thread

    def note_sample(self, prompt: Prompt) -> None:
        """Note a sample that the engine began, and that is paid for."""
        with self._lock:
            self.samples[prompt] += 1


class CountingEngine:
    """Any engine, with a ledger."""

    def __init__(self, engine: Engine, ledger: Ledger) -> None:
        self._engine = engine
        self._ledger = ledger

    @property
    def model(self) -> ModelInfo:
        return self._engine.model

    def trainer(self, rank: int, seed: int | None = None) -> Trainer:
        return _CountingTrainer(self._engine.trainer(rank, seed), self._ledger)

    def sampler(self) -> Sampler:
        return _CountingSampler(self._engine.sampler(), self._ledger)

    def load_adapter(self, directory: Path) -> Adapter:
        return self._engine.load_adapter(directory)

    def write_tokenizer(self, directory: Path) -> None:
        self._engine.write_tokenizer(directory)


class _CountingTrainer:
    def __init__(self, trainer: Trainer, ledger: Ledger) -> None:
        self._trainer = trainer
        self._ledger = ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def forward(
        self, data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any], *, backward: bool, top_k: int = 0
    ) -> ForwardBackwardOutput:
        output = self._trainer.forward(data, loss_fn, config, backward=backward, top_k=top_k)
        if backward:
            self._ledger.note_training(("forward_backward", data[0].model_input.to_ints()[0]))
        return output

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        metrics = self._trainer.optim_step(params)
        self._ledger.note_training(("optim_step", params.learning_rate))
        return metrics


class _CountingSampler:
    def __init__(self, sampler: Sampler, ledger: Ledger) -> None:
        self._sampler = sampler
        self._ledger = ledger

    def submit(self, job: SampleJob) -> Future[SampleOutcome]:
        future = self._sampler.submit(job)
        self._ledger.note_sample(tuple(job.prompt.to_ints()))
        return future

    @property
    def usage(self) -> SamplerUsage:
        return self._sampler.usage

    def close(self) -> None:
        self._sampler.close()

"""The torch engine: trainers, samplers and adapters of one base model."""

from __future__ import annotations

from pathlib import Path

from ..base import Adapter, ModelInfo, Sampler, Trainer
from .adapter import LoraAdapter
from .models import Base
from .sampler import TorchSampler
from .trainer import LoraTrainer

__all__ = ["TorchEngine"]


class TorchEngine:
    """A frozen base model, and any number of adapters as plain values."""

    def __init__(self, base: Base) -> None:
        self._base = base

    @property
    def model(self) -> ModelInfo:
        return self._base.info

    def trainer(self, rank: int, seed: int | None = None) -> Trainer:
        """Return a trainer with a new adapter; the same `seed` gives the same adapter."""
        return LoraTrainer(self._base, rank, seed)

    def sampler(self) -> Sampler:
        """Start a sampler, which has its own thread."""
        return TorchSampler(self._base)

    def load_adapter(self, directory: Path) -> Adapter:
        """Read an adapter that `Adapter.save` or `Trainer.save` wrote."""
        return LoraAdapter.read(directory, model=self._base.info.name, shapes=self._base.shapes)

    def write_tokenizer(self, directory: Path) -> None:
        """Write the model's tokenizer as `tokenizer.json` and the files that belong to it."""
        self._base.tokenizer.save_pretrained(directory)

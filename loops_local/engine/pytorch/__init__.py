"""The engine for real training and sampling: torch, on the CPU or a GPU, with models of Hugging Face's transformers."""

from __future__ import annotations

import os
from pathlib import Path

from ..base import Engine

__all__ = ["load"]

# By default, torch's threads spin while they wait for each other, and as soon as another process runs they take the
# core from the thread that they wait for: a training step took 12 s instead of 3.5 s beside one other process on two
# cores. Sleeping threads cost a tenth when nothing else runs. Torch reads this variable when it is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(model: str, *, cache_dir: Path, dtype: str = "float32", device: str = "auto") -> Engine:
    """Load a base model.

    Args:
        model: ``tiny`` (built in milliseconds, for tests), ``HuggingFaceTB/SmolLM2-135M-Instruct`` or ``smollm2`` (a
            pretrained model from the package index, converted once into `cache_dir`), a directory, or a hub id.
        cache_dir: the directory of converted models.
        dtype: the precision of the base model, ``"float32"`` or ``"bfloat16"``. Adapters are float32.
        device: where the base model is, as torch names it; ``"auto"`` is a GPU if there is one.

    Raises:
        ImportError: torch or transformers is not installed.
        RefusedError: the model cannot be loaded or used on this device, or this engine does not compute its
            architecture exactly.
    """
    try:
        from .engine import TorchEngine
        from .models import load_base
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"the torch engine needs {missing.name}, which is not installed: pip install 'loops-async[local]'",
            name=missing.name,
        ) from missing
    return TorchEngine(load_base(model, cache_dir=cache_dir, dtype=dtype, device=device))

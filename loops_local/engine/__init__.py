"""Engines: they train adapters and generate samples for the service."""

from __future__ import annotations

from pathlib import Path

from .base import Engine, EngineFactory, ModelInfo, RefusedError

__all__ = ["DTYPES", "KINDS", "Engine", "EngineFactory", "ModelInfo", "RefusedError", "load_engine"]

KINDS = ("torch", "echo")
DTYPES = ("float32", "bfloat16")


def load_engine(kind: str, model: str, *, cache_dir: Path, dtype: str = "float32", device: str = "auto") -> Engine:
    """Load `model` into an engine of `kind`.

    Args:
        kind: ``"torch"``, real training and sampling, or ``"echo"``, neither.
        model: for torch a name that `loops_local.engine.pytorch` knows, a Hugging Face directory or hub id; any
            for echo.
        cache_dir: the directory of converted models.
        dtype: for torch, the precision of the base model: one of `DTYPES`.
        device: for torch, where the base model is, e.g. ``"cpu"`` or ``"cuda"``; ``"auto"`` is a GPU if there is one.

    Raises:
        RefusedError: the model cannot be loaded, or there is no such kind, dtype or device.
        ImportError: the engine's packages are missing; the text says what to install.
    """
    # Imported here, so that the service on echo needs neither torch nor the time it takes to import.
    if dtype not in DTYPES:
        raise RefusedError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if kind == "torch":
        from . import pytorch

        return pytorch.load(model, cache_dir=cache_dir, dtype=dtype, device=device)
    if kind == "echo":
        from .echo import EchoEngine

        return EchoEngine(model)
    raise RefusedError(f"engine must be one of {', '.join(KINDS)}; got {kind!r}")

"""Engines: they train adapters and generate samples for the service."""

from __future__ import annotations

from pathlib import Path

from .base import Engine, EngineFactory, ModelInfo, RefusedError

__all__ = ["KINDS", "Engine", "EngineFactory", "ModelInfo", "RefusedError", "load_engine"]

KINDS = ("torch", "echo")


def load_engine(kind: str, model: str, *, cache_dir: Path) -> Engine:
    """Load `model` into an engine of `kind`.

    Args:
        kind: ``"torch"``, real training and sampling, or ``"echo"``, neither.
        model: for torch a name that `loops_local.engine.pytorch` knows, a Hugging Face directory or hub id; any
            for echo.
        cache_dir: the directory of converted models.

    Raises:
        RefusedError: the model cannot be loaded, or there is no such kind.
        ImportError: the engine's packages are missing; the text says what to install.
    """
    # Imported here, so that the service on echo needs neither torch nor the time it takes to import.
    if kind == "torch":
        from . import pytorch

        return pytorch.load(model, cache_dir=cache_dir)
    if kind == "echo":
        from .echo import EchoEngine

        return EchoEngine(model)
    raise RefusedError(f"engine must be one of {', '.join(KINDS)}; got {kind!r}")

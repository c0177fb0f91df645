"""Gradient checkpointing: layers recompute their activations in the backward pass, to save memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["allow", "recomputing"]


class _Current(threading.local):
    on = False


_current = _Current()


@contextmanager
def recomputing(on: bool) -> Iterator[None]:
    """Recompute in this thread if `on`; the backward pass belongs inside the block."""
    before, _current.on = _current.on, on
    try:
        yield
    finally:
        _current.on = before


def allow(network: nn.Module) -> None:
    """Make it possible to recompute the layers of `network` in some threads only, unlike transformers' own setting."""
    for layer in network.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(_forward, layer.forward)


def _forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (_current.on and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

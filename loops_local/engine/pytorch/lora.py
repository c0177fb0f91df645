"""LoRA on a shared base: linear layers that add the low-rank term of the current thread.

The module tree holds no adapter. An adapter is one flat vector, viewed as a pair (A, B) for each linear layer. So an
optimizer step, a copy and a file are each one operation, and any number of threads can use one base model with
different adapters at the same time.

Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685, section 4.1: h = W x + (alpha / r) B A x.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .products import MAX_PACKED_BYTES, Linear

__all__ = ["ALPHA", "Active", "Pair", "Shapes", "fresh", "inject", "pairs", "using"]

ALPHA = 32
"""The same for every rank, so that a good learning rate hardly depends on the rank.

Source: https://thinkingmachines.ai/blog/lora/, section "LoRA hyperparameters".
"""

Shapes: TypeAlias = Mapping[str, tuple[int, int]]
"""The adapted linear layers in the order of the model's modules: name to (outputs, inputs)."""

Pair: TypeAlias = tuple[Tensor, Tensor]
"""A of shape (rank, inputs) and B of shape (outputs, rank)."""


@dataclass(frozen=True, eq=False, slots=True)
class Active:
    """The term added to each linear layer. `gate` scales it: one number, or a tensor (rows, 1, rank) for each row."""

    weights: Mapping[str, Pair]
    gate: float | Tensor

    def term(self, name: str, x: Tensor) -> Tensor:
        a, b = self.weights[name]
        return linear(linear(x, a) * self.gate, b)


class _Current(threading.local):
    active: Active | None = None


_current = _Current()


@contextmanager
def using(active: Active | None) -> Iterator[None]:
    """Add `active` to the linear layers in this thread; a backward pass with recomputation belongs inside the block."""
    before, _current.active = _current.active, active
    try:
        yield
    finally:
        _current.active = before


class LoraLinear(Linear):
    """A linear layer that adds the thread's current low-rank term."""

    lora_name: str

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the method it overrides
        output = super().forward(input)
        active = _current.active
        return output if active is None else output + active.term(self.lora_name, input)


def inject(network: nn.Module, *, skip: nn.Module) -> Shapes:
    """Make every linear layer of `network` but `skip` a `LoraLinear`, in place.

    Experts of a mixture are not linear layers in transformers, so they stay as they are.
    """
    shapes: dict[str, tuple[int, int]] = {}
    layers = {name: one for name, one in network.named_modules() if type(one) is nn.Linear and one is not skip}
    may_pack = sum(layer.weight.nbytes for layer in layers.values()) <= MAX_PACKED_BYTES
    for name, layer in layers.items():
        LoraLinear.convert(layer, may_pack=may_pack)
        vars(layer)["lora_name"] = name
        shapes[name] = (layer.out_features, layer.in_features)
    return shapes


def size(shapes: Shapes, rank: int) -> int:
    """Return the number of parameters of an adapter."""
    return rank * sum(outputs + inputs for outputs, inputs in shapes.values())


def pairs(flat: Tensor, shapes: Shapes, rank: int) -> dict[str, Pair]:
    """View a flat vector as (A, B) for each layer; gradients flow back into the vector."""
    lengths = [rank * n for outputs, inputs in shapes.values() for n in (inputs, outputs)]
    # One `split` has one backward that concatenates; slicing would allocate the whole vector for each slice.
    parts: Sequence[Tensor] = flat.split(lengths)
    return {
        name: (parts[2 * i].view(rank, inputs), parts[2 * i + 1].view(outputs, rank))
        for i, (name, (outputs, inputs)) in enumerate(shapes.items())
    }


def fresh(shapes: Shapes, rank: int, seed: int | None) -> Tensor:
    """Return a new adapter, which changes nothing yet: A uniform in ±1/√inputs (Kaiming's with a = √5), B zero."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)
    flat = torch.zeros(size(shapes, rank))
    for a, _ in pairs(flat, shapes, rank).values():
        bound = 1 / math.sqrt(a.shape[1])
        a.uniform_(-bound, bound, generator=generator)
    return flat

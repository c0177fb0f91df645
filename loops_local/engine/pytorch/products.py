"""The products of linear layers: oneDNN's where torch has it, since torch's default is slower on some processors.

Measured on two cores with AVX-512 that are not Intel's: 8 rows through the layers of SmolLM2-135M take 57 ms with
torch's default and 34 ms with packed weights; 1,024 rows take 2.4 s with the default, 2.0 s with oneDNN.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MAX_PACKED_BYTES", "Linear", "has_onednn"]

MAX_PACKED_BYTES = 1024**3
"""The memory that a model's packed weights may take, besides the plain ones, which the backward pass needs."""

_PLAIN_FROM = 64
"""With fewer rows, oneDNN is slower than torch's default with weights that are not packed; except for output heads."""


def has_onednn(weight: Tensor) -> bool:
    """Return whether to multiply with oneDNN; torch's compiler uses the same two operators. Only x86 was measured."""
    return (
        weight.device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    )


class Linear(nn.Linear):
    """A linear layer whose weights never change."""

    onednn: bool
    may_pack: bool
    plain_from: int
    packed: Tensor | None

    @classmethod
    def convert(cls, module: nn.Linear, *, may_pack: bool, is_head: bool = False) -> None:
        """Make `module` one of these, in place, which keeps the names of parameters and all references to it."""
        module.__class__ = cls
        converted: Any = module
        converted.onednn = has_onednn(module.weight)
        converted.may_pack = may_pack and converted.onednn
        converted.plain_from = 0 if is_head else _PLAIN_FROM
        converted.packed = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the method it overrides
        if not self.onednn:
            return super().forward(input)
        if not torch.is_grad_enabled() or not input.requires_grad:
            return self._without_gradient(input)
        differentiable: Tensor = _Product.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return differentiable

    def _without_gradient(self, rows: Tensor) -> Tensor:
        if self.may_pack and self.packed is None and torch.is_inference_mode_enabled():
            self.packed = _onednn("_reorder_linear_weight")(self.weight)
        if self.packed is not None:
            return _product(rows, self.packed, self.bias)
        if rows.numel() >= self.plain_from * rows.shape[-1]:
            return _product(rows, self.weight, self.bias)
        return super().forward(rows)


class _Product(torch.autograd.Function):
    """Passes the gradient to the rows alone: the weights are frozen."""

    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        return _product(rows, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        return _product(gradient, weight.t(), None), None, None


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = _onednn("_linear_pointwise")(rows, weight, bias, "none", [], "")
    return product


def _onednn(operator: str) -> Any:
    return getattr(torch.ops.mkldnn, operator)

"""AdamW on one flat vector."""

from __future__ import annotations

import torch
from torch import Tensor

from loops_async.types import AdamParams

__all__ = ["Adam"]


class Adam:
    """Adam's moments. `step` is the number of updates."""

    def __init__(self, size: int) -> None:
        self.mean: Tensor = torch.zeros(size)
        self.square: Tensor = torch.zeros(size)
        self.step: int = 0

    def update(self, weights: Tensor, gradient: Tensor, params: AdamParams) -> Tensor:
        """Return the weights after one step, with decoupled weight decay; the argument is not changed.

        Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with the schedule folded into the learning rate.
        """
        self.step += 1
        self.mean.lerp_(gradient, 1 - params.beta1)
        self.square.mul_(params.beta2).addcmul_(gradient, gradient, value=1 - params.beta2)
        mean_bias = 1 - params.beta1**self.step
        square_bias = 1 - params.beta2**self.step
        size = (self.square / square_bias).sqrt_().add_(params.eps)
        decayed = weights * (1 - params.learning_rate * params.weight_decay)
        return decayed.addcdiv_(self.mean, size, value=-params.learning_rate / mean_bias)

"""The losses, as pure functions of the logprobs at the active positions.

Each takes vectors over the active targets and returns one loss for each of them (`dpo`: for each pair); the trainer
sums them. Notation: `p` are the trainer's logprobs of the targets in nats, with gradient; q, the wire's ``logprobs``,
those of the sampler; A the advantages; r = exp(p - q) is the importance ratio. The numbers after them are the wire's
``loss_fn_config``.

Sources: Tinker's documentation of losses, https://tinker-docs.thinkingmachines.ai/losses, whose formulas Loops
shares; for `dppo` prime-rl, https://github.com/PrimeIntellect-ai/prime-rl; for `dpo` the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..base import RefusedError

__all__ = ["LOSSES", "SKIP", "Loss", "find", "settings"]

SKIP = "skip_token_normalization"
"""The one setting that every loss has: its sum is not divided by the number of tokens at the optimizer's step."""


def cross_entropy(p: Tensor, *, weights: Tensor) -> Tensor:
    """-w p; with K targets at a position, each is a term of its own."""
    return -weights * p


def importance_sampling(p: Tensor, *, logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-r A, the off-policy policy gradient."""
    return -torch.exp(p - logprobs) * advantages


def ppo(
    p: Tensor, *, logprobs: Tensor, advantages: Tensor, clip_low_threshold: float, clip_high_threshold: float
) -> Tensor:
    """-min(r A, clip(r, low, high) A); the thresholds are ratios. Schulman et al., arXiv 1707.06347, equation 7."""
    ratio = torch.exp(p - logprobs)
    clipped = ratio.clamp(clip_low_threshold, clip_high_threshold)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def cispo(
    p: Tensor, *, logprobs: Tensor, advantages: Tensor, clip_low_threshold: float, clip_high_threshold: float
) -> Tensor:
    """-stop_gradient(clip(r, low, high)) A p. MiniMax-M1, arXiv 2506.13585."""
    ratio = torch.exp(p.detach() - logprobs).clamp(clip_low_threshold, clip_high_threshold)
    return -ratio * advantages * p


def dro(p: Tensor, *, logprobs: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """-(A p - beta/2 (p - q)²). Richemond et al., arXiv 2405.19107."""
    return -(advantages * p - 0.5 * beta * (p - logprobs) ** 2)


def dppo(
    p: Tensor,
    *,
    logprobs: Tensor,
    advantages: Tensor,
    dppo_mask_high: float,
    dppo_mask_low: float,
    adv_tau: float,
    kl_tau: float,
) -> Tensor:
    """-keep adv_tau A r + kl_tau (p - q)².

    A token is dropped (keep = 0) when its probability has already moved too far the way that its advantage pushes:
    with d = exp(p) - exp(q), when A > 0 and d > mask_high, or A <= 0 and d < -mask_low.
    """
    moved = (p.exp() - logprobs.exp()).detach()
    dropped = torch.where(advantages > 0, moved > dppo_mask_high, moved < -dppo_mask_low)
    gain = adv_tau * advantages * torch.exp(p - logprobs)
    return kl_tau * (p - logprobs) ** 2 - torch.where(dropped, 0.0, gain)


def dpo(
    p: Tensor, *, weights: Tensor, ref_logprobs: Tensor, rows: Tensor, pairs: int, beta: float, label_smoothing: float
) -> Tensor:
    """-(1 - s) log sigmoid(z) - s log sigmoid(-z) for each pair, where s is `label_smoothing`.

    z = beta [Σ w(p - ref) of the chosen row - Σ w(p - ref) of the rejected one]. `rows` says which row each position
    belongs to; even rows are chosen, each odd row is the rejected one of the row before.
    Rafailov et al., arXiv 2305.18290, equation 7; smoothing as in conservative DPO.
    """
    gains = torch.zeros(2 * pairs).index_add(0, rows, weights * (p - ref_logprobs))
    z = beta * (gains[0::2] - gains[1::2])
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


class Loss(Struct, frozen=True, kw_only=True):
    """A loss, the ``loss_fn_inputs`` that it needs or may have besides ``target_tokens``, and its settings."""

    function: Callable[..., Tensor]
    needs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = {}
    many_targets: bool = False
    paired: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.needs + self.optional

    @property
    def by_advantage(self) -> bool:
        """Whether a position counts where its advantage is not zero (else: where its weight is not)."""
        return "advantages" in self.needs


_RL = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_DPPO = {"dppo_mask_high": 0.2, "dppo_mask_low": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3}

LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(function=cross_entropy, optional=("weights",), many_targets=True),
    "importance_sampling": Loss(function=importance_sampling, needs=_RL),
    "ppo": Loss(function=ppo, needs=_RL, config=_CLIP),
    "cispo": Loss(function=cispo, needs=_RL, config=_CLIP),
    "dro": Loss(function=dro, needs=_RL, config={"beta": 0.05}),
    "dppo": Loss(function=dppo, needs=_RL, config=_DPPO),
    "dpo": Loss(
        function=dpo,
        needs=("ref_logprobs",),
        optional=("weights",),
        config={"beta": 0.1, "label_smoothing": 0.0},
        paired=True,
    ),
}


def find(name: str) -> Loss:
    """Return the loss called `name`."""
    if name not in LOSSES:
        raise RefusedError(f"loss_fn: must be one of {', '.join(LOSSES)}; got {name!r}")
    return LOSSES[name]


def settings(loss: Loss, config: Mapping[str, Any]) -> tuple[dict[str, float], bool]:
    """Return the loss's settings with defaults filled in, and whether token normalisation is to be skipped."""
    if unknown := sorted(config.keys() - loss.config.keys() - {SKIP}):
        raise RefusedError(
            f"loss_fn_config[{unknown[0]!r}]: unknown; this loss knows {', '.join([*loss.config, SKIP])}"
        )
    skip = config.get(SKIP, False)
    if not isinstance(skip, bool):
        raise RefusedError(f"loss_fn_config[{SKIP!r}]: must be true or false; got {skip!r}")
    values = {name: _number(name, config.get(name, default)) for name, default in loss.config.items()}
    if values.get("clip_low_threshold", 0.0) > values.get("clip_high_threshold", math.inf):
        raise RefusedError("loss_fn_config['clip_low_threshold']: must not exceed clip_high_threshold")
    if values.get("label_smoothing", 0.0) > 1.0:
        raise RefusedError("loss_fn_config['label_smoothing']: must be between 0 and 1")
    return values, skip


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise RefusedError(f"loss_fn_config[{name!r}]: must be a number of at least 0; got {value!r}")
    return float(value)

"""The losses, as pure functions of the logprobs at the active positions.

Each takes vectors over the active targets and returns one loss for each of them (`dpo`: for each pair); the trainer
sums them. Notation: `p` are the trainer's logprobs of the targets in nats, with gradient; q, the wire's ``logprobs``,
those of the sampler; A the advantages; r = exp(p - q) is the importance ratio. The numbers after them are the wire's
``loss_fn_config``. Which inputs and settings a loss has, and what they may be, is in `loops_async.protocol.LOSSES`.

Sources: Tinker's documentation of losses, https://tinker-docs.thinkingmachines.ai/losses, whose formulas Loops
shares; for `dppo` prime-rl, https://github.com/PrimeIntellect-ai/prime-rl; for `dpo` the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor
from torch.nn.functional import logsigmoid

from loops_async.protocol import SCORE_ALL, SKIP_NORMALIZATION, TARGET_TOKENS, LossRule, loss_rule, loss_settings

__all__ = ["Loss", "find"]


def cross_entropy(p: Tensor, *, weights: Tensor) -> Tensor:
    """-w p; with K targets at a position, each is a term of its own."""
    return -weights * p


def importance_sampling(p: Tensor, *, logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-r A, the off-policy policy gradient."""
    return -torch.exp(p - logprobs) * advantages


def ppo(
    p: Tensor, *, logprobs: Tensor, advantages: Tensor, clip_low_threshold: float, clip_high_threshold: float
) -> Tensor:
    """-min(r A, clip(r, low, high) A); the thresholds are ratios. Schulman et al., arXiv 1707.06347, equation 7.

    So r is clipped only where it has passed the threshold on the side to which its advantage pushes.
    """
    ratio = torch.exp(p.detach() - logprobs)
    clipped = torch.where(advantages > 0, ratio > clip_high_threshold, ratio < clip_low_threshold)
    bound = torch.where(advantages > 0, clip_high_threshold, clip_low_threshold)
    return -torch.where(clipped, bound, _ratio(p, logprobs, clipped)) * advantages


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
    with d = exp(p) - exp(q), when A > 0 and d > mask_high, or A <= 0 and d < -mask_low. The term of kl_tau stays.
    """
    moved = (p.exp() - logprobs.exp()).detach()
    dropped = torch.where(advantages > 0, moved > dppo_mask_high, moved < -dppo_mask_low)
    gain = adv_tau * advantages * _ratio(p, logprobs, dropped)
    distance = kl_tau * (p - logprobs) ** 2 if kl_tau else 0.0
    return distance - torch.where(dropped, 0.0, gain)


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


def _ratio(p: Tensor, logprobs: Tensor, dropped: Tensor) -> Tensor:
    """Return r, and 1 for dropped tokens: if their r overflowed, its gradient would be inf times 0, which is NaN."""
    return torch.exp((p - logprobs).masked_fill(dropped, 0.0))


_FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (cross_entropy, importance_sampling, ppo, cispo, dro, dppo, dpo)
}


class Loss(Struct, frozen=True):
    """A loss of the wire with the settings of one call, so that `function` takes tensors alone."""

    name: str
    rule: LossRule
    function: Callable[..., Tensor]
    skips_normalization: bool
    scores_all: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        """What `function` reads of an example, besides the logprobs of its targets."""
        return tuple(name for name in self.rule.inputs if name != TARGET_TOKENS)

    @property
    def by_advantage(self) -> bool:
        """Whether a position counts where its advantage is not zero (else: where its weight is not)."""
        return "advantages" in self.inputs

    @property
    def paired(self) -> bool:
        """Whether `function` returns a loss for each pair of examples (else: for each target)."""
        return self.rule.group == 2


def find(name: str, config: Mapping[str, Any]) -> Loss:
    """Return the loss called `name` with the settings of `config`, the others at their defaults.

    Raises:
        InputError: there is no such loss, or `config` breaks one of its rules.
    """
    rule = loss_rule(name)
    settings = loss_settings(name, config)
    skip, every = bool(settings.pop(SKIP_NORMALIZATION)), bool(settings.pop(SCORE_ALL))
    return Loss(name, rule, partial(_FUNCTIONS[name], **settings), skip, every)

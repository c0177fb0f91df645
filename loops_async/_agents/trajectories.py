"""From recorded calls to sequences to train on, in which every sampled token is trained once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from msgspec import Struct

from .._arguments import check_finite
from .._datums import policy_datum
from .._values import Value
from ..errors import InputError
from ..types import Datum
from .records import AgentCall, Call, shown

__all__ = ["Advantage", "Select", "Trajectory", "datums_of", "trajectories_of"]

Advantage: TypeAlias = float | Mapping[str, float] | Callable[[str], float]
"""The advantage of each sampled token: one number, or one for each call by its id."""

Select: TypeAlias = Callable[[AgentCall], bool]
"""Says which calls to train on."""


class Trajectory(Value, Struct, kw_only=True):
    """One sequence of tokens, of one call or of several that continue each other.

    Five lists have one entry for each token:

    - `tokens`: the token ids.
    - `mask`: whether the token is trained: it was sampled, its logprob is known, and no trajectory before has it.
    - `logprobs`: the sampler's logprob in nats; 0.0 where the token was not sampled.
    - `policy_versions`, `call_ids`: the weights that sampled it, and in which call; None where it was not sampled.

    `calls` are the calls in it, the first one first.

    Example:
        >>> from loops_async import Trajectory
        >>> trajectory = Trajectory(
        ...     tokens=[5, 6, 7],
        ...     mask=[False, False, True],
        ...     logprobs=[0.0, 0.0, -0.5],
        ...     policy_versions=[None, None, 1],
        ...     call_ids=[None, None, "call-1"],
        ... )
        >>> datum = trajectory.to_datum({"call-1": 2.0})
        >>> datum.model_input.to_ints(), datum.loss_fn_inputs["advantages"].data
        ([5, 6], [0.0, 2.0])
    """

    tokens: list[int] = []
    mask: list[bool] = []
    logprobs: list[float] = []
    policy_versions: list[int | None] = []
    call_ids: list[str | None] = []
    calls: list[AgentCall] = []

    def to_datum(self, advantage: float | Mapping[str, float] | Callable[[str], float] = 0.0) -> Datum:
        """Return the training example: position i holds token i, and its target is token i + 1.

        Args:
            advantage: of each token where `mask` is true: a number, a mapping from the id of a call, or a function of
                it.

        Returns:
            A `Datum` of N = ``len(tokens) - 1`` positions with ``target_tokens``, ``logprobs``, ``advantages`` and
            ``mask`` of shape (N,). Where the target is not trained, the last three are zero.

        Raises:
            InputError: there are fewer than two tokens, or the advantage of a call is missing or not finite.
        """
        if len(self.tokens) < 2:
            raise InputError("tokens", f"must have at least two tokens to be an example; has {len(self.tokens)}")
        of_call = {id_: _advantage(advantage, id_) for id_ in dict.fromkeys(self.call_ids) if id_ is not None}
        trained = [id_ if is_trained else None for id_, is_trained in zip(self.call_ids, self.mask, strict=True)]
        return policy_datum(
            self.tokens,
            [value if is_trained else 0.0 for value, is_trained in zip(self.logprobs, self.mask, strict=True)],
            [0.0 if id_ is None else of_call[id_] for id_ in trained],
            [float(is_trained) for is_trained in self.mask],
        )


def trajectories_of(calls: Sequence[Call], *, merge: bool, select: Select | None) -> list[Trajectory]:
    """Return the sequences of finished calls: one for each leaf, or for each call where they are not to be merged."""
    finished = [call for call in calls if call.status == "ok"]
    chosen = finished if select is None else [call for call, each in shown(finished).items() if select(each)]
    if not merge:
        return [_alone(*each) for each in shown(chosen).items()]
    inner = {id(each) for call in chosen for each in call.chain()[:-1]}
    untrained = {id(call) for call in chosen}
    return [_merged(call, untrained) for call in chosen if id(call) not in inner]


def datums_of(trajectories: Sequence[Trajectory], advantage: Advantage) -> list[Datum]:
    """Return the training example of each sequence."""
    return [each.to_datum(advantage) for each in trajectories]


def _merged(leaf: Call, untrained: set[int]) -> Trajectory:
    """Return the sequence that ends with a call; those of its calls that are still untrained are trained here."""
    calls = shown(leaf.chain())
    trajectory = Trajectory(calls=list(calls.values()))
    for call in calls:
        # What a prompt adds to the call before; the first one has all of its own.
        _add_prompt(trajectory, call.prompt.rest if call.prompt.parent is not None else call.prompt.tokens())
        _add_reply(trajectory, call, is_trained=id(call) in untrained)
        untrained.discard(id(call))
    return trajectory


def _alone(call: Call, as_shown: AgentCall) -> Trajectory:
    trajectory = Trajectory(calls=[as_shown])
    _add_prompt(trajectory, as_shown.prompt_tokens)
    _add_reply(trajectory, call, is_trained=True)
    return trajectory


def _add_prompt(to: Trajectory, tokens: Sequence[int]) -> None:
    to.tokens += tokens
    to.mask += [False] * len(tokens)
    to.logprobs += [0.0] * len(tokens)
    to.policy_versions += [None] * len(tokens)
    to.call_ids += [None] * len(tokens)


def _add_reply(to: Trajectory, call: Call, *, is_trained: bool) -> None:
    known = [math.isfinite(each) for each in call.logprobs]
    to.tokens += call.tokens
    to.mask += [is_trained and each for each in known]
    to.logprobs += [value if each else 0.0 for value, each in zip(call.logprobs, known, strict=True)]
    to.policy_versions += [call.policy_version] * len(call.tokens)
    to.call_ids += [call.id] * len(call.tokens)


def _advantage(advantage: Any, call_id: str) -> float:
    if callable(advantage):
        return check_finite(advantage(call_id), f"advantage({call_id!r})")
    if not isinstance(advantage, Mapping):
        return check_finite(advantage, "advantage")
    if call_id not in advantage:
        raise InputError("advantage", f"has no entry for call {call_id!r}")
    return check_finite(advantage[call_id], f"advantage[{call_id!r}]")

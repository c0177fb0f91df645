"""One rollout: a prompt, the answers sampled for it, and what the environment said between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec import Struct

from .._arguments import check_finite
from .._datums import policy_datum
from .._values import Value
from ..errors import InputError
from ..types import Datum, ModelInput, SampledSequence
from ..types.inputs import token_ids
from ..types.tensors import SupportsToList

__all__ = ["Episode", "fit"]

UNKNOWN_VERSION: Final = -1


class Episode(Value, Struct, kw_only=True):
    """One rollout as tokens: those of the prompt, of each answer, and of what the environment added in between.

    Answers are kept as the tokens that were sampled, never as text that is encoded again: so the trainer sees exactly
    what the sampler saw. Four lists have one entry for each token:

    - `tokens`: the token ids.
    - `logprobs`: the sampler's logprob in nats of each sampled token; NaN where the token was not sampled.
    - `mask`: whether the token was sampled.
    - `versions`: the service's policy version that sampled it; -1 where it was not sampled, or is not known.

    `reward` is yours to set; an episode without one cannot be trained. `stop_reason` is that of the last answer,
    `turns` the number of answers, and `metrics` are numbers of your own. `branches` are further sequences of the same
    rollout, which share its reward: those of an agent whose conversation did not only go on.

    Example:
        >>> from loops_async import Episode, SampledSequence
        >>> episode = Episode.start([5, 6])
        >>> answer = SampledSequence(tokens=[7, 8], logprobs=[-0.5, -0.25], stop_reason="stop")
        >>> datum = episode.act(answer, policy_version=3).observe([9]).datum(advantage=2.0)
        >>> datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].data
        ([5, 6, 7, 8], [6, 7, 8, 9])
        >>> datum.loss_fn_inputs["logprobs"].data, datum.loss_fn_inputs["advantages"].data
        ([0.0, -0.5, -0.25, 0.0], [0.0, 2.0, 2.0, 0.0])
    """

    tokens: list[int] = []
    logprobs: list[float] = []
    mask: list[bool] = []
    versions: list[int] = []
    reward: float | None = None
    stop_reason: str | None = None
    turns: int = 0
    metrics: dict[str, float] = {}
    branches: list[Episode] = []

    @classmethod
    def start(cls, prompt: ModelInput | Sequence[int] | SupportsToList) -> Episode:
        """Begin an episode with a prompt: token ids, as a list, an array or a `ModelInput` of text.

        Raises:
            InputError: the prompt is empty, has an image, or holds something else than token ids.
        """
        episode = cls()
        episode._append(_prompt_tokens(prompt))
        if not episode.tokens:
            raise InputError("prompt", "must have at least one token")
        return episode

    def observe(self, tokens: Sequence[int] | SupportsToList) -> Episode:
        """Append tokens that were not sampled, e.g. the environment's reply; return the episode.

        Raises:
            InputError: `tokens` holds something else than token ids.
        """
        self._append(token_ids(tokens, path="tokens"))
        return self

    def act(self, sequence: SampledSequence, *, policy_version: int | None = None) -> Episode:
        """Append a sampled answer; return the episode.

        Args:
            sequence: one of `SampleResponse.sequences`, with the logprob of each of its tokens.
            policy_version: the weights that sampled it, as in `SampleResponse.policy_version`; None: not known.

        Raises:
            InputError: a logprob is missing, not finite, or positive; the episode is unchanged.
        """
        if not isinstance(sequence, SampledSequence):
            raise InputError(
                "sequence", f"expected a SampledSequence, e.g. response.sequences[0], got {type(sequence).__name__}"
            )
        tokens = token_ids(sequence.tokens, path="sequence.tokens")
        logprobs = _checked_logprobs(sequence.logprobs, len(tokens))
        self.tokens += tokens
        self.logprobs += logprobs
        self.mask += [True] * len(tokens)
        self.versions += [UNKNOWN_VERSION if policy_version is None else policy_version] * len(tokens)
        self.stop_reason = sequence.stop_reason
        self.turns += 1
        return self

    @property
    def is_truncated(self) -> bool:
        """Whether the last answer ended because it was too long, as its `stop_reason` says."""
        return self.stop_reason == "length"

    @property
    def sampled_tokens(self) -> int:
        """The number of tokens that were sampled, in the branches, too."""
        return self.mask.count(True) + sum(branch.sampled_tokens for branch in self.branches)

    def check(self) -> None:
        """Check what a program may have changed by hand; the stream does so before it uses an episode.

        Raises:
            InputError: the lists differ in length, a sampled token has no finite logprob, or the reward is not finite.
        """
        self._checked_answers()
        for branch in self.branches:
            branch.check()

    def datum(self, advantage: float) -> Datum:
        """Return the training example: position i holds token i, and its target is token i + 1.

        Args:
            advantage: the advantage of each sampled token.

        Returns:
            A `Datum` of N = ``len(tokens) - 1`` positions, with ``target_tokens``, ``logprobs`` and ``advantages`` of
            shape (N,): the inputs of the losses ``importance_sampling``, ``ppo``, ``cispo`` and others. Where the
            target was not sampled, logprob and advantage are exactly 0.0, so that it does not count.

        Raises:
            InputError: `advantage` is not finite, there are fewer than two tokens, or `check` fails.
        """
        answers = self._checked_answers()
        advantage = check_finite(advantage, "advantage")
        size = len(self.tokens)
        if size < 2:
            raise InputError("tokens", f"must have at least two tokens to be an example; has {size}")
        logprobs, advantages = [0.0] * size, [0.0] * size
        for start, stop in answers:
            logprobs[start:stop] = self.logprobs[start:stop]
            advantages[start:stop] = [advantage] * (stop - start)
        return policy_datum(self.tokens, logprobs, advantages)

    def _append(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.logprobs += [math.nan] * len(tokens)
        self.mask += [False] * len(tokens)
        self.versions += [UNKNOWN_VERSION] * len(tokens)

    def _checked_answers(self) -> list[tuple[int, int]]:
        """Return where each stretch of sampled tokens begins and ends, if `check` finds nothing."""
        size = len(self.tokens)
        for name in ("logprobs", "mask", "versions"):
            if len(getattr(self, name)) != size:
                raise InputError(name, f"needs one entry for each of the {size} tokens; has {len(getattr(self, name))}")
        answers = list(_stretches(self.mask))
        if not all(math.isfinite(sum(self.logprobs[start:stop])) for start, stop in answers):
            raise InputError("logprobs", "must be finite where a token was sampled")
        if self.reward is not None:
            check_finite(self.reward, "reward")
        return answers


def fit(episode: Episode, longest: int) -> None:
    """Drop the tokens beyond `longest`, from which nothing can be learned: they were observed, and no answer followed.

    Raises:
        InputError: one of them was sampled.
    """
    for each in (episode, *episode.branches):
        if True in each.mask[longest:]:
            raise InputError("tokens", f"has {len(each.tokens)}, with sampled ones beyond max_episode_tokens={longest}")
        for values in (each.tokens, each.logprobs, each.mask, each.versions):
            del values[longest:]


def _stretches(mask: list[bool]) -> Iterator[tuple[int, int]]:
    """Yield where each stretch of True begins and ends: by searching, ten times faster than a loop."""
    searched = [*mask, False, True]  # so that both searches find something
    stop = 0
    while (start := searched.index(True, stop)) < len(mask):
        stop = searched.index(False, start)
        yield start, stop


def _prompt_tokens(prompt: ModelInput | Sequence[int] | SupportsToList) -> list[int]:
    if not isinstance(prompt, ModelInput):
        return token_ids(prompt, path="prompt")
    if prompt.has_images:
        raise InputError("prompt", "has an image, which an episode cannot hold; give text only")
    return prompt.to_ints()


def _checked_logprobs(logprobs: Any, size: int) -> list[float]:
    """Return the logprobs of `size` sampled tokens if each can be trained on."""
    path = "sequence.logprobs"
    given: list[float] = [] if logprobs is None else logprobs
    if isinstance(logprobs, SupportsToList):
        given = logprobs.tolist()
    if len(given) != size:
        raise InputError(path, f"needs one logprob for each of the {size} tokens; has {len(given)}")
    if not _are_logprobs(given):
        for index, one in enumerate(given):
            if not _are_logprobs([one]):
                raise InputError(f"{path}[{index}]", f"must be finite and at most 0, in nats; got {one!r}")
    return given


def _are_logprobs(values: list[float]) -> bool:
    try:
        # The sum is finite only if each of them is, which costs a tenth of a loop.
        return max(values, default=0.0) <= 0.0 and math.isfinite(sum(values))
    except TypeError:  # e.g. None
        return False

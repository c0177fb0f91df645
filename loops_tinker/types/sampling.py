"""Arguments and results of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._value import Value
from .tensors import TensorData

__all__ = [
    "SampleResponse",
    "SampledSequence",
    "SamplingClientKind",
    "SamplingParams",
    "StopReason",
    "TopkLists",
    "TopkLogprobs",
]

StopReason: TypeAlias = Literal["length", "stop"]
SamplingClientKind: TypeAlias = Literal["snapshot", "inflight"]
TopkLists: TypeAlias = list[list[tuple[int, float]] | None]
"""At each position the most likely tokens and their logprobs in nats; None where they are not known."""

NO_LOGPROB: Final = -99999.0


@dataclass(frozen=True, kw_only=True, eq=False)
class TopkLogprobs(Value):
    """The same as two arrays of one row for each position; what is not known is token 0 with logprob -99999."""

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Value):
    """How to sample; `stop` are texts or token ids that end a sequence."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1
    top_k: int = -1
    top_p: float = 1


@dataclass(frozen=True, init=False)
class SampledSequence(Value):
    """One completion: its tokens, and their logprobs in nats.

    Give lists or arrays. `sequence_id` is unique; Loops has none, so it is made here.
    """

    tokens: list[int]
    logprobs: list[float] | None
    stop_reason: StopReason
    sequence_id: str
    topk_logprobs: TopkLists | None

    def __init__(
        self,
        *,
        tokens: Sequence[int] | None = None,
        logprobs: Sequence[float] | None = None,
        stop_reason: StopReason = "length",
        sequence_id: str = "",
        topk_logprobs: TopkLists | None = None,
        tokens_np: NDArray[Any] | None = None,
        logprobs_np: NDArray[Any] | None = None,
    ) -> None:
        if tokens is None and tokens_np is None:
            raise TypeError("a SampledSequence needs tokens or tokens_np")
        self.__dict__.update(
            tokens=_listed(tokens_np) if tokens is None else tokens,
            logprobs=_listed(logprobs_np) if logprobs is None else logprobs,
            stop_reason=stop_reason,
            sequence_id=sequence_id,
            topk_logprobs=topk_logprobs,
        )

    @cached_property
    def tokens_np(self) -> NDArray[np.int32]:
        """The tokens, int32."""
        return np.asarray(self.tokens, dtype=np.int32)

    @cached_property
    def logprobs_np(self) -> NDArray[np.float32] | None:
        """The logprobs in nats, float32."""
        return None if self.logprobs is None else np.asarray(self.logprobs, dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class SampleResponse(Value):
    """The completions of one prompt, and where asked for, the logprobs of the prompt in nats, None for the first."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: TopkLists | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: None = None

    @cached_property
    def prompt_logprobs_np(self) -> NDArray[np.float32] | None:
        """The logprobs of the prompt, float32; NaN for the first."""
        return None if self.prompt_logprobs is None else np.array(self.prompt_logprobs, dtype=np.float32)

    @cached_property
    def topk_prompt_logprobs_np(self) -> TopkLogprobs | None:
        """The most likely tokens at each position of the prompt, as arrays."""
        return None if self.topk_prompt_logprobs is None else _arrays(self.topk_prompt_logprobs)


def _arrays(positions: TopkLists) -> TopkLogprobs:
    shape = len(positions), max((len(each) for each in positions if each), default=0)
    found = TopkLogprobs(token_ids=np.zeros(shape, np.int32), logprobs=np.full(shape, NO_LOGPROB, np.float32))
    for index, position in enumerate(positions):
        for rank, (token, logprob) in enumerate(position or ()):
            found.token_ids[index, rank], found.logprobs[index, rank] = token, logprob
    return found


def _listed(array: NDArray[Any] | None) -> Any:
    return None if array is None else array.tolist()

"""Arguments and results of sampling."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from msgspec import Meta, Struct

from .._values import Value
from ..errors import LoopsError
from .inputs import ExternalRef

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["SampleResponse", "SampleResult", "SampledPrompt", "SampledSequence", "SamplingParams"]


class SamplingParams(Value, Struct, frozen=True, kw_only=True):
    """How to sample.

    `max_tokens` limits the completion. `temperature` 0 is greedy decoding. `top_k` -1 and `top_p` 1.0 disable these
    filters. `stop` is a string, a list of strings or a list of token ids. With a `seed`, the same request returns
    the same samples; the samples of one request still differ from each other.
    """

    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=1e308)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = -1
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    structured_outputs: dict[str, Any] | None = None


# `dict=True` gives `cached_property` a place to store its values.
class SampledSequence(Value, Struct, frozen=True, kw_only=True, dict=True):
    """One completion: its `tokens`, the logprob of each in nats, and why it ended.

    `stop_reason` is ``"stop"`` or ``"length"``; a value that this version does not know is kept unchanged.
    A logprob that the service could not compute is NaN. `tokens_array` and `logprobs_array` hold the same numbers as
    read-only numpy arrays, created on first access: later accesses, slices and views copy nothing.

    Example:
        >>> from loops_async import SampledSequence
        >>> sequence = SampledSequence(tokens=[7, 8], logprobs=[-0.5, -0.25])
        >>> float(sequence.logprobs_array.sum())
        -0.75
    """

    tokens: list[int] = []
    logprobs: list[float] | None = None
    stop_reason: str = "length"
    text: str | None = None
    routed_experts: ExternalRef | None = None

    @cached_property
    def tokens_array(self) -> NDArray[np.int64]:
        """The token ids, int64 of shape (number of tokens,); needs numpy."""
        import numpy as np

        array = np.array(self.tokens, dtype=np.int64)
        array.flags.writeable = False
        return array

    @cached_property
    def logprobs_array(self) -> NDArray[np.float64]:
        """The logprobs in nats, float64 of shape (number of tokens,), all NaN where there are none; needs numpy."""
        import numpy as np

        array = (
            np.full(len(self.tokens), np.nan) if self.logprobs is None else np.array(self.logprobs, dtype=np.float64)
        )
        array.flags.writeable = False
        return array


TopK: TypeAlias = list[tuple[int, float]]


class SampleResponse(Value, Struct, frozen=True, kw_only=True):
    """The completions of one prompt.

    `policy_version` is the adapter version that generated them, if the sampler reports it. The fields about the prompt
    are only set when they were requested: `prompt_logprobs[i]` is the logprob of prompt token i in nats, None for the
    first; `topk_prompt_logprobs[i]` lists ``(token id, logprob)``, most likely first. `request_id` is the id to quote
    to support, as in `ApiError`; None where the service sends none. Two requests have different ids, so to compare
    what they sampled, compare their `sequences`.
    """

    sequences: list[SampledSequence] = []
    policy_version: int | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[TopK | None] | None = None
    request_id: str | None = None


SampleResult = SampleResponse


class SampledPrompt(Value, Struct, frozen=True, kw_only=True):
    """The result of one of many prompts: either a `response` or an `error` for prompt number `index`, from 0."""

    index: int
    response: SampleResponse | None = None
    error: LoopsError | None = None

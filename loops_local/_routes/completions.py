"""Samples on the wire, and as an engine sees them. Source: data-plane reference 3.4 and 3.5."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from loops_async import protocol as wire
from loops_async.types import EncodedTextChunk, ModelInput, SamplingParams

from .engine.base import Adapter, Completion, SampleJob, SampleOutcome
from .web import HttpError, bad_request, decode

__all__ = ["completions", "decode_sample", "make_job", "refusal"]

T = TypeVar("T")

_MOST_SAMPLES = 4096
_MOST_PROMPT_LOGPROBS = wire.MAX_TOP_K_LOGPROBS

_SAMPLE = msgspec.json.Decoder(wire.SampleBody)


def decode_sample(raw: bytes) -> wire.SampleBody:
    """Decode the body of a request."""
    try:
        return decode(raw, _SAMPLE)
    except HttpError as problem:
        raise bad_request(str(problem)) from problem


def make_job(body: wire.SampleBody, adapter: Adapter | None, limit: int) -> SampleJob:
    """Return what the engine is to do; `limit` is the longest sequence."""
    prompt = ModelInput([EncodedTextChunk(body.prompt)])
    if body.model_input_chunks is not UNSET:
        prompt = ModelInput(body.model_input_chunks)
    prompt_logprobs = _given(body.prompt_logprobs)
    if body.include_routed_experts is True:
        raise refusal("include_routed_experts: this model has no routed experts")
    if not 1 <= body.n <= _MOST_SAMPLES:
        raise bad_request(f"n: must be 1 to {_MOST_SAMPLES}; got {body.n}")
    if prompt_logprobs is not None and not 0 <= prompt_logprobs <= _MOST_PROMPT_LOGPROBS:
        raise bad_request(f"prompt_logprobs: must be 0 to {_MOST_PROMPT_LOGPROBS}; got {prompt_logprobs}")
    if not prompt.length:
        raise bad_request("prompt: must have at least one token")
    params = _params(body)
    wanted = prompt.length + (params.max_tokens or 1)
    if wanted > limit:
        raise bad_request(
            f"prompt: this model's longest sequence is {limit} tokens; the prompt has {prompt.length} and "
            f"{params.max_tokens or 1} more were asked for"
        )
    return SampleJob(prompt=prompt, num_samples=body.n, params=params, adapter=adapter, prompt_logprobs=prompt_logprobs)


def _params(body: wire.SampleBody) -> SamplingParams:
    stop = _given(body.stop)
    words: list[str | int] = [stop] if isinstance(stop, str) else [*(stop or [])]
    words += [] if body.stop_token_ids is UNSET else body.stop_token_ids
    given = {
        "max_tokens": _given(body.max_tokens),
        "seed": _given(body.seed),
        "stop": words or None,
        "temperature": body.temperature,
        # vLLM takes both 0 and -1 for "off".
        "top_k": (0 if body.top_k is UNSET else body.top_k) or -1,
        "top_p": body.top_p,
        "structured_outputs": _given(body.structured_outputs),
    }
    try:
        return msgspec.convert(given, SamplingParams)
    except msgspec.ValidationError as error:
        raise bad_request(str(error)) from error


def _given(value: T | UnsetType) -> T | None:
    return None if isinstance(value, UnsetType) else value


def refusal(message: str) -> HttpError:
    """What the engine cannot do."""
    return HttpError(422, "REFUSED", message, error=message)


def completions(body: wire.SampleBody, job: SampleJob, outcome: SampleOutcome) -> wire.Completions:
    """Return the body of the answer."""
    scores = _prompt_logprobs(outcome)
    prompt = job.prompt.to_ints() if body.return_token_ids is True else None
    return wire.Completions(
        choices=[
            _choice(index, completion, scores, prompt, body) for index, completion in enumerate(outcome.completions)
        ]
    )


def _choice(
    index: int,
    completion: Completion,
    scores: wire.PromptLogprobs | None,
    prompt: list[int] | None,
    body: wire.SampleBody,
) -> wire.Choice:
    logprobs = None
    if body.logprobs is not None:
        names: list[Any] = [f"token_id:{token}" for token in completion.tokens]
        logprobs = wire.ChoiceLogprobs(tokens=names, token_logprobs=list(completion.logprobs))
    return wire.Choice(
        index=index,
        text=completion.text,
        finish_reason=completion.finish_reason,
        logprobs=logprobs,
        prompt_logprobs=scores,
        prompt_token_ids=prompt,
        token_ids=completion.tokens,
    )


def _prompt_logprobs(outcome: SampleOutcome) -> wire.PromptLogprobs | None:
    if outcome.prompt_logprobs is None:
        return None
    return [
        None if scores is None else {str(token): wire.PromptLogprob(logprob) for token, logprob in scores.items()}
        for scores in outcome.prompt_logprobs
    ]

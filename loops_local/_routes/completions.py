"""Converts samples between the wire and the engine. Source: data-plane reference 3.4 and 3.5."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from loops_async import protocol as wire
from loops_async.errors import InputError
from loops_async.types import EncodedTextChunk, ModelInput, SamplingParams

from .._errors import HttpError
from .._http.parsing import input_error
from ..engine.base import Adapter, Completion, SampleJob, SampleOutcome, fits

__all__ = ["completions", "refused", "sample_job"]

T = TypeVar("T")

_MAX_SAMPLES = 4096


def sample_job(body: wire.SampleBody, adapter: Adapter | None, max_seq_len: int) -> SampleJob:
    """Return what the engine has to generate."""
    prompt = ModelInput([EncodedTextChunk(body.prompt)])
    if body.model_input_chunks is not UNSET:
        prompt = ModelInput(body.model_input_chunks)
    prompt_logprobs = _given(body.prompt_logprobs)
    if body.include_routed_experts is True:
        raise refused("include_routed_experts: this model has no routed experts")
    if not 1 <= body.n <= _MAX_SAMPLES:
        raise InputError("n", f"must be 1 to {_MAX_SAMPLES}; got {body.n}")
    if prompt_logprobs is not None and not 0 <= prompt_logprobs <= wire.MAX_TOP_K_LOGPROBS:
        raise InputError("prompt_logprobs", f"must be 0 to {wire.MAX_TOP_K_LOGPROBS}; got {prompt_logprobs}")
    if not prompt.length:
        raise InputError("prompt", "must have at least one token")
    params = _sampling_params(body)
    max_tokens = params.max_tokens or 1
    if not fits(prompt.length, max_tokens, max_seq_len, scoring=prompt_logprobs is not None):
        raise InputError(
            "prompt",
            f"this model's longest sequence is {max_seq_len} tokens; the prompt has {prompt.length} and {max_tokens} "
            "more were asked for",
        )
    return SampleJob(prompt=prompt, num_samples=body.n, params=params, adapter=adapter, prompt_logprobs=prompt_logprobs)


def _sampling_params(body: wire.SampleBody) -> SamplingParams:
    stop = _given(body.stop)
    stops: list[str | int] = [stop] if isinstance(stop, str) else [*(stop or [])]
    stops += [] if body.stop_token_ids is UNSET else body.stop_token_ids
    given = {
        "max_tokens": _given(body.max_tokens),
        "seed": _given(body.seed),
        "stop": stops or None,
        "temperature": body.temperature,
        # In vLLM, both 0 and -1 mean no limit.
        "top_k": (0 if body.top_k is UNSET else body.top_k) or -1,
        "top_p": body.top_p,
        "structured_outputs": _given(body.structured_outputs),
    }
    try:
        return msgspec.convert(given, SamplingParams)
    except msgspec.ValidationError as error:
        raise input_error(error) from error


def _given(value: T | UnsetType) -> T | None:
    return None if isinstance(value, UnsetType) else value


def refused(message: str) -> HttpError:
    """The engine cannot generate this."""
    return HttpError(422, "REFUSED", message, error=message)


def completions(body: wire.SampleBody, job: SampleJob, outcome: SampleOutcome) -> wire.Completions:
    """Return the body of the response."""
    prompt_logprobs = _prompt_logprobs(outcome)
    prompt = job.prompt.to_ints() if body.return_token_ids is True else None
    return wire.Completions(
        choices=[
            _choice(index, completion, prompt_logprobs, prompt, body)
            for index, completion in enumerate(outcome.completions)
        ]
    )


def _choice(
    index: int,
    completion: Completion,
    prompt_logprobs: wire.PromptLogprobs | None,
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
        prompt_logprobs=prompt_logprobs,
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

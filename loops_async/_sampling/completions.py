"""Reading the answer to a sample request. It is already paid for, so every part that can be read is kept."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar, cast

import msgspec
from msgspec import Struct

from .. import protocol
from ..errors import ProtocolError
from ..types import ExternalRef, SampledSequence, SampleResponse
from ..types.sampling import TopK

T = TypeVar("T")

log = logging.getLogger("loops_async")


class _Usage(Struct):
    completion_tokens: int | None = None


class _Logprobs(Struct, gc=False):
    token_logprobs: list[float]


class _Choice(protocol.ChoiceBase, kw_only=True, gc=False):
    """The usual form of a completion: it has all ids and logprobs, so its token names need not be decoded."""

    token_ids: list[int]
    logprobs: _Logprobs | None = None


class _Completions(Struct, kw_only=True, gc=False):
    choices: list[_Choice]
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Completions).decode


def read_completions(
    body: bytes | msgspec.Raw,
    *,
    prompt: list[int],
    topk: int,
    policy_version: str = "",
    clean: Callable[[str], str] = str,
) -> SampleResponse:
    """Read the body of an answer.

    Args:
        body: JSON in the manner of OpenAI completions (data-plane reference 3.5).
        prompt: the token ids that were sent; those in the answer take precedence, since a service expands images.
        topk: how many candidates were requested at each prompt position.
        policy_version: the answer's header with the version of the weights, if there is one.
        clean: removes secrets from the part of the body that an error shows.

    Raises:
        ProtocolError: the body has no list of completions.
    """
    try:
        answer = _decode(body)
    except msgspec.DecodeError as error:
        answer = _read_malformed(body, error, clean)
    first = answer.choices[0] if answer.choices else None
    expanded = first.prompt_token_ids if first else None
    scored = first.prompt_logprobs if first else None
    prompt = expanded or prompt
    echo = len(prompt) if _echoes(answer, prompt) else 0
    return SampleResponse(
        sequences=[_sequence(choice, echo) for choice in answer.choices],
        policy_version=int(policy_version) if policy_version.isdecimal() else None,
        prompt_token_ids=expanded,
        prompt_logprobs=[_own_logprob(*pair) for pair in zip(scored, prompt, strict=False)] if scored else None,
        topk_prompt_logprobs=[_top(candidates, topk) for candidates in scored] if scored and topk else None,
    )


def _echoes(answer: _Completions, prompt: list[int]) -> bool:
    """Whether the completions begin with the prompt, shown by a `usage` that does not count it as generated.

    To compare the tokens is not enough: a generated completion may repeat its prompt.
    """
    counted = answer.usage.completion_tokens if answer.usage else None
    sent = sum(len(choice.token_ids) for choice in answer.choices)
    if counted is None or counted == sent or sent != counted + len(prompt) * len(answer.choices):
        return False
    return all(choice.token_ids[: len(prompt)] == prompt for choice in answer.choices)


def _sequence(choice: _Choice, echo: int) -> SampledSequence:
    tokens = choice.token_ids[echo:] if echo else choice.token_ids
    logprobs = choice.logprobs.token_logprobs if choice.logprobs else None
    if logprobs is not None and len(logprobs) != len(tokens):
        logprobs = _aligned(logprobs, len(tokens))
    return SampledSequence(
        tokens=tokens,
        logprobs=logprobs,
        stop_reason=choice.finish_reason or "length",
        text=choice.text,
        routed_experts=choice.routed_experts_ref,
    )


def _aligned(logprobs: list[float], count: int) -> list[float]:
    """Return the logprobs of the last `count` tokens; those before belong to an echo of the prompt."""
    if len(logprobs) < count:
        log.warning("the sampler sent %d logprobs for %d tokens; the missing ones are NaN", len(logprobs), count)
        return logprobs + [math.nan] * (count - len(logprobs))
    return logprobs[len(logprobs) - count :]


def _own_logprob(candidates: Mapping[str, protocol.PromptLogprob] | None, token: int) -> float | None:
    own = candidates.get(str(token)) if candidates else None
    return own.logprob if own else None


def _top(candidates: Mapping[str, protocol.PromptLogprob] | None, topk: int) -> TopK | None:
    if candidates is None:
        return None
    scored = [
        (int(token), one.logprob) for token, one in candidates.items() if one.logprob is not None and token.isdecimal()
    ]
    return sorted(scored, key=lambda pair: -pair[1])[:topk]


# --- malformed answers -----------------------------------------------------------------------------------------------


def _read_malformed(body: bytes | msgspec.Raw, error: Exception, clean: Callable[[str], str]) -> _Completions:
    """Read the valid parts of an answer that has invalid fields."""
    try:
        # Unlike msgspec, this accepts NaN and Infinity, which some services write.
        raw = _dict(json.loads(bytes(body)))
    except ValueError:
        raw = {}
    choices = raw.get("choices")
    if not _is_list(choices):
        begin = clean(bytes(body).decode("utf-8", "replace"))[:200]
        raise ProtocolError(
            f"the sampler answered 200 with a body that is not a completion: {error}; it begins with {begin!r}"
        ) from error
    return _Completions(
        choices=[_malformed_choice(_dict(choice)) for choice in choices], usage=_converted(raw.get("usage"), _Usage)
    )


def _malformed_choice(raw: dict[str, Any]) -> _Choice:
    logprobs = _dict(raw.get("logprobs"))
    scores, names = logprobs.get("token_logprobs"), logprobs.get("tokens")
    ids = raw.get("token_ids")
    reason = raw.get("finish_reason")
    return _Choice(
        text=_converted(raw.get("text"), str),
        finish_reason=reason if isinstance(reason, str) or reason is None else str(reason),
        token_ids=_token_ids(ids if _is_list(ids) else names),
        logprobs=_Logprobs([_number(score) for score in scores]) if _is_list(scores) else None,
        prompt_logprobs=_converted(raw.get("prompt_logprobs"), protocol.PromptLogprobs),
        prompt_token_ids=_converted(raw.get("prompt_token_ids"), list[int]),
        routed_experts_ref=_converted(raw.get("routed_experts_ref"), ExternalRef),
    )


def _token_ids(names: Any) -> list[int]:
    """Read ids, or names like ``"token_id:7"``; return [] if a token has another name."""
    if not _is_list(names):
        return []
    try:
        return [int(name.removeprefix("token_id:")) if isinstance(name, str) else int(name) for name in names]
    except (TypeError, ValueError, OverflowError):
        log.warning("the sampler's names of tokens are not their ids, so only the text is known: %.80r", names)
        return []


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _converted(value: Any, kind: type[T] | Any) -> T | None:
    """Return `value` converted to `kind`, None if that is not possible."""
    try:
        found: T = msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        if value is not None:
            log.warning("a part of the sampler's answer is invalid and ignored: %s", problem)
        return None
    return found


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _dict(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}

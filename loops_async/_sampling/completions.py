"""Reading the answer to a sample request. It is already paid for, so every part that can be read is kept."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from .. import protocol
from .._http.decoding import UNREADABLE
from .._kinds import dict_or_empty, is_list
from .._work.usage import Counts
from ..errors import ProtocolError
from ..types import ExternalRef, SampledSequence, SampleResponse
from ..types.sampling import TopK

T = TypeVar("T")

log = logging.getLogger("loops_async.sampling")

_TokenIds: TypeAlias = list[Annotated[int, Meta(ge=protocol.INT64[0], le=protocol.INT64[-1])]]


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Logprobs(Struct, gc=False):
    token_logprobs: list[float]
    tokens: Raw = Raw(b"[]")


class _Choice(protocol.ChoiceBase, kw_only=True, gc=False):
    """The usual form of a completion: no logprob is missing. Without `token_ids`, the ids are in the token names."""

    token_ids: _TokenIds | None = None
    logprobs: _Logprobs | None = None


class _Completions(Struct, kw_only=True, gc=False):
    choices: list[_Choice]
    usage: _Usage | None = None


_NO_USAGE: Final = _Usage()
_NAME: Final = b'"token_id:'
_MOST_DIGITS: Final = 18
_EXCERPT: Final = 200
_EXCERPT_READ: Final = 10 * _EXCERPT
_CHOICES: Final = re.compile(r'"choices"\s*:\s*\[\s*')
_COMMA: Final = re.compile(r"\s*,\s*")
_decode: Final = msgspec.json.Decoder(_Completions).decode
_decode_ids: Final = msgspec.json.Decoder(_TokenIds).decode


def read_completions(
    body: bytes | msgspec.Raw,
    *,
    prompt: list[int],
    topk: int,
    policy_version: str = "",
    request_id: str | None = None,
    clean: Callable[[str], str] = str,
    counts: Counts | None = None,
    prompt_length: int | None = None,
) -> SampleResponse:
    """Read the body of an answer.

    Args:
        body: JSON in the manner of OpenAI completions (data-plane reference 3.5).
        prompt: the token ids that were sent; those in the answer take precedence, since a service expands images.
        topk: how many candidates were requested at each prompt position.
        policy_version: the answer's header with the version of the weights, if there is one.
        request_id: the answer's id, if it has one.
        clean: removes secrets from the part of the body that an error shows.
        counts: where the tokens are counted: those that the service reports, else those that were sent and received.
        prompt_length: the positions of the prompt; None for one without images.

    Raises:
        ProtocolError: the body has no list of completions.
    """
    try:
        answer = _with_ids(_decode(body))
    except UNREADABLE as error:
        malformed = _read_malformed(bytes(body), error, clean)
        if isinstance(malformed, ProtocolError):
            del body  # tracebacks that show local variables must not show what a service echoed
            raise malformed from error.with_traceback(None)
        answer = malformed
    first = answer.choices[0] if answer.choices else None
    expanded = first.prompt_token_ids if first else None
    scored = first.prompt_logprobs if first else None
    prompt = expanded or prompt
    echo = len(prompt) if _echoes(answer, prompt) else 0
    sequences = [_sequence(choice, echo) for choice in answer.choices]
    if counts is not None:
        usage = answer.usage or _NO_USAGE
        sent = len(prompt) if prompt_length is None or expanded else prompt_length
        received = sum(len(sequence.tokens) for sequence in sequences)
        counts.sampled(_reported(usage.prompt_tokens, sent), _reported(usage.completion_tokens, received))
    return SampleResponse(
        sequences=sequences,
        policy_version=_number_in(policy_version),
        request_id=request_id,
        prompt_token_ids=expanded,
        prompt_logprobs=[_own_logprob(*pair) for pair in zip(scored, prompt, strict=False)] if scored else None,
        topk_prompt_logprobs=[_top(candidates, topk) for candidates in scored] if scored and topk else None,
    )


def _reported(count: int | None, own: int) -> int:
    return own if count is None or count < 0 else count


def _with_ids(answer: _Completions) -> _Completions:
    """Give every completion its token ids, from the tokens' names where the service sent no ids."""
    for choice in answer.choices:
        if choice.token_ids is None:
            choice.token_ids = _ids_of(bytes(choice.logprobs.tokens)) if choice.logprobs else []
    return answer


def _ids_of(names: bytes) -> list[int]:
    """Read ``["token_id:7","token_id:8"]`` without making a string of each name."""
    digits = names.translate(None, _NAME)
    ids = _decode_ids(digits)
    # The length proves that nothing but the prefixes and quotation marks was deleted.
    if ids and (not names.startswith(b"[" + _NAME) or len(names) - len(digits) != (len(_NAME) + 1) * len(ids)):
        raise ValueError("the names of tokens are not their ids")
    return ids


def _echoes(answer: _Completions, prompt: list[int]) -> bool:
    """Whether the completions begin with the prompt, shown by a `usage` that does not count it as generated.

    To compare the tokens is not enough: a generated completion may repeat its prompt.
    """
    counted = answer.usage.completion_tokens if answer.usage else None
    sent = sum(len(choice.token_ids or ()) for choice in answer.choices)
    if counted is None or counted == sent or sent != counted + len(prompt) * len(answer.choices):
        return False
    return all(choice.token_ids and choice.token_ids[: len(prompt)] == prompt for choice in answer.choices)


def _sequence(choice: _Choice, echo: int) -> SampledSequence:
    tokens = choice.token_ids or []
    if echo:
        tokens = tokens[echo:]
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
        (token, one.logprob)
        for token, one in zip(map(_number_in, candidates), candidates.values(), strict=True)
        if token is not None and one.logprob is not None
    ]
    return sorted(scored, key=lambda pair: -pair[1])[:topk]


def _number_in(text: str) -> int | None:
    """Return a number of decimal digits, e.g. of a header; None for any other text."""
    return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else None


# --- malformed answers -----------------------------------------------------------------------------------------------


def _read_malformed(body: bytes, error: Exception, clean: Callable[[str], str]) -> _Completions | ProtocolError:
    """Read the valid parts of an answer that is damaged or has invalid fields; return the error if it has none."""
    text = body.decode("utf-8-sig", "replace")
    raw = _object_in(text)
    choices = raw.get("choices")
    if not is_list(choices):
        begin = repr(clean(text[:_EXCERPT_READ])[:_EXCERPT])
        failure = ProtocolError(
            f"the sampler answered 200 with a body that is not a completion: {error}; it begins with {begin}. "
            "The sample may have been paid for, so it is not repeated"
        )
        failure.quote = begin
        return failure
    return _Completions(
        choices=[_malformed_choice(dict_or_empty(choice)) for choice in choices],
        usage=_converted(raw.get("usage"), _Usage),
    )


def _object_in(text: str) -> dict[str, Any]:
    """Read a JSON object; if it is damaged, its completions before the damage."""
    try:
        return dict_or_empty(_json.decode(text))
    except UNREADABLE as problem:
        choices = list(_choices_in(text))
        if not choices:
            return {}
        log.warning("the sampler's answer is damaged; the first %d completions can be read: %s", len(choices), problem)
        return {"choices": choices}


def _choices_in(text: str) -> Iterator[Any]:
    place = _CHOICES.search(text)
    while place is not None:
        try:
            choice, end = _json.raw_decode(text, place.end())
        except UNREADABLE:
            return
        yield choice
        place = _COMMA.match(text, end)


def _malformed_choice(raw: dict[str, Any]) -> _Choice:
    logprobs = dict_or_empty(raw.get("logprobs"))
    scores, reason = logprobs.get("token_logprobs"), raw.get("finish_reason")
    return _Choice(
        text=_text(raw.get("text")),
        finish_reason=None if reason is None else _text(str(reason)),
        token_ids=_token_ids(raw.get("token_ids"), logprobs.get("tokens")),
        logprobs=_Logprobs([_number(score) for score in scores]) if is_list(scores) else None,
        prompt_logprobs=_prompt_logprobs(raw.get("prompt_logprobs")),
        prompt_token_ids=_converted(raw.get("prompt_token_ids"), _TokenIds),
        routed_experts_ref=_converted(raw.get("routed_experts_ref"), ExternalRef),
    )


def _token_ids(*candidates: Any) -> list[int]:
    """Return the first list of ids, or of names like ``"token_id:7"``; [] if there is none."""
    given = [names for names in candidates if is_list(names)]
    for names in given:
        try:
            return msgspec.convert([_token_id(name) for name in names], _TokenIds)
        except UNREADABLE:
            continue
    if given:
        log.warning("the sampler's names of tokens are not their ids, so only the text is known")
    return []


def _token_id(name: Any) -> Any:
    if isinstance(name, str):
        return int(name.removeprefix("token_id:"))
    return int(name) if isinstance(name, float) and name.is_integer() else name


def _prompt_logprobs(scored: Any) -> protocol.PromptLogprobs | None:
    """Read all positions, or each by itself; one that cannot be read has no logprobs."""
    whole = _converted(scored, protocol.PromptLogprobs)
    if whole is not None or not is_list(scored):
        return whole
    return [_converted(position, dict[str, protocol.PromptLogprob], is_logged=False) for position in scored]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, *UNREADABLE):
        return math.nan


def _text(value: Any) -> str | None:
    """Return a text without halves of surrogate pairs, which cannot be written anywhere."""
    if not isinstance(value, str):
        return None
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _converted(value: Any, kind: type[T] | Any, *, is_logged: bool = True) -> T | None:
    """Return `value` converted to `kind`, None if that is not possible."""
    if value is None:
        return None
    try:
        found: T = msgspec.convert(value, kind)
    except UNREADABLE as problem:
        if is_logged:
            log.warning("a part of the sampler's answer is invalid and ignored: %s", problem)
        return None
    return found


def _integer(digits: str) -> float:
    """Read an integer of JSON; Python refuses to convert one of thousands of digits."""
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


# Unlike msgspec, this accepts NaN and Infinity, which some services write.
_json: Final = json.JSONDecoder(parse_int=_integer, strict=False)

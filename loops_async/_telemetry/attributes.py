"""What spans and metrics say of work: facts, never content."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TypeAlias
from urllib.parse import urlsplit

from .._work.registry import Entry
from ..protocol import SampleBody
from ..types import SampleResponse
from . import names

Attributes: TypeAlias = dict[str, str | int | float | bool | list[str]]


def of_sample(entry: Entry) -> Attributes:
    """Return what is known of every sample, and groups samples in metrics, too."""
    address, port = _server(entry.endpoint.url)
    return {
        names.GEN_AI_OPERATION: names.TEXT_COMPLETION,
        names.GEN_AI_PROVIDER: names.PROVIDER,
        names.GEN_AI_MODEL: entry.endpoint.base_model,
        names.SERVER_ADDRESS: address,
        names.SERVER_PORT: port,
    }


def asked(entry: Entry) -> Attributes:
    """Return what is known when work begins."""
    match entry.kind:
        case "sample":
            return of_sample(entry) | _settings(entry.subject) | _ids(entry)
        case "operation":
            return {names.OPERATION: entry.what} | _ids(entry) | _given({names.LOSS: entry.subject.loss_fn})
        case "download":
            return {names.CHECKPOINT_ID: str(entry.id)}
        case _:
            return {}


def came_of_it(entry: Entry) -> Attributes:
    """Return what is known when work ends."""
    match entry.kind:
        case "sample":
            return {} if entry.result is None else _answer(entry.subject, entry.result)
        case "operation":
            accepted = entry.id if entry.goal == "outcome" else None  # before, it is a key of ours
            sizes = {} if entry.encoded is None else _sizes(sum(entry.encoded.datums), entry.encoded.tokens)
            return _given({names.OPERATION_ID: accepted}) | sizes
        case "provisioning":
            return _ids(entry)
        case _:
            return {}


def output_tokens(response: SampleResponse) -> int:
    """Return the number of tokens of all completions."""
    return sum(len(sequence.tokens) for sequence in response.sequences)


def error_type(error: BaseException) -> str:
    """Return the value of ``error.type``: the name of the class, as our documentation lists it."""
    return type(error).__qualname__


def _settings(body: SampleBody) -> Attributes:
    return _given(
        {
            names.GEN_AI_MAX_TOKENS: body.max_tokens,
            names.GEN_AI_TEMPERATURE: body.temperature,
            names.GEN_AI_TOP_P: body.top_p,
            names.GEN_AI_TOP_K: body.top_k,
            names.GEN_AI_SEED: body.seed,
            names.GEN_AI_CHOICES: body.n,
        }
    )


def _answer(body: SampleBody, response: SampleResponse) -> Attributes:
    counts: Attributes = {
        names.GEN_AI_FINISH_REASONS: [sequence.stop_reason for sequence in response.sequences],
        names.GEN_AI_INPUT_TOKENS: body.length,
        names.GEN_AI_OUTPUT_TOKENS: output_tokens(response),
    }
    ids = {names.GEN_AI_RESPONSE_ID: response.request_id, names.POLICY_VERSION: response.policy_version}
    return counts | _given(ids)


def _sizes(datums: int, tokens: int) -> Attributes:
    return {names.DATUMS: datums, names.TOKENS: tokens} if datums else {}


def _ids(entry: Entry) -> Attributes:
    return _given({names.RUN_ID: entry.run_id, names.SAMPLER_ID: entry.sampler_id})


def _given(values: Mapping[str, object]) -> Attributes:
    """Return what is not missing."""
    given: Attributes = {}
    for name, value in values.items():
        if isinstance(value, str | int | float):
            given[name] = value
    return given


@lru_cache(maxsize=64)
def _server(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)

"""Records: what a batch writes, one for each row."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from ..errors import ApiError, LoopsError
from ..types import SampleResponse
from .rows import Row, prompt_fields
from .settings import BatchSettings

Record: TypeAlias = dict[str, Any]
"""One record in JSON types: the fields of its row, its `key` and `settings`, and an answer or an `error`."""

INVALID_LINE: Final = "InvalidLine"
"""The type of the error of what is no row."""


def answered(row: Row, settings: BatchSettings, response: SampleResponse) -> Record:
    """Return the record of a row that has an answer."""
    record = {
        **_head(row, settings),
        "completions": [
            {"text": each.text, "tokens": each.tokens, "logprobs": each.logprobs, "stop_reason": each.stop_reason}
            for each in response.sequences
        ],
        "policy_version": response.policy_version,
        "request_id": response.request_id,
    }
    for name in prompt_fields(settings):
        record[name] = getattr(response, name)
    return record


def failed(row: Row, settings: BatchSettings, error: LoopsError) -> Record:
    """Return the record of a row that has an error."""
    described = {
        "type": type(error).__name__,
        "message": str(error),
        "retryable": error.retryable,
        "status": error.status if isinstance(error, ApiError) else None,
        "request_id": getattr(error, "request_id", None),
    }
    return {**_head(row, settings), "error": described}


def invalid(row: Row, settings: BatchSettings, problem: str) -> Record:
    """Return the record of what is no row, and will not become one by asking again."""
    described = {"type": INVALID_LINE, "message": problem, "retryable": False, "status": None, "request_id": None}
    return {**_head(row, settings), "error": described}


def _head(row: Row, settings: BatchSettings) -> Record:
    index = {} if row.index is None else {"index": row.index}
    return {**index, "key": row.key, "settings": settings.digest, **row.fields}

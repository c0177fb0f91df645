"""Rows: what a batch asks for, and what identifies it."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import Struct

from .._http.decoding import UnreadableError, decode_json
from .._kinds import is_mapping
from .._values import place_and_rule
from ..errors import InputError
from .settings import BatchSettings, canonical, digest_of

IDENTITY: Final = ("id", "messages", "prompt")
"""The fields that identify a row."""

RESERVED: Final = frozenset({"completions", "error", "index", "key", "policy_version", "request_id", "settings"})
"""The fields of every record, which rows must not have."""


class Row(Struct, frozen=True, kw_only=True):
    """A row of a batch: its `fields` as given, and its `key`.

    `index` is the number of its line, where it has one. `problem` says why it is no row: it cannot be asked for.
    """

    fields: Mapping[str, Any]
    key: str
    index: int | None = None
    problem: str | None = None

    @property
    def needs_tokenizer(self) -> bool:
        """Whether its prompt is not yet token ids."""
        return self.problem is None and isinstance(self.fields.get("prompt"), str | None)


class _Shape(Struct):
    """What a row must be, besides its other fields."""

    id: str | int | None = None
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None


def row_key(row: Mapping[str, Any], digest: str) -> str:
    """Return what identifies the answer to a row: 32 hexadecimal digits.

    It is the BLAKE2b-128 of the settings' digest and the canonical JSON of the row's `id`, `messages` and `prompt` as
    they are given. So it needs no tokenizer, and is the same for a line of JSON and a row of a table.

    Args:
        row: the row; other fields do not matter.
        digest: `BatchSettings.digest`.
    """
    return digest_of(digest.encode(), canonical({name: row.get(name) for name in IDENTITY}))


def numbered(key: str, copies_before: int) -> str:
    """Return the key of a row by the number of equal rows before it: ``key``, ``key#1``, ``key#2`` and so on."""
    return f"{key}#{copies_before}" if copies_before else key


def prompt_fields(settings: BatchSettings) -> list[str]:
    """Return the fields of records about the prompt, which only some settings ask for."""
    scores = {
        "prompt_logprobs": settings.include_prompt_logprobs or settings.topk_prompt_logprobs > 0,
        "topk_prompt_logprobs": settings.topk_prompt_logprobs > 0,
    }
    return [name for name, is_asked_for in scores.items() if is_asked_for]


def row_of(given: Any, settings: BatchSettings, *, index: int | None = None, where: str = "row") -> Row:
    """Return a row with its key; one that is no row has a `problem`.

    Args:
        given: what was read, e.g. a dict.
        settings: those of the batch.
        index: the number of its line.
        where: how errors name it.

    Raises:
        InputError: it has a field with the name of a record's.
    """
    if not is_mapping(given):
        key = digest_of(settings.digest.encode(), msgspec.json.encode(given))
        return Row(fields={}, key=key, index=index, problem="is not a JSON object")
    if taken := sorted({*RESERVED, *prompt_fields(settings)} & given.keys()):
        raise InputError(where, f"has the field {taken[0]!r}, which the output has for itself; rename it")
    return Row(fields=given, key=row_key(given, settings.digest), index=index, problem=_problem(given))


def row_of_line(line: bytes, settings: BatchSettings, *, index: int, where: str) -> Row:
    """Do the same for a line of JSON."""
    try:
        given = decode_json(line.removeprefix(BOM_UTF8), dict[str, Any])  # with which Windows begins files
    except UnreadableError as problem:
        key = digest_of(settings.digest.encode(), line.strip())
        return Row(fields={}, key=key, index=index, problem=f"is not a JSON object: {problem}")
    return row_of(given, settings, index=index, where=where)


def _problem(given: Mapping[str, Any]) -> str | None:
    """Say why an object is no row; None if it is one."""
    try:
        shape = msgspec.convert(given, _Shape)
    except msgspec.ValidationError as problem:
        place, rule = place_and_rule(problem)
        return f"{place}: {rule}"
    if (shape.prompt is None) == (shape.messages is None):
        return 'must have either "prompt" or "messages"'
    return None


def prompt_tokens(fields: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Return the token ids of a row's prompt; only text and messages need the tokenizer.

    Whatever the tokenizer raises, e.g. since its chat template has no such role, is about this row alone.
    """
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if prompt is not None:
        return list(prompt)
    encoded = tokenizer.apply_chat_template(fields["messages"], add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])

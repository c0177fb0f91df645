"""Rows and records as Arrow tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import pyarrow as pa

from .._batch.records import Record
from .._batch.rows import IDENTITY, RESERVED, Row, prompt_fields, row_of, row_of_line
from .._batch.settings import BatchSettings
from ..errors import InputError

LINE: Final = "line"
"""The only column of a table of JSON lines: each row of it is one line, so that no column has a type."""

ERROR: Final = pa.struct(
    [
        ("type", pa.string()),
        ("message", pa.string()),
        ("retryable", pa.bool_()),
        ("status", pa.int64()),
        ("request_id", pa.string()),
    ]
)
COMPLETION: Final = pa.struct(
    [
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int64())),
        ("logprobs", pa.list_(pa.float64())),
        ("stop_reason", pa.string()),
    ]
)
CANDIDATE: Final = pa.struct([("token", pa.int64()), ("logprob", pa.float64())])


def record_fields(settings: BatchSettings) -> list[pa.Field]:
    """Return the columns that records have beside those of their rows: always the same, whatever the answers are."""
    scores = {
        "prompt_logprobs": pa.list_(pa.float64()),
        "topk_prompt_logprobs": pa.list_(pa.list_(CANDIDATE)),
    }
    return [
        pa.field("key", pa.string()),
        pa.field("settings", pa.string()),
        pa.field("completions", pa.list_(COMPLETION)),
        pa.field("policy_version", pa.int64()),
        pa.field("request_id", pa.string()),
        pa.field("error", ERROR),
        *(pa.field(name, scores[name]) for name in prompt_fields(settings)),
    ]


def is_of_lines(table: pa.Table) -> bool:
    """Whether a table has lines of JSON instead of columns."""
    return table.column_names == [LINE] and pa.types.is_large_binary(table.schema.field(0).type)


def of_lines(lines: list[bytes]) -> pa.Table:
    """Return a table of JSON lines."""
    return pa.table({LINE: pa.array(lines, pa.large_binary())})


def rows_of(table: pa.Table, settings: BatchSettings) -> list[Row]:
    """Return the rows of a table, each with its place in it as `index`.

    Raises:
        InputError: a row has a field with the name of a record's.
    """
    if is_of_lines(table):
        lines = table.column(LINE).to_pylist()
        return [row_of_line(line, settings, index=place, where="a line") for place, line in enumerate(lines)]
    check_columns(table.column_names, settings)
    names = [name for name in IDENTITY if name in table.column_names]
    return [
        row_of({name: value for name, value in fields.items() if value is not None}, settings, index=place)
        for place, fields in enumerate(table.select(names).to_pylist())
    ]


def check_columns(names: list[str], settings: BatchSettings) -> None:
    """Refuse columns with the names of a record's."""
    if taken := sorted({*RESERVED, *prompt_fields(settings)} & set(names)):
        raise InputError("columns", f"has the field {taken[0]!r}, which the output has for itself; rename it")


def records_table(table: pa.Table, settings: BatchSettings, records: list[Record]) -> pa.Table:
    """Return a table of records, given the table of their rows; `index` says which row a record is of."""
    ordered = sorted(records, key=lambda record: record["index"])
    if is_of_lines(table):
        return of_lines([msgspec.json.encode({k: v for k, v in each.items() if k != "index"}) for each in ordered])
    taken = table.take(pa.array([record["index"] for record in ordered], pa.int64()))
    for field in record_fields(settings):
        values = [_arrow_value(field.name, record.get(field.name)) for record in ordered]
        taken = taken.append_column(field, pa.array(values, field.type))
    return taken


def _arrow_value(name: str, value: Any) -> Any:
    if name != "topk_prompt_logprobs" or value is None:
        return value
    return [at and [{"token": token, "logprob": logprob} for token, logprob in at] for at in value]


def keys_and_errors(table: pa.Table) -> list[tuple[str, str, Mapping[str, Any] | None]]:
    """Return the key, the settings and the error of each record of an output."""
    if is_of_lines(table):
        found = [msgspec.json.decode(line) for line in table.column(LINE).to_pylist()]
        return [(each["key"], each["settings"], each.get("error")) for each in found]
    columns = (table.column(name).to_pylist() for name in ("key", "settings", "error"))
    return list(zip(*columns, strict=True))

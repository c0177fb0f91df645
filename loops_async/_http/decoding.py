"""JSON that was written by others: it becomes a value of the expected type, or one error, whatever is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, Final, TypeVar, cast

import msgspec
from msgspec import Raw
from msgspec.inspect import (
    AnyType,
    BoolType,
    DateTimeType,
    DictType,
    Field,
    FloatType,
    IntType,
    ListType,
    NoneType,
    RawType,
    StrType,
    StructType,
    Type,
    UnionType,
    type_info,
)

from .._kinds import is_dict, is_list

T = TypeVar("T")

LONGEST_PROBLEM: Final = 300
MILLISECONDS_FROM: Final = 1e11
"""A time that is a number of at least this counts milliseconds: in seconds it would be beyond the year 5000."""

UNREADABLE: Final = (ValueError, OverflowError, RecursionError, MemoryError)
"""What decoders of JSON raise; the errors of msgspec, UnicodeDecodeError and the limit on digits are ValueErrors."""

_PLAIN: Final = (AnyType, BoolType, FloatType, IntType, NoneType, StrType)


class UnreadableError(ValueError):
    """Bytes that are not JSON of the expected type; the message is short and says what is wrong, and where.

    `is_json` says whether they are JSON at all.
    """

    def __init__(self, problem: Exception) -> None:
        super().__init__((str(problem) or type(problem).__name__)[:LONGEST_PROBLEM])
        self.is_json = isinstance(problem, msgspec.ValidationError)


def decode_json(raw: bytes | Raw, kind: type[T]) -> T:
    """Decode JSON as `kind`.

    Raises:
        UnreadableError: it is not UTF-8, not JSON, or not of this kind; or it is nested too deeply, or too large.
    """
    try:
        value: T = _decoder(cast("Any", kind))(raw)
        return value
    except UNREADABLE as problem:
        unreadable = UnreadableError(problem)
    # Not chained to the problem, whose traceback holds the whole body.
    raise unreadable


def decode_answer(raw: bytes | Raw, kind: type[T]) -> T:
    """Decode the answer of a service as `kind`, once more by tolerant rules where it is not exactly of this kind.

    By these, null stands for the default of a field that has one; a time may have any ISO or HTTP form, or be a number
    of seconds or milliseconds since 1970, in UTC unless it says otherwise; an optional time that cannot be read is
    None; and the NaN and Infinity that Python writes are numbers.

    Raises:
        UnreadableError: see `decode_json`.
    """
    try:
        return decode_json(raw, kind)
    except UnreadableError as strict:
        unreadable = strict
    try:
        value = json.loads(bytes(raw))
    except UNREADABLE:
        raise unreadable from None  # which says more precisely what is not JSON
    try:
        return msgspec.convert(_tolerated(value, type_info(kind)), kind)
    except UNREADABLE as problem:
        unreadable = UnreadableError(problem)
    raise unreadable


@cache
def _decoder(kind: Any) -> Callable[[bytes | Raw], Any]:
    return msgspec.json.Decoder(kind).decode


def _tolerated(value: Any, kind: Type) -> Any:
    """Return `value` changed to what msgspec takes for `kind`, where the tolerant rules allow that."""
    if isinstance(kind, RawType):
        return Raw(json.dumps(value).encode())
    if isinstance(kind, DateTimeType):
        return _time(value) or value
    if isinstance(kind, UnionType):
        return _tolerated_in_union(value, kind)
    if isinstance(kind, StructType) and is_dict(value):
        fields = {field.encode_name: field for field in kind.fields}
        found = {name: _tolerated(each, fields[name].type) if name in fields else each for name, each in value.items()}
        return {name: each for name, each in found.items() if each is not None or not _is_default(fields.get(name))}
    if isinstance(kind, DictType) and is_dict(value) and not _is_plain(kind.value_type):
        return {name: _tolerated(each, kind.value_type) for name, each in value.items()}
    if isinstance(kind, ListType) and is_list(value) and not _is_plain(kind.item_type):
        return [_tolerated(each, kind.item_type) for each in value]
    return value


def _tolerated_in_union(value: Any, union: UnionType) -> Any:
    if is_dict(value):
        wanted: tuple[type[Type], ...] = (StructType, DictType)
    elif is_list(value):
        wanted = (ListType,)
    elif value is None or any(isinstance(kind, StrType) for kind in union.types):
        return value
    elif any(isinstance(kind, DateTimeType) for kind in union.types):
        return _time(value)
    else:
        return value
    return next((_tolerated(value, kind) for kind in union.types if isinstance(kind, wanted)), value)


def _is_default(field: Field | None) -> bool:
    """Whether null stands for the default of a field."""
    return field is not None and not field.required and not _takes_null(field.type)


def _takes_null(kind: Type) -> bool:
    kinds = kind.types if isinstance(kind, UnionType) else (kind,)
    return any(isinstance(each, NoneType | AnyType | RawType) for each in kinds)


def _is_plain(kind: Type) -> bool:
    """Whether values of this kind are never changed, so that long lists of them need not be looked through."""
    return all(map(_is_plain, kind.types)) if isinstance(kind, UnionType) else isinstance(kind, _PLAIN)


def _time(value: Any) -> datetime | None:
    """Read a time of any common form; None when it has none."""
    try:
        if isinstance(value, str):
            found = _time_of_text(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found = datetime.fromtimestamp(value / 1000 if abs(value) >= MILLISECONDS_FROM else value, UTC)
        else:
            return None
    except (ValueError, OverflowError, OSError, TypeError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _time_of_text(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        return parsedate_to_datetime(text)

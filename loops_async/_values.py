"""The base of every public value: how it is shown in one line and as a table, and how it becomes JSON and returns.

A line has at most 300 characters and costs the same for a million numbers: it names what a value holds, and leaves out
what is at its default. Ids are shown whole or, where they do not fit, not at all: a part of an id looks like an id.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import date, time
from functools import cache
from itertools import islice
from numbers import Real
from pathlib import PurePath
from typing import Any, ClassVar, Final, NamedTuple, Self, TypeAlias, cast

import msgspec
from msgspec import NODEFAULT, Struct, structs

from ._kinds import is_dict, is_list, is_mapping
from ._other_names import KnowsOtherNames

_Shown: TypeAlias = list[tuple[str, str]]
"""The fields of a value that are not at their default: their names, and their values as text."""

_ID: Final = re.compile(r"(.*_)?ids?\Z")
_LONGEST_ID: Final = 256
_MOST_BITS: Final = 128
_DEEPEST: Final = 3
_LONGEST_INLINE: Final = 60
"""A nested value is written out up to this length; of a longer one, only its kind and its size or id are shown."""
_MARKS: Final = ("id", "length", "dtype", "shape")
"""Attributes by which a nested value is known."""
_MOST_ENTRIES: Final = 6
_FIRST: Final = 3
"""A sequence of more than `_MOST_ENTRIES` is abbreviated to the first `_FIRST`."""
_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_SEARCHED: Final = 4000
"""How much of a text is looked through for URLs: much more than is shown."""
_MOST_ROWS: Final = 20
"""How many entries of a list or dict have a row of their own."""
_MOST_HTML: Final = 18_000
"""The size of all rows of a table in bytes, so that with its frame it stays below 20 kB."""

_URL: Final = re.compile(r"[\w+.-]+://\S*\Z")
_SECRETS: Final = re.compile(r"(?<=://)([^\s/?#@\"'<>]*@)?([^\s?#\"'<>]*)([?#][^\s\"'<>]*)?")
"""What follows the scheme of a URL: user and password, host and path, query and fragment."""


class _Style(NamedTuple):
    """How many characters of a text, of a URL and of the whole are shown."""

    text: int
    url: int
    whole: int


_LINE: Final = _Style(text=40, url=100, whole=300)
_CELL: Final = _Style(text=200, url=200, whole=600)


class Errors:
    """What values need of errors, which hold values and so come later: `errors` sets it."""

    refused: ClassVar[Callable[[str, str], ValueError]]
    kind: ClassVar[type[Exception]]
    to_fields: ClassVar[Callable[[Any], dict[str, Any]]]
    from_fields: ClassVar[Callable[[Any], Exception]]


class Value(KnowsOtherNames):
    """What every public struct inherits: it shows itself in one line, becomes a dict or JSON, and returns."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the value as a dict of JSON types: dict, list, str, int, float, bool and None.

        Bytes become base64, times ISO 8601, classes their names, and an error a dict of its ``type``, ``message``,
        ``retryable`` and its own fields. NaN and infinities stay floats. Signed URLs are whole, so keep the dict as
        secret as they are.

        Raises:
            TypeError: an object of your own in it, e.g. the task of a `RolloutGroup`, has no such form.
        """
        plain: dict[str, Any] = _json_types(msgspec.to_builtins(self, str_keys=True, enc_hook=_plain))
        return plain

    def to_json(self, indent: int | None = None) -> str:
        """Return `to_dict` as JSON, with ``null`` for NaN and infinities.

        Args:
            indent: the spaces by which each level is indented; None writes all in one line.
        """
        encoded = msgspec.json.encode(self, enc_hook=_plain)
        return (encoded if indent is None else msgspec.json.format(encoded, indent=indent)).decode()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the value of which `to_dict` gave `fields`; unknown ones are ignored.

        What was given as an object of your own returns as JSON types; errors are equal in all but their identity.

        Raises:
            InputError: a field is missing, or has a value that its type does not allow.
        """
        try:
            return msgspec.convert(fields, cls, dec_hook=_restored)
        except msgspec.ValidationError as problem:
            path, rule = place_and_rule(problem)
        raise Errors.refused(path or "fields", rule)

    def __repr__(self) -> str:
        return _line(self, _LINE)

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, _Verbatim(text)) for name, text in _fitting(self, _LINE)]

    def _repr_html_(self) -> str:
        return _table(self)


def place_and_rule(problem: msgspec.ValidationError) -> tuple[str, str]:
    """Split msgspec's ``Expected `int` >= 1 - at `$.lora_rank` `` into the place, "" for the whole, and the rule."""
    rule, _, place = str(problem).partition(" - at `$")
    return place.strip(".`"), f"{rule[:1].lower()}{rule[1:]}"


# --- one line --------------------------------------------------------------------------------------------------------


def _line(value: Any, style: _Style, depth: int = 0) -> str:
    shown = (f"{name}={text}" if name else text for name, text in _fitting(value, style, depth))
    return f"{type(value).__name__}({', '.join(shown)})"


def _fitting(value: Any, style: _Style, depth: int = 0) -> _Shown:
    """Return the fields that fit into a line, ids before others; then an ellipsis without a name for the rest."""
    shown = _shown_fields(value, style, depth)
    room = style.whole - len(f"{type(value).__name__}(, …)")
    fitting: set[str] = set()
    for name, text in sorted(shown, key=lambda each: not _is_id(*each)):
        needed = len(f"{name}={text}, ")
        if needed <= room:
            room -= needed
            fitting.add(name)
    kept = [(name, text) for name, text in shown if name in fitting]
    return kept if len(kept) == len(shown) else [*kept, ("", "…")]


def _shown_fields(value: Struct, style: _Style, depth: int) -> _Shown:
    return [(name, _text_of(each, style, name, depth)) for name, each in _given_fields(value)]


def _given_fields(value: Struct) -> Iterator[tuple[str, Any]]:
    for field in _fields(type(value)):
        given = getattr(value, field.name)
        if not _is_default(given, field):
            yield field.name, given


@cache
def _fields(kind: type[Struct]) -> tuple[structs.FieldInfo, ...]:
    return structs.fields(kind)


def _is_default(given: Any, field: structs.FieldInfo) -> bool:
    default = field.default_factory() if field.default_factory is not NODEFAULT else field.default
    # Of one type, so that arrays are never compared; a list of another length than the default is not looked through.
    return given is default or (type(given) is type(default) and bool(given == default))


def _is_id(name: str, text: str) -> bool:
    return bool(_ID.match(name)) or text.startswith("'bt://")


def _text_of(value: Any, style: _Style, name: str = "", depth: int = 0) -> str:
    """Return any value as short text; `name` is that of its field."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, Real):
        return _number(value)
    if isinstance(value, str):
        return _text(value, style, name)
    if isinstance(value, bytes | bytearray):
        return f"<{len(value)} bytes>"
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, PurePath):
        return _cut(str(value), style.url)
    if isinstance(value, BaseException):
        return f"{type(value).__name__}({_text(str(value), style)})"
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Struct):
        return _nested(value, style, depth + 1)
    if isinstance(value, list | tuple | set | frozenset | Mapping):
        return _entries(cast("Any", value), style, name, depth + 1)
    return f"<{type(value).__name__}>"  # not its own repr, which may have any length


def _number(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # Python refuses to write one of thousands of digits
        return f"<int of {value.bit_length()} bits>"
    return str(value)


def _text(text: str, style: _Style, name: str = "") -> str:
    if _ID.match(name) or text.startswith("bt://"):
        return repr(_without_secrets(text)) if len(text) <= _LONGEST_ID else "…"
    text = _without_secrets(text[:_SEARCHED])
    return _cut(text, style.url if _URL.match(text) else style.text)


def _without_secrets(text: str) -> str:
    """Remove users, passwords and queries from URLs: a signed URL is a key to what it names."""
    return _SECRETS.sub(r"\2", text)


def _cut(text: str, most: int) -> str:
    """Return a text in quotes, with what is unseen escaped; the escapes count, too."""
    quoted = repr(text[: most + 1])
    return quoted if len(quoted) <= most + 2 else f"{quoted[: most + 1]}…{quoted[0]}"


def _nested(value: Struct, style: _Style, depth: int) -> str:
    if depth <= _DEEPEST:
        line = _line(value, style, depth)
        if len(line) <= _LONGEST_INLINE:
            return line
    summary = " ".join(filter(None, (type(value).__name__, *(_mark(value, name) for name in _MARKS))))
    return f"<{summary}>" if len(summary) <= _LONGEST_ID and summary.isprintable() else f"<{type(value).__name__}>"


def _mark(value: Struct, name: str) -> str:
    try:
        mark: Any = getattr(value, name, "")
    except TypeError:  # a property of what holds something unexpected
        return ""
    return _without_secrets(mark) if isinstance(mark, str) else _text_of(mark, _LINE)


def _entries(values: Any, style: _Style, name: str, depth: int) -> str:
    """Return a sequence, a set or a dict: its beginning, with the number of entries where that is not all."""
    size = len(values)
    is_whole = size <= _MOST_ENTRIES
    begin: list[Any] = list(islice(values, size if is_whole else _FIRST))
    if depth > _DEEPEST:
        return f"<{size}>"
    if is_mapping(values):
        texts = [f"{_text_of(key, style, '', depth)}: {_text_of(values[key], style, str(key), depth)}" for key in begin]
        brackets = "{}"
    elif begin and all(isinstance(each, Struct) for each in begin):
        return f"<{size} {' | '.join(dict.fromkeys(type(each).__name__ for each in begin))}>"
    else:
        texts = [_text_of(each if is_whole else _rounded(each), style, name, depth) for each in begin]
        brackets = "[]" if isinstance(values, list) else "()" if isinstance(values, tuple) else "{}"
    inner = ", ".join(texts)
    return f"{brackets[0]}{inner}{brackets[1]}" if is_whole else f"<{size}: {inner}, …>"


def _rounded(value: Any) -> Any:
    """Round the numbers of a long list, which are only examples of what it holds."""
    return float(f"{value:.4g}") if type(value) is float else value


class _Verbatim:
    """A text that rich shows as it is."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


# --- a table ---------------------------------------------------------------------------------------------------------


def _table(value: Any) -> str:
    """Return an HTML table with a row for each field; entries of dicts, and values in lists, have their own."""
    room = _MOST_HTML
    shown: list[str] = []
    for name, text in _rows(value):
        row = _row(name, text)
        room -= len(row.encode())
        if room < 0:
            shown.append(_row("…", "…"))
            break
        shown.append(row)
    head = f"<caption>{_escaped(type(value).__name__)}</caption><thead>{_row('field', 'value', 'th')}</thead>"
    return f"<table>{head}<tbody>{''.join(shown)}</tbody></table>"


def _row(name: str, text: str, tag: str = "td") -> str:
    cells = (f'<{tag} style="text-align: left">{_escaped(each)}</{tag}>' for each in (name, text))
    return f"<tr>{''.join(cells)}</tr>"


def _escaped(text: str) -> str:
    from html import escape  # importing it takes milliseconds, and only notebooks need it

    return escape(text)


def _rows(value: Struct) -> Iterator[tuple[str, str]]:
    for name, given in _given_fields(value):
        parts = list(islice(_parts(given), _MOST_ROWS))
        for place, part in parts:
            yield f"{name}[{place}]", _cell(part)
        if not parts:
            yield name, _cell(given, name)
        elif len(given) > len(parts):
            yield name, f"… {len(given) - len(parts):,} more"


def _parts(given: Any) -> Iterator[tuple[str, Any]]:
    """Yield what has a row of its own: the entries of a dict, and of a list of values or dicts."""
    if is_mapping(given):
        for key, part in given.items():
            yield _text_of(key, _LINE), part
    elif is_list(given) and given and isinstance(given[0], Struct | Mapping):
        for index, part in enumerate(given):
            yield str(index), part


def _cell(value: Any, name: str = "") -> str:
    for style in (_CELL, _LINE):
        text = _line(value, style) if isinstance(value, Struct) else _text_of(value, style, name)
        if len(text) <= _CELL.whole:
            return text
    return "…"


# --- JSON types ------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return what msgspec does not know in JSON types."""
    if isinstance(value, type):
        return value.__qualname__ if value.__module__ == "builtins" else f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Errors.kind):
        return Errors.to_fields(value)
    if hasattr(value, "tolist"):  # of numpy or torch
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


def _json_types(plain: Any) -> Any:
    """Return what msgspec gave with lists for tuples, and texts for members of a `StrEnum`."""
    if is_dict(plain):
        return {name: _json_types(each) for name, each in plain.items()}
    if isinstance(plain, list | tuple):
        entries = cast("list[Any]", plain)
        # The kinds are found much faster than each of a million numbers is looked at.
        return list(entries) if _SCALARS.issuperset(map(type, entries)) else [_json_types(each) for each in entries]
    return str(plain) if isinstance(plain, str) else plain


def _restored(kind: Any, plain: Any) -> Any:
    """Return the value of type `kind` of which `_plain` gave `plain`."""
    if getattr(kind, "__origin__", kind) is type:
        return _class_named(plain)
    if kind is Errors.kind:
        try:
            return Errors.from_fields(plain)
        except msgspec.ValidationError as problem:  # msgspec adds the place to any error but its own
            raise ValueError(": ".join(filter(None, place_and_rule(problem)))) from None
    return kind(plain)


def _class_named(name: Any) -> type:
    """Return a class of the builtins, or of a module that is loaded: data must not decide what is imported."""
    parts = ["builtins", *str(name).split(".")] if "." not in str(name) else str(name).split(".")
    for end in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:end]))
        for part in parts[end:]:
            found = getattr(found, part, None)
        if isinstance(found, type):
            return found
    raise ValueError(f"expected the name of a class in a loaded module; got {name!r}")

"""The file of a cassette: JSON lines, the first for the whole, each other one for an exchange."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import msgspec
from msgspec import UNSET, Struct

from .. import errors
from .._files import write_whole
from ..errors import InputError, LoopsError

FORMAT: Final = 1

NOT_KEPT: Final = frozenset(
    {
        "connection",
        "content-encoding",  # bodies are kept decompressed
        "content-length",
        "date",
        "keep-alive",
        "server",
        "transfer-encoding",
    }
)
"""Headers of answers that say nothing to the client, and would differ with each recording."""


class Content(Struct, kw_only=True, omit_defaults=True):
    """A body: as the value of JSON, as text, or as bytes. `omitted` is the size of one that was not kept."""

    body: Any = UNSET
    text: str | None = None
    base64: str | None = None
    omitted: int | None = None

    def put(self, raw: bytes) -> None:
        """Keep `raw` as it is."""
        try:
            self.text = raw.decode() or None
        except UnicodeDecodeError:
            self.base64 = b64encode(raw).decode()

    def put_json(self, text: str) -> None:
        """Keep a body that is JSON, if it is a list or an object, else a text."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict | list):
            self.body = value
        else:
            self.text = text or None

    @property
    def raw(self) -> bytes:
        """The bytes of the body."""
        if self.body is not UNSET:
            return json.dumps(self.body).encode()
        return b64decode(self.base64) if self.base64 is not None else (self.text or "").encode()


class RecordedRequest(Content, kw_only=True, omit_defaults=True):
    """What was asked."""

    method: str
    url: str
    headers: dict[str, str] = {}


class RecordedAnswer(Content, kw_only=True, omit_defaults=True):
    """What was answered."""

    status: int
    headers: dict[str, str] = {}

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str]) -> Self:
        """Return an answer without its body."""
        return cls(status=status, headers={name: text for name, text in headers.items() if _is_kept(name)})


class RecordedError(Struct, kw_only=True, omit_defaults=True):
    """The error that came instead of an answer, or of the rest of one."""

    type: str
    message: str
    fields: dict[str, Any] = {}

    @classmethod
    def of(cls, error: LoopsError, message: str) -> Self:
        """Return an error with this message."""
        fields = {name: value for name, value in vars(error).items() if isinstance(value, bool | int | float | str)}
        return cls(type=type(error).__name__, message=message, fields=fields)

    def error(self) -> LoopsError:
        """Return the error as it was."""
        kind: type[LoopsError] = getattr(errors, self.type, LoopsError)
        error = kind.__new__(kind, self.message)
        error.args = (self.message,)
        vars(error).update(self.fields)
        return error


class Recorded(Struct, kw_only=True, omit_defaults=True):
    """One exchange. If the program `gave_up`, it did so before an answer came, or in the pause after it."""

    request: RecordedRequest
    answer: RecordedAnswer | None = None
    error: RecordedError | None = None
    gave_up: bool = False


class _Head(Struct, kw_only=True):
    cassette: int
    base_url: str


class Cassette(Struct, kw_only=True):
    """All exchanges with the service at `base_url`, in the order in which they began."""

    base_url: str
    exchanges: Sequence[Recorded]

    def write(self, path: Path) -> None:
        """Write the file, all of it or nothing; only its owner can read it.

        Raises:
            OSError: it cannot be written.
        """
        lines = (_Head(cassette=FORMAT, base_url=self.base_url), *self.exchanges)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, map(_line, lines), is_private=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            InputError: it does not exist, or is no cassette that this version reads; the text says in which line.
        """
        try:
            lines = path.read_bytes().rstrip(b"\n").split(b"\n")
        except FileNotFoundError:
            raise InputError(str(path), "does not exist: record it first, with loops_async.testing.record") from None
        head = _read(path, 1, lines[0], _Head)
        if head.cassette != FORMAT:
            raise InputError(str(path), f"is a cassette of format {head.cassette}, not {FORMAT}: record it again")
        exchanges = [_read(path, number, line, Recorded) for number, line in enumerate(lines[1:], 2)]
        return cls(base_url=head.base_url, exchanges=exchanges)


def _read(path: Path, number: int, line: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.convert(json.loads(line.decode("utf-8", "surrogatepass")), kind)
    except ValueError as problem:
        raise InputError(str(path), f"line {number} is not that of a cassette: {problem}") from None


def _line(value: Struct) -> bytes:
    fields: dict[str, Any] = msgspec.to_builtins(value)
    for part in (fields.get("request"), fields.get("answer")):
        if part:
            part["headers"] = part.pop("headers", {})
            part.update({name: part.pop(name) for name in ("body", "text", "base64") if name in part})  # as on the wire
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _is_kept(header: str) -> bool:
    return header.lower() not in NOT_KEPT

"""Reading requests: JSON bodies and query parameters. Every mistake is an `InputError` that names the field."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from loops_async._http.decoding import UNREADABLE
from loops_async.errors import InputError

from .._errors import FINAL, HttpError

__all__ = ["choice", "decode_body", "input_error", "integer", "query_int"]

T = TypeVar("T")
S = TypeVar("S", bound=str)

_BODY_SECONDS: Final = 300.0
"""How long a body may take; longer than 32 MiB need on any network on which the service is of use."""

_FIELD = re.compile(r"`\$\.?([^`]*)`$|required field `([^`]*)`")


async def decode_body(request: web.Request, decoder: msgspec.json.Decoder[T], *, default: bytes = b"") -> T:
    """Decode the JSON body of a request; `default` takes the place of an empty one."""
    body = await _body(request)
    try:
        return decoder.decode(body or default)
    except msgspec.ValidationError as error:
        raise input_error(error) from error
    except msgspec.DecodeError as error:
        raise InputError("body", f"is not JSON: {error}") from error
    except UNREADABLE as error:
        # It is not UTF-8, or nested too deeply.
        raise _refused(422, "UNREADABLE_BODY", f"cannot be read as JSON: {error}") from error


async def _body(request: web.Request) -> bytes:
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise _refused(415, "UNSUPPORTED_ENCODING", "must be sent without a Content-Encoding")
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.read()
    except TimeoutError:
        raise _refused(400, "INCOMPLETE_BODY", f"did not arrive within {_BODY_SECONDS:g} s") from None


def _refused(status: int, code: str, problem: str) -> HttpError:
    message = f"body: {problem}"
    return HttpError(status, code, message, details={"field": "body"}, headers=FINAL, error=message)


def input_error(error: msgspec.ValidationError) -> InputError:
    """Convert msgspec's error, whose text ends with the place of the mistake."""
    found = _FIELD.search(str(error))
    field = (found[1] or found[2] if found else None) or "body"
    return InputError(field, str(error).split(" - at ")[0])


def query_int(request: web.Request, name: str, default: int, *, minimum: int, maximum: int | None = None) -> int:
    """Return an integer of the query string, `default` when it is missing."""
    number = integer(name, request.query.get(name, str(default)), minimum=minimum)
    if maximum is not None and number > maximum:
        raise InputError(name, f"must be at most {maximum}; got {number}")
    return number


def integer(field: str, text: str, *, minimum: int) -> int:
    """Return the number in `text`, which must be decimal digits."""
    if not text.isascii() or not text.isdigit() or len(text) > 15 or int(text) < minimum:
        raise InputError(field, f"must be an integer of at least {minimum}; got {text!r}")
    return int(text)


def choice(field: str, value: str, choices: Sequence[S]) -> S:
    """Return `value`, which must be one of `choices`."""
    for known in choices:
        if value == known:
            return known
    raise InputError(field, f"must be one of {', '.join(choices)}; got {value!r}")

"""Requests and answers: decoding bodies, encoding answers, and refusals as exceptions."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from loops_async import protocol as wire

__all__ = [
    "FINAL",
    "HttpError",
    "bad_request",
    "check_word",
    "deactivated",
    "decode",
    "deploying",
    "invalid",
    "json_answer",
    "not_found",
    "query_int",
    "raw_answer",
    "terminal",
]

T = TypeVar("T")

_FIELD = re.compile(r"`\$\.?([^`]*)`$|required field `([^`]*)`")


class HttpError(Exception):
    """An answer that is not a success, raised anywhere below a handler.

    The body is ``{"code", "message", "details"}`` and what `extra` adds; every published reader finds its text there.
    `request_id` is what the caller may quote.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.request_id = uuid.uuid4().hex
        self.body = {"code": code, "message": message, "details": dict(details or {})} | extra

    def answer(self) -> web.Response:
        """Return this problem as a response."""
        return json_answer(self.body, status=self.status, headers=self.headers | {"X-Request-Id": self.request_id})


# Published clients repeat a 400 or 404 of a data plane for an hour, unless a gateway has marked it as final.
FINAL = {wire.ERROR_SOURCE: "06"}
_DEACTIVATED = {wire.ERROR_SOURCE: "01", wire.ERROR_CODE: "631"}


def not_found(what: str, key: str) -> HttpError:
    """No object of that id."""
    message = f"there is no {what} {key!r}"
    return HttpError(404, "NOT_FOUND", message, headers=FINAL, error=message)


def invalid(field: str, problem: str, *, status: int = 400) -> HttpError:
    """A request whose `field` breaks a rule."""
    return HttpError(status, "VALIDATION_ERROR", f"{field}: {problem}", details={"field": field})


def deploying(what: str, status: str, *, code: int) -> HttpError:
    """Not up yet: the same request succeeds later, so clients repeat it."""
    message = f"the {what} is deploying (status {status}); try again when it is ready"
    return HttpError(code, "MODEL_DEPLOYING", message, error=message)


def deactivated(what: str) -> HttpError:
    """Switched off for good."""
    message = f"the {what} is deactivated"
    return HttpError(400, "MODEL_DEACTIVATED", message, headers=_DEACTIVATED, error=message)


def terminal(what: str, reason: str) -> HttpError:
    """Could not be deployed, and will not be."""
    message = f"the {what} failed to deploy: {reason}"
    return HttpError(400, "MODEL_FAILED", message, headers=FINAL, error=message)


def bad_request(message: str) -> HttpError:
    """A sample request that vLLM would not understand, said as vLLM says it."""
    return HttpError(400, "BAD_REQUEST", message, error=message, type="BadRequestError")


def decode(body: bytes, decoder: msgspec.json.Decoder[T], *, status: int = 400) -> T:
    """Decode a JSON body; a mistake becomes a `HttpError` that names the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        found = _FIELD.search(str(error))
        field = (found[1] or found[2] if found else None) or "body"
        text = str(error).split(" - at ")[0]
        raise invalid(field, text, status=status) from error
    except msgspec.DecodeError as error:
        raise invalid("body", f"is not JSON: {error}", status=status) from error


def query_int(request: web.Request, name: str, default: int, *, least: int) -> int:
    """Return an integer of the query string, which must be at least `least`."""
    text = request.query.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 15 or int(text) < least:
        raise invalid(name, f"must be an integer of at least {least}; got {text!r}")
    return int(text)


W = TypeVar("W", bound=str)


def check_word(field: str, word: str, words: Sequence[W]) -> W:
    """Return `word`, which must be one of `words`."""
    for known in words:
        if word == known:
            return known
    raise invalid(field, f"must be one of {', '.join(words)}; got {word!r}")


def json_answer(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Answer with `value` as JSON; a NaN becomes null."""
    return raw_answer(msgspec.json.encode(value), status=status, headers=headers)


def raw_answer(body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Answer with JSON that is encoded already."""
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")

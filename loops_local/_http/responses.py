"""Responses as JSON."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from .._errors import HttpError, not_found

__all__ = ["encoded_response", "error_response", "json_response", "poll_response", "request_id_header"]


def json_response(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return `value` as JSON; a NaN becomes null."""
    return encoded_response(msgspec.json.encode(value), status=status, headers=headers)


def encoded_response(body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return JSON that is already encoded."""
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def request_id_header() -> dict[str, str]:
    """Return the header by which a client quotes one answer to support."""
    return {"X-Request-Id": uuid.uuid4().hex}


def error_response(error: HttpError) -> web.Response:
    """Return the response that `error` describes."""
    return json_response(error.body, status=error.status, headers=error.headers)


async def poll_response(outcome: Awaitable[bytes | None], operation_id: str) -> web.Response:
    """Answer a poll with the outcome of an operation, or with 408 while there is none.

    Raises:
        HttpError: the operation is unknown (404) or still running (408).
    """
    try:
        body = await outcome
    except KeyError:
        raise not_found("operation", operation_id) from None
    if body is None:
        raise HttpError(408, "PENDING", "the operation is still running; poll again")
    return encoded_response(body)

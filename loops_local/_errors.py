"""Error responses that the service sends on purpose, as exceptions.

An argument that breaks a rule is a `loops_async.errors.InputError`; `_http.app` makes its response.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Final

from loops_async import protocol as wire

__all__ = ["FINAL", "HttpError", "deactivated", "deploying", "failed_to_deploy", "not_found", "shutting_down"]

# Published clients repeat a 400 or 404 of a data plane for an hour, unless a gateway has marked it as final.
FINAL: Final = {wire.ERROR_SOURCE: "06"}
_DEACTIVATED: Final = {wire.ERROR_SOURCE: "01", wire.ERROR_CODE: "631"}


class HttpError(Exception):
    """An error response, raised anywhere below a route handler.

    The body is ``{"code", "message", "details"}`` and the fields of `extra`; every published client finds its text
    there. `request_id` is the id to quote to support.
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
        self.request_id = uuid.uuid4().hex
        self.headers = {**(headers or {}), "X-Request-Id": self.request_id}
        self.body = {"code": code, "message": message, "details": dict(details or {})} | extra


def not_found(kind: str, key: str) -> HttpError:
    """There is no object of this kind and id."""
    message = f"there is no {kind} {key!r}"
    return HttpError(404, "NOT_FOUND", message, headers=FINAL, error=message)


def deploying(kind: str, status: str, *, code: int) -> HttpError:
    """The deployment is still starting: the same request succeeds later, so clients repeat it."""
    message = f"the {kind} is deploying (status {status}); try again when it is ready"
    return HttpError(code, "MODEL_DEPLOYING", message, error=message)


def deactivated(kind: str) -> HttpError:
    """The run or deployment was deactivated and never starts again."""
    message = f"the {kind} is deactivated"
    return HttpError(400, "MODEL_DEACTIVATED", message, headers=_DEACTIVATED, error=message)


def failed_to_deploy(kind: str, reason: str) -> HttpError:
    """The deployment could not load its model and is not started again."""
    message = f"the {kind} failed to deploy: {reason}"
    return HttpError(400, "MODEL_FAILED", message, headers=FINAL, error=message)


def shutting_down() -> HttpError:
    """The service is being closed."""
    message = "the service is shutting down"
    return HttpError(503, "SHUTTING_DOWN", message, error=message)

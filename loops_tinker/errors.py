"""The errors of this package, and which error of Loops becomes which of them.

::

    TinkerError
    ├── APIError                       `.message`, `.request`, `.body`, `.request_id`
    │   ├── APIConnectionError         no complete answer arrived
    │   │   └── APITimeoutError        none in time
    │   ├── APIResponseValidationError the answer does not follow the protocol
    │   └── APIStatusError             `.status_code`, `.response`
    │       ├── BadRequestError 400, AuthenticationError 401, BillingError 402, PermissionDeniedError 403,
    │       ├── NotFoundError 404, ConflictError 409, UnprocessableEntityError 422, RateLimitError 429,
    │       └── InternalServerError 5xx
    ├── RequestFailedError             an accepted operation failed: `.request_id`, `.category`
    └── UnsupportedError               also NotImplementedError: Loops does not have what was asked for

Local mistakes are `ValueError` and `TypeError`. The ``__cause__`` of an error is that of Loops.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import loops_async as loops

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "BillingError",
    "ConflictError",
    "ExperimentalWarning",
    "InternalServerError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestErrorCategory",
    "RequestFailedError",
    "Response",
    "TinkerError",
    "UnprocessableEntityError",
    "UnsupportedError",
    "no_checkpoint",
    "translated",
]

RequestErrorCategory: TypeAlias = Literal["unknown", "server", "user"]


class ExperimentalWarning(UserWarning):
    """Never given here; scripts filter it."""


@dataclass(frozen=True)
class Response:
    """What is known of an answer with an error status."""

    status_code: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body if isinstance(self.body, str) else json.dumps(self.body)

    def json(self) -> Any:
        """Return the decoded body."""
        return self.body


class TinkerError(Exception):
    """Root of the errors of the service and of its connection."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Rebuilt without `__init__`, so that every class pickles whatever its arguments are.
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[TinkerError], args: tuple[Any, ...], fields: dict[str, Any]) -> TinkerError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class UnsupportedError(TinkerError, NotImplementedError):
    """Loops does not have what was asked for; the message says what to do instead."""


class APIError(TinkerError):
    """A request failed. `body` is the decoded answer, where there was one; `request_id` is the id for support."""

    def __init__(
        self, message: str, request: Any = None, *, body: object = None, request_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.request = request
        self.body = body
        self.request_id = request_id


class APIConnectionError(APIError):
    """No complete answer arrived."""

    def __init__(self, request: Any = None, message: str = "Connection error.") -> None:
        super().__init__(message, request)


class APITimeoutError(APIConnectionError):
    """No answer arrived in time."""

    def __init__(self, request: Any = None, message: str = "Request timed out.") -> None:
        super().__init__(request, message)


class APIResponseValidationError(APIError):
    """An answer arrived that does not follow the protocol."""

    def __init__(self, response: Any = None, body: object = None, message: str | None = None) -> None:
        super().__init__(message or "Data returned by API invalid for expected schema.", body=body)
        self.response = response
        self.status_code: int | None = getattr(response, "status_code", None)


class APIStatusError(APIError):
    """The service answered with an error status."""

    def __init__(
        self, message: str, response: Any = None, body: object = None, *, request_id: str | None = None
    ) -> None:
        super().__init__(message, getattr(response, "request", None), body=body, request_id=request_id)
        self.response = response
        self.status_code: int = getattr(response, "status_code", 0)


class BadRequestError(APIStatusError):
    """The service refused the request (400, and other statuses of the 4xx without a class)."""


class AuthenticationError(APIStatusError):
    """The API key is missing or wrong (401)."""


class BillingError(APIStatusError):
    """The account cannot pay (402)."""


class PermissionDeniedError(APIStatusError):
    """The API key is not allowed to do this (403)."""


class NotFoundError(APIStatusError):
    """The object does not exist, or no longer does (404, 410)."""


class ConflictError(APIStatusError):
    """The state of the object does not allow the request (409)."""


class UnprocessableEntityError(APIStatusError):
    """The request is not valid (422)."""


class RateLimitError(APIStatusError):
    """Too many requests (429)."""


class InternalServerError(APIStatusError):
    """The service failed (5xx)."""


def no_checkpoint(path: str) -> NotFoundError:
    """Return the error for a path at which there is no checkpoint."""
    message = f"there is no checkpoint {path}"
    return NotFoundError(message, Response(404, {"detail": message}), {"detail": message})


_OF_STATUS: Final[dict[int, type[APIStatusError]]] = {
    401: AuthenticationError,
    402: BillingError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    410: NotFoundError,
    422: UnprocessableEntityError,
    429: RateLimitError,
}


class RequestFailedError(TinkerError):
    """An operation was accepted and failed; `category` says whose fault it was, as far as that is known."""

    def __init__(self, message: str, request_id: str = "", category: RequestErrorCategory = "unknown") -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.category: RequestErrorCategory = category


_OF_USERS: Final = frozenset({"ValueError", "TypeError", "KeyError", "InputError", "BadRequestError", "RefusedError"})
"""The services' names of causes that a user can change."""


def translated(error: BaseException) -> BaseException:
    """Return the error of this package for one of Loops; any other, e.g. of a local mistake, is returned as it is."""
    if isinstance(error, loops.OperationTimeoutError):
        return TimeoutError(str(error))
    if not isinstance(error, loops.LoopsError) or isinstance(error, loops.InputError | loops.ConfigError):
        return error
    made = _of(error)
    made.__cause__ = error
    return made


def _of(error: loops.LoopsError) -> TinkerError:
    message = str(error)
    if isinstance(error, loops.ApiError):
        body = error.body
        kind = _OF_STATUS.get(error.status, InternalServerError if error.status >= 500 else BadRequestError)
        headers = {} if error.retry_after is None else {"retry-after": f"{error.retry_after:g}"}
        return kind(message, Response(error.status, body, headers), body, request_id=error.request_id)
    if isinstance(error, loops.OperationError):
        return RequestFailedError(message, error.operation_id, _category(error))
    if isinstance(error, loops.UnsupportedError):
        return UnsupportedError(message)
    if isinstance(error, loops.ProtocolError):
        return APIResponseValidationError(message=message)
    if isinstance(error, TimeoutError):
        return APITimeoutError(message=message)
    if isinstance(error, loops.TransportError):
        return APIConnectionError(message=message)
    return APIError(message)


def _category(error: loops.OperationError) -> RequestErrorCategory:
    if not isinstance(error, loops.RemoteOpError) or error.error_class is None:
        return "unknown"
    return "user" if error.error_class in _OF_USERS else "server"

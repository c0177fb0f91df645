"""Every error that the library raises.

::

    LoopsError                      root: picklable, `.retryable`
    ├── ConfigError                 also ValueError: arguments or environment do not make a client
    ├── InputError                  also ValueError: `.path`, refused before anything was sent
    ├── UnsupportedError            also NotImplementedError: the service does not offer this
    ├── ClosedError                 also RuntimeError: the client is closed, or lives elsewhere
    ├── NotReadyError               also TimeoutError and RuntimeError: a trainer or sampler was not ready in time
    ├── ProvisioningError           also RuntimeError: a deployment ended in a terminal state
    │   └── SamplerTerminatedError  `.deployment_id`, `.status`
    ├── TransportError              no complete answer arrived
    │   ├── ConnectError            also ConnectionError
    │   ├── RequestTimeoutError     also TimeoutError
    │   │   └── SampleTimeoutError  `.timeout`; never repeated by itself
    │   ├── LostAnswerError         something that costs money may exist; never repeated by itself
    │   └── ProtocolError           an answer that is not Loops
    ├── ApiError                    `.status`, `.code`, `.reason`, `.request_id`
    │   ├── BadRequestError         400, 413, 422
    │   ├── AuthenticationError     401
    │   ├── PermissionDeniedError   403
    │   ├── NotFoundError           404, 410
    │   ├── ConflictError           409
    │   ├── RateLimitError          429, `.retry_after`
    │   └── ServerError             5xx
    │       └── ServerShutdownError 503 of a trainer
    └── OperationError              accepted, then failed: `.operation_id`, `.category`
        ├── RemoteOpError           `.error_class`
        ├── UnknownRequestError     the service does not know the operation (any more)
        └── OperationTimeoutError   also TimeoutError: one wait ended, the operation goes on

Messages say what was asked, what came back, the ids to quote to support and what to do next.
None of them holds an API key or the query of a signed URL.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "ApiError",
    "AuthenticationError",
    "BadRequestError",
    "ClosedError",
    "ConfigError",
    "ConflictError",
    "ConnectError",
    "InputError",
    "LoopsError",
    "LostAnswerError",
    "NotFoundError",
    "NotReadyError",
    "OperationError",
    "OperationTimeoutError",
    "PermissionDeniedError",
    "ProtocolError",
    "ProvisioningError",
    "RateLimitError",
    "RemoteOpError",
    "RequestTimeoutError",
    "SampleTimeoutError",
    "SamplerTerminatedError",
    "ServerError",
    "ServerShutdownError",
    "TransportError",
    "UnknownRequestError",
    "UnsupportedError",
]


def _rebuild(cls: type[LoopsError], args: tuple[Any, ...], fields: dict[str, Any]) -> LoopsError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class LoopsError(Exception):
    """Root of every error of this library.

    `retryable` says whether the same call, made again unchanged, may succeed.
    """

    retryable: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Rebuilt without `__init__`, so that every subclass pickles whatever its arguments are.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class ConfigError(LoopsError, ValueError):
    """The arguments and the environment do not make a working client."""


class InputError(LoopsError, ValueError):
    """An argument breaks a rule; nothing was sent and no turn was taken.

    `path` names the field, such as ``data[3].loss_fn_inputs['weights']``.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class UnsupportedError(LoopsError, NotImplementedError):
    """The service does not offer what was asked."""


class ClosedError(LoopsError, RuntimeError):
    """The client is closed, not yet open, or belongs elsewhere, for example to another process."""


class NotReadyError(LoopsError, TimeoutError, RuntimeError):
    """A trainer or sampler was not ready, or did not serve a version, within its time limit."""

    retryable = True


class ProvisioningError(LoopsError, RuntimeError):
    """A deployment reached a state from which it does not recover."""

    def __init__(self, message: str, *, deployment_id: str | None = None, status: str) -> None:
        super().__init__(message)
        self.deployment_id = deployment_id
        self.status = status


class SamplerTerminatedError(ProvisioningError):
    """The sampler's deployment is in a terminal state."""


class TransportError(LoopsError):
    """No complete answer arrived, so the service may or may not have acted."""

    retryable = True


class ConnectError(TransportError, ConnectionError):
    """The connection could not be made, or broke.

    `was_sent` is False when the service certainly did not get the request.
    """

    def __init__(self, message: str, *, was_sent: bool = True) -> None:
        super().__init__(message)
        self.was_sent = was_sent


class RequestTimeoutError(TransportError, TimeoutError):
    """One HTTP request outlived its time limit of `timeout` seconds."""

    def __init__(self, message: str, *, timeout: float | None = None) -> None:
        super().__init__(message)
        self.timeout = timeout


class SampleTimeoutError(RequestTimeoutError):
    """A sample outlived its time limit; never repeated by itself, since that would pay twice."""

    retryable = False


class LostAnswerError(TransportError):
    """The answer to a creation was lost, so what it makes may exist and cost money; the message says how to find it.

    Not repeated by itself, since that would pay twice. `candidates` are ids of runs of which one may be it.
    """

    retryable = False

    def __init__(self, message: str, *, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.candidates = candidates


class ProtocolError(TransportError):
    """Something answered, but not in the language of Loops."""

    retryable = False


class ApiError(LoopsError):
    """The service refused a request.

    `status` is the HTTP status, `code` and `reason` the service's stable words where it gives any,
    `request_id` the id to quote to support.
    """

    status_codes: ClassVar[tuple[int, ...]] = ()

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        reason: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.retry_after = retry_after
        self.retryable: bool = status in (408, 429, 502, 503, 504)


class BadRequestError(ApiError):
    """The service finds the request malformed (400, 413, 422)."""

    status_codes: ClassVar[tuple[int, ...]] = (400, 413, 422)


class AuthenticationError(ApiError):
    """The API key is missing or wrong (401)."""

    status_codes: ClassVar[tuple[int, ...]] = (401,)


class PermissionDeniedError(ApiError):
    """The API key is not allowed to do this (403)."""

    status_codes: ClassVar[tuple[int, ...]] = (403,)


class NotFoundError(ApiError):
    """No such object (404), or it is gone (410)."""

    status_codes: ClassVar[tuple[int, ...]] = (404, 410)


class ConflictError(ApiError):
    """The object is in a state that does not allow this (409)."""

    status_codes: ClassVar[tuple[int, ...]] = (409,)


class RateLimitError(ApiError):
    """Too many requests (429); `retry_after` is in seconds where the service says it."""

    status_codes: ClassVar[tuple[int, ...]] = (429,)


class ServerError(ApiError):
    """The service failed (5xx)."""


class ServerShutdownError(ServerError):
    """The trainer is shutting down (503); its run has to be provisioned again."""


class OperationError(LoopsError):
    """An operation was accepted and failed later.

    `operation_id`, `operation` (its name on the wire) and `run_id` are what support asks for;
    `category` is ``"remote"``, ``"unknown"`` or ``"timeout"``.
    """

    category: ClassVar[str] = "operation"

    def __init__(self, message: str, *, operation_id: str, operation: str, run_id: str | None) -> None:
        super().__init__(f"{message} (run_id={run_id}, operation={operation}, operation_id={operation_id})")
        self.operation_id = operation_id
        self.operation = operation
        self.run_id = run_id


class RemoteOpError(OperationError):
    """The service ran the operation and says that it failed; `error_class` is its word for why."""

    category = "remote"

    def __init__(
        self, message: str, *, operation_id: str, operation: str, run_id: str | None, error_class: str | None = None
    ) -> None:
        prefix = f"{error_class}: " if error_class else ""
        super().__init__(f"{prefix}{message}", operation_id=operation_id, operation=operation, run_id=run_id)
        self.error_class = error_class


class UnknownRequestError(OperationError):
    """The service does not know the operation: never accepted, lost, or finished over an hour ago."""

    category = "unknown"


class OperationTimeoutError(OperationError, TimeoutError):
    """One wait ended at its time limit; the operation goes on and can be waited for again."""

    category = "timeout"
    retryable = True

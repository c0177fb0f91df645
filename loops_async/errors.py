"""Every error that the library raises.

::

    LoopsError                      root: picklable, `.retryable`
    ├── ConfigError                 also ValueError: arguments or environment variables are wrong
    ├── InputError                  also ValueError: `.path`, rejected before anything was sent
    ├── BudgetExceededError         also RuntimeError: `.limit`, the client's budget is used up; nothing was sent
    ├── UnsupportedError            also NotImplementedError: the service does not support this
    ├── ClosedError                 also RuntimeError: the client is closed, or was opened elsewhere
    ├── NotReadyError               also TimeoutError and RuntimeError: a trainer or sampler was not ready in time
    ├── CallTimeoutError            also TimeoutError: one wait for a started call ended, the call continues
    ├── ProvisioningError           also RuntimeError: a deployment ended in a terminal state
    │   └── SamplerTerminatedError  `.deployment_id`, `.status`
    ├── TransportError              no complete answer arrived
    │   ├── ConnectError            also ConnectionError
    │   ├── RequestTimeoutError     also TimeoutError
    │   │   └── SampleTimeoutError  `.timeout`; never retried automatically
    │   ├── LostAnswerError         something that costs money may exist or be paid; never retried automatically
    │   └── ProtocolError           the answer does not follow the Loops protocol
    ├── ApiError                    `.status`, `.code`, `.reason`, `.request_id`, `.body`
    │   ├── BadRequestError         400, 413, 422
    │   ├── AuthenticationError     401
    │   ├── PermissionDeniedError   403
    │   ├── NotFoundError           404, 410
    │   ├── ConflictError           409
    │   ├── RateLimitError          429, `.retry_after`
    │   └── ServerError             5xx
    │       └── ServerShutdownError 503 of a trainer
    ├── NotRecordedError            also AssertionError: a cassette that is replayed has no answer
    ├── JournalError                a journal cannot be used, or what it recorded is gone
    │   └── JournalMismatchError    the program does something else than it recorded: `.field`, `.recorded`, `.given`
    ├── RolloutError                also RuntimeError: rollouts cannot go on: `.failures`
    ├── WorkerError                 code failed in a worker: `.error_type`, `.traceback`, `.worker`
    │   ├── WorkerTimeoutError      also TimeoutError: its time limit, `.timeout`
    │   └── WorkerDiedError         the process of a worker ended
    └── OperationError              an accepted operation failed: `.operation_id`, `.category`
        ├── RemoteOpError           `.error_class`
        ├── UnknownRequestError     the service does not know the operation, or no longer does
        └── OperationTimeoutError   also TimeoutError: one wait ended, the operation continues

A message names the request, the answer, the ids to quote to support, and the next step.
No message contains an API key or the query of a signed URL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeGuard

from msgspec import Struct, convert

from ._values import Errors, Value

__all__ = [
    "ApiError",
    "AuthenticationError",
    "BadRequestError",
    "BudgetExceededError",
    "CallTimeoutError",
    "ClosedError",
    "ConfigError",
    "ConflictError",
    "ConnectError",
    "InputError",
    "JournalError",
    "JournalMismatchError",
    "LoopsError",
    "LostAnswerError",
    "NotFoundError",
    "NotReadyError",
    "NotRecordedError",
    "OperationError",
    "OperationTimeoutError",
    "PermissionDeniedError",
    "ProtocolError",
    "ProvisioningError",
    "RateLimitError",
    "RemoteOpError",
    "RequestTimeoutError",
    "RolloutError",
    "SampleTimeoutError",
    "SamplerTerminatedError",
    "ServerError",
    "ServerShutdownError",
    "TransportError",
    "UnfinishedSubmission",
    "UnknownRequestError",
    "UnsupportedError",
    "WorkerDiedError",
    "WorkerError",
    "WorkerTimeoutError",
]


def _rebuild(cls: type[LoopsError], args: tuple[Any, ...], fields: dict[str, Any]) -> LoopsError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class UnfinishedSubmission(Value, Struct, frozen=True, kw_only=True):
    """An operation of which the trainer has perhaps, or in part, executed what was sent.

    `operation` is its name on the wire and `keys` are the idempotency keys of its parts in order, one unless the batch
    was split. `accepted` counts the datums, from the first one on, that the trainer has accepted for certain; where a
    part failed when it was executed, its datums are not counted. `digest` identifies what was sent.

    The trainer executes what has the same key once. So making the same call again is safe while no other operation was
    sent after it: it is sent with these keys. Later, pass this as `resume`.
    """

    operation: str
    keys: tuple[str, ...]
    digest: str
    accepted: int = 0


class LoopsError(Exception):
    """Root of every error of this library.

    `retryable` says whether the same call may succeed when it is repeated unchanged. `unfinished` is given where a
    trainer has perhaps, or in part, executed an operation whose submission or execution failed.
    """

    retryable: bool = False
    unfinished: UnfinishedSubmission | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Rebuilt without `__init__`, so that every subclass pickles whatever its arguments are.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class ConfigError(LoopsError, ValueError):
    """The arguments or environment variables of a client are wrong or missing."""


class InputError(LoopsError, ValueError):
    """An argument is invalid; nothing was sent, and the order of operations is unaffected.

    `path` names the field, e.g. ``data[3].loss_fn_inputs['weights']``.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class BudgetExceededError(LoopsError, RuntimeError):
    """A call would go beyond a limit of the client's `Budget`; nothing was sent, and what is under way goes on.

    `limit` is the name of the limit and `most` its value, `used` what is used or under way, and `would_be` what it
    would have become, each in the unit of the limit.
    """

    def __init__(self, message: str, *, limit: str, most: float, used: float, would_be: float) -> None:
        super().__init__(message)
        self.limit = limit
        self.most = most
        self.used = used
        self.would_be = would_be


class UnsupportedError(LoopsError, NotImplementedError):
    """The service does not support the request."""


class ClosedError(LoopsError, RuntimeError):
    """The client is closed, not yet open, or was opened elsewhere, e.g. in another process."""


class NotReadyError(LoopsError, TimeoutError, RuntimeError):
    """A trainer or sampler was not ready, or did not serve the requested version, within the time limit."""

    retryable = True


class CallTimeoutError(LoopsError, TimeoutError):
    """One wait for a call that was started reached its limit of `timeout` seconds; the call continues."""

    retryable = True

    def __init__(self, message: str, *, timeout: float | None = None) -> None:
        super().__init__(message)
        self.timeout = timeout


class NotRecordedError(LoopsError, AssertionError):
    """A request is not in the cassette that `loops_async.testing.replay` plays, or not that often; nothing was sent.

    The message names the recorded request that is most like it, and what differs.
    """


class JournalError(LoopsError):
    """A journal cannot be used: it is in use, or of another service, or what it recorded is gone.

    The message says what to do: finish elsewhere, or begin a new journal, and from which saved state.
    """


class JournalMismatchError(JournalError):
    """A program that was started again does something else than its journal recorded; nothing was sent.

    `field` is the first field that differs, e.g. ``adam_params.learning_rate`` or ``data[3]``; `recorded` and `given`
    are its values in the journal and in the program, as text.
    """

    def __init__(self, message: str, *, field: str, recorded: str, given: str) -> None:
        super().__init__(message)
        self.field = field
        self.recorded = recorded
        self.given = given


class ProvisioningError(LoopsError, RuntimeError):
    """A deployment reached a terminal state, from which it does not recover."""

    def __init__(self, message: str, *, deployment_id: str | None = None, status: str) -> None:
        super().__init__(message)
        self.deployment_id = deployment_id
        self.status = status


class SamplerTerminatedError(ProvisioningError):
    """The sampler's deployment is in a terminal state."""


class TransportError(LoopsError):
    """No complete answer arrived, so the service may or may not have executed the request."""

    retryable = True


class ConnectError(TransportError, ConnectionError):
    """The connection could not be established, or broke.

    `was_sent` is False when the service certainly did not receive the request; `has_begun` is True when a part of the
    answer had arrived.
    """

    def __init__(self, message: str, *, was_sent: bool = True, has_begun: bool = False) -> None:
        super().__init__(message)
        self.was_sent = was_sent
        self.has_begun = has_begun


class RequestTimeoutError(TransportError, TimeoutError):
    """One HTTP request took longer than its limit of `timeout` seconds."""

    def __init__(self, message: str, *, timeout: float | None = None) -> None:
        super().__init__(message)
        self.timeout = timeout


class SampleTimeoutError(RequestTimeoutError):
    """A sample took longer than its time limit; never retried automatically, since that would cost twice."""

    retryable = False


class LostAnswerError(TransportError):
    """The answer to a request that costs money was lost, and nothing would keep the service from executing it twice.

    A run, a sampler or a model may exist: the message says how to find it, and `candidates` are the ids of those that
    may be the new one. Or a sample may have been generated and paid for. Never retried automatically.
    """

    retryable = False

    def __init__(self, message: str, *, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.candidates = candidates


class ProtocolError(TransportError):
    """An answer arrived that does not follow the Loops protocol; `status` is its HTTP status, where it has one.

    `quote` is the part of the message that comes from the answer's body; the log leaves it out.
    """

    retryable = False
    quote: str = ""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ApiError(LoopsError):
    """The service answered with an error status.

    `status` is the HTTP status; `code` and `reason` are the service's stable identifiers of the error, if it sends any;
    `request_id` is the id to quote to support; `retry_after` is the pause in seconds that the service asks for.
    `may_have_acted` is False when the service certainly did not execute the request; `from_gateway` is True when the
    body is not an error of Loops, so that something between here and the service has answered.

    `body` is the answer's body without secrets: decoded, where it is JSON of at most 16 KiB, else the first 16 KiB of
    its text, and None where it is empty.
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
        body: Any = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.retry_after = retry_after
        # From 520 on: answers of content networks.
        self.retryable: bool = status in (408, 429, 502, 503, 504) or 520 <= status <= 530
        self.may_have_acted: bool = status == 408 or (status >= 500 and status not in (501, 503))
        self.from_gateway: bool = False


class BadRequestError(ApiError):
    """The service rejected the request as invalid (400, 413, 422)."""

    status_codes: ClassVar[tuple[int, ...]] = (400, 413, 422)


class AuthenticationError(ApiError):
    """The API key is missing or wrong (401)."""

    status_codes: ClassVar[tuple[int, ...]] = (401,)


class PermissionDeniedError(ApiError):
    """The API key is not allowed to do this (403)."""

    status_codes: ClassVar[tuple[int, ...]] = (403,)


class NotFoundError(ApiError):
    """The object does not exist (404), or no longer does (410)."""

    status_codes: ClassVar[tuple[int, ...]] = (404, 410)


class ConflictError(ApiError):
    """The state of the object does not allow the request (409)."""

    status_codes: ClassVar[tuple[int, ...]] = (409,)


class RateLimitError(ApiError):
    """Too many requests (429)."""

    status_codes: ClassVar[tuple[int, ...]] = (429,)


class ServerError(ApiError):
    """The service failed (5xx)."""


class ServerShutdownError(ServerError):
    """The trainer is shutting down (503); its run must be provisioned again."""


class RolloutError(LoopsError, RuntimeError):
    """Rollouts cannot go on: too many have failed or were dropped, or a call that they wait for is missing.

    Also raised where the tasks end without any batch, and groups have failed. `failures` counts the errors of the
    groups that have failed so far, by the names of their classes; the last of them is the ``__cause__``, or the first
    where the tasks ended without a batch.
    """

    def __init__(self, message: str, *, failures: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        self.failures: dict[str, int] = dict(failures or {})


class WorkerError(LoopsError):
    """Code that an executor ran in a worker failed with an error that cannot be raised here.

    An exception that can be pickled is raised itself, with the worker's traceback as a note.

    `error_type` is the name of the error's class, `traceback` the worker's traceback as text, and `worker` says which
    process it was. Each is None where it is not known.
    """

    def __init__(
        self, message: str, *, error_type: str | None = None, traceback: str | None = None, worker: str | None = None
    ) -> None:
        super().__init__(message)
        self.error_type = error_type
        self.traceback = traceback
        self.worker = worker


class WorkerTimeoutError(WorkerError, TimeoutError):
    """A rollout in a worker took longer than its time limit of `timeout` seconds, and was ended."""

    def __init__(self, message: str, *, timeout: float | None = None, worker: str | None = None) -> None:
        super().__init__(message, worker=worker)
        self.timeout = timeout


class WorkerDiedError(WorkerError):
    """The process of a worker ended, and with it what ran there; the next call gets a new process."""

    retryable = True


class OperationError(LoopsError):
    """An operation was accepted and failed later.

    `operation_id`, `operation` (its name on the wire) and `run_id` are the ids to quote to support;
    `category` is ``"remote"``, ``"unknown"`` or ``"timeout"``.
    """

    category: ClassVar[str] = "operation"

    def __init__(self, message: str, *, operation_id: str, operation: str, run_id: str | None) -> None:
        super().__init__(f"{message} (run_id={run_id}, operation={operation}, operation_id={operation_id})")
        self.operation_id = operation_id
        self.operation = operation
        self.run_id = run_id


class RemoteOpError(OperationError):
    """The service executed the operation, and it failed; `error_class` is the service's name for the cause."""

    category = "remote"

    def __init__(
        self, message: str, *, operation_id: str, operation: str, run_id: str | None, error_class: str | None = None
    ) -> None:
        prefix = f"{error_class}: " if error_class else ""
        super().__init__(f"{prefix}{message}", operation_id=operation_id, operation=operation, run_id=run_id)
        self.error_class = error_class


class UnknownRequestError(OperationError):
    """The service does not know the operation: it was never accepted, was lost, or ended over an hour ago."""

    category = "unknown"


class OperationTimeoutError(OperationError, TimeoutError):
    """One wait reached its time limit; the operation continues and can be waited for again."""

    category = "timeout"
    retryable = True


def without_quote(error: BaseException) -> str:
    """Return the text of an error for the log, without the beginning of an answer: that may be a completion."""
    text = str(error)
    return text.replace(error.quote, "…") if isinstance(error, ProtocolError) and error.quote else text


# --- errors as fields of values --------------------------------------------------------------------------------------


def _to_fields(error: LoopsError) -> dict[str, Any]:
    return {"type": type(error).__name__, "message": str(error), "retryable": error.retryable, **vars(error)}


class _ErrorFields(Struct):
    type: str
    message: str
    candidates: tuple[str, ...] = ()
    unfinished: UnfinishedSubmission | None = None


def _from_fields(given: Any) -> LoopsError:
    """Return the error that `_to_fields` described; one of a class that is not known here is a `LoopsError`."""
    typed = convert(given, _ErrorFields)
    kind: Any = globals().get(typed.type)
    fields = {name: getattr(typed, name, each) for name, each in given.items() if name not in ("type", "message")}
    return _rebuild(kind if _is_error(kind) else LoopsError, (typed.message,), fields)


def _is_error(kind: Any) -> TypeGuard[type[LoopsError]]:
    return isinstance(kind, type) and issubclass(kind, LoopsError)


Errors.refused, Errors.kind = InputError, LoopsError
Errors.to_fields, Errors.from_fields = _to_fields, _from_fields

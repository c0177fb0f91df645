"""What is under way in a session."""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct

from .._values import Value

__all__ = ["InFlight", "WaitingFor", "WorkKind"]

WorkKind: TypeAlias = Literal["request", "sample", "operation", "provisioning", "download", "readiness"]
"""What is under way."""

WaitingFor: TypeAlias = Literal["turn", "admission", "connection", "answer", "retry", "outcome", "ready"]
"""What it waits for."""


class InFlight(Value, Struct, frozen=True, kw_only=True):
    """One thing that is under way, as `ServiceClient.inflight` found it.

    Requests that belong to a sample, an operation, a download or a wait are part of it, and not listed beside it.

    Attributes:
        kind: ``"request"``, ``"sample"``, ``"operation"`` (from its call until its outcome is known),
            ``"provisioning"`` (of a run or a sampler), ``"download"`` or ``"readiness"`` (a wait for a trainer, a
            sampler or a version).
        what: its name or purpose.
        id: of a sample its idempotency key, of an operation the service's id once it was accepted, of provisioning
            that of the run or sampler once it was created, of a download that of the checkpoint.
        run_id: the run that it belongs to, if any.
        sampler_id: the sampler that it belongs to, if any.
        age: seconds since it began.
        attempt: the number of the attempt that is being made, from 1.
        last_status: the HTTP status of the last answer; of what becomes ready, the status of its deployment, where
            the service reports one. None before the first answer.
        last_error: what went wrong last, or the last news of what is waited for.
        waiting_for: ``"turn"`` (operations before it), ``"admission"`` (one of the calls that may be in flight at
            once), ``"connection"``, ``"answer"``, ``"retry"``, ``"outcome"`` (of what the service has accepted) or
            ``"ready"`` (a deployment); None while it works by itself.
        next_try_in: seconds until the next attempt, while it waits for a retry.
    """

    kind: WorkKind
    what: str
    id: str | None = None
    run_id: str | None = None
    sampler_id: str | None = None
    age: float
    attempt: int = 1
    last_status: int | str | None = None
    last_error: str | None = None
    waiting_for: WaitingFor | None = None
    next_try_in: float | None = None

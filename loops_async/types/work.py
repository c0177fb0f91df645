"""What is under way in a session, and what it has used."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

from .._values import Value
from ..errors import InputError

__all__ = ["InFlight", "Prices", "Usage", "WaitingFor", "WorkKind"]

WorkKind: TypeAlias = Literal["request", "sample", "operation", "provisioning", "download", "readiness"]
"""What is under way."""

WaitingFor: TypeAlias = Literal["turn", "admission", "connection", "answer", "retry", "outcome", "ready"]
"""What it waits for."""


_Price: TypeAlias = Annotated[float, Meta(ge=0.0, le=1e308)]


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


class Prices(Value, Struct, frozen=True, kw_only=True):
    """What things cost, in any currency; the library knows no prices.

    `prompt`, `completion` and `trained` are for a million tokens, `up` is for an hour of a run or a sampler.
    """

    prompt: _Price = 0.0
    completion: _Price = 0.0
    trained: _Price = 0.0
    up: _Price = 0.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            price: Any = getattr(self, name)
            if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < float("inf"):
                raise InputError(name, f"must be a finite number of at least 0; got {price!r}")


class Usage(Value, Struct, frozen=True, kw_only=True):
    """What a session has used until now, or between two moments: ``service.usage - before``.

    Tokens are those that the service reports, and else those of the data that was sent and answered. What a session
    made ready by itself, e.g. the adapter of a new run, counts as requests only.

    Attributes:
        prompt_tokens: tokens of prompts, once for each request however many samples it asks for.
        completion_tokens: sampled tokens.
        trained_tokens: positions whose weight or advantage is not 0, of all backward passes that were accepted.
        datums: examples of all forward and backward passes that were accepted.
        samples: answered calls of `SamplingClient.sample`.
        operations: operations that a trainer has accepted.
        requests: HTTP requests, including those that failed and were sent again.
        retries: how often something was sent again.
        bytes_sent: the bodies of requests.
        bytes_received: the bodies of answers, as they were received.
        up_seconds: how long the runs and samplers that were created here were there; they cost money until they are
            deactivated or scaled to zero. A run counts once, with its sampler.
        by_run: the same for each run, by its id; the total also has what belongs to no run.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    trained_tokens: int = 0
    datums: int = 0
    samples: int = 0
    operations: int = 0
    requests: int = 0
    retries: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    up_seconds: float = 0.0
    by_run: dict[str, Usage] = {}

    def __sub__(self, earlier: Usage) -> Usage:
        """Return what was used since `earlier`, a snapshot of the same session."""
        if not isinstance(earlier, Usage):
            return NotImplemented
        numbers = {
            name: getattr(self, name) - getattr(earlier, name) for name in self.__struct_fields__ if name != "by_run"
        }
        by_run = {run_id: usage - earlier.by_run.get(run_id, Usage()) for run_id, usage in self.by_run.items()}
        return Usage(**numbers, by_run=by_run)

    def cost(self, prices: Prices) -> float:
        """Return what this costs, in the currency of `prices`.

        Example:
            >>> from loops_async import Prices, Usage
            >>> Usage(prompt_tokens=2_000_000, up_seconds=1800).cost(Prices(prompt=0.25, up=4.0))
            2.5
        """
        tokens = (
            self.prompt_tokens * prices.prompt
            + self.completion_tokens * prices.completion
            + self.trained_tokens * prices.trained
        )
        return tokens / 1e6 + self.up_seconds * prices.up / 3600

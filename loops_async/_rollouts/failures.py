"""Which failures of rollouts are tolerated, and when there are too many."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from typing import Final

from msgspec import Struct

from .._arguments import check_at_least, check_finite
from .._http import retry
from .._values import Value
from ..errors import InputError, RolloutError

__all__ = ["Breaker", "FailurePolicy"]

log = logging.getLogger("loops_async")

PAUSES: Final = retry.RetryPolicy(tries=1, seconds=0.0, first_pause=1.0, longest_pause=30.0)
"""Only the pauses count: how often an episode is repeated is the user's choice."""


class FailurePolicy(Value, Struct, frozen=True, kw_only=True):
    """Which failures a stream of rollouts tolerates.

    An episode that fails is repeated up to `retries` times, with pauses, if the failure may pass: the error says
    `LoopsError.retryable`, is an `OSError` or a `TimeoutError`, or belongs to `retry_on`, a tuple of classes. Any other
    exception fails at once, since it would come again. The group of an episode that has failed for good fails, too,
    unless at least `min_group_size` members are left; None needs all of them.

    The stream ends with a `RolloutError` when `max_failures_in_a_row` groups have failed without another in between,
    when at least `max_failure_share` of the last `window` groups have failed, or when `max_drops_in_a_row` groups were
    dropped without one to learn from: tasks that are always solved, or never, cost as much as others.
    """

    retries: int = 2
    retry_on: tuple[type[BaseException], ...] = ()
    min_group_size: int | None = None
    max_failures_in_a_row: int = 8
    max_failure_share: float = 0.5
    window: int = 32
    max_drops_in_a_row: int = 200

    def __post_init__(self) -> None:
        check_at_least(self.retries, 0, "retries")
        if not isinstance(self.retry_on, tuple):
            raise InputError("retry_on", f"expected a tuple of classes of exceptions; got {self.retry_on!r}")
        for index, kind in enumerate(self.retry_on):
            if not isinstance(kind, type) or not issubclass(kind, BaseException):
                raise InputError(f"retry_on[{index}]", f"expected a class of exceptions; got {kind!r}")
        if self.min_group_size is not None:
            check_at_least(self.min_group_size, 1, "min_group_size")
        for name in ("max_failures_in_a_row", "window", "max_drops_in_a_row"):
            check_at_least(getattr(self, name), 1, name)
        if not 0.0 < check_finite(self.max_failure_share, "max_failure_share") <= 1.0:
            raise InputError("max_failure_share", f"must be above 0 and at most 1; got {self.max_failure_share}")

    def may_pass(self, error: BaseException) -> bool:
        """Whether the same episode may succeed when it is repeated.

        A cancellation counts as an error here, e.g. one that a library raises by mistake; the caller knows whether it
        was asked for.
        """
        if getattr(error, "retryable", False) is True:
            return True
        return isinstance(error, (OSError, TimeoutError, asyncio.CancelledError, *self.retry_on))

    def pause_before(self, attempt: int, error: BaseException) -> float:
        """Return the seconds to wait before attempt number `attempt`, from 1, after `error`."""
        return retry.pause_before(attempt - 1, error, PAUSES)


class Breaker:
    """Counts how groups end, and opens when a `FailurePolicy` tolerates no more."""

    def __init__(self, policy: FailurePolicy) -> None:
        self._policy = policy
        self._failures: Counter[str] = Counter()
        self._first: BaseException | None = None
        self._last: BaseException | None = None
        self._accepted = self._constant = self._incomplete = 0
        self._failures_in_a_row = 0
        self._drops_in_a_row = 0
        self._window: deque[bool] = deque(maxlen=policy.window)
        """Whether each of the last groups has failed."""

    def accepted(self) -> None:
        """Count a group that will be trained."""
        self._accepted += 1
        self._failures_in_a_row = self._drops_in_a_row = 0
        self._window.append(False)

    def dropped(self, *, is_constant: bool) -> None:
        """Count a group that has ended without something to learn: its advantages are all 0, or it lacks members."""
        self._constant += is_constant
        self._incomplete += not is_constant
        self._failures_in_a_row = 0
        self._drops_in_a_row += 1
        self._window.append(False)

    def failed(self, error: BaseException) -> None:
        """Count a group that has failed with `error`."""
        self._failures[type(error).__name__] += 1
        self._first = self._first or error
        self._last = error
        self._failures_in_a_row += 1
        self._window.append(True)

    @property
    def error(self) -> RolloutError | None:
        """The error to raise when the breaker is open, else None."""
        reason = self._reason()
        if reason is None:
            return None
        last = f" The last error: {_shown(self._last)}" if self._last is not None else ""
        message = f"{reason} Failed groups so far: {self._counts() or 'none'}.{last}"
        return self._error(message, self._last)

    def end_without_batch(self, *, may_raise: bool) -> RolloutError | None:
        """Say why the tasks ended without a batch: return the error to raise if groups have failed, else warn."""
        ended = {
            f"failed ({self._counts()})": self._failures.total(),
            "were dropped with nothing to learn, e.g. because the rewards are equal (keep_constant_groups=True keeps "
            "them)": self._constant,
            "were dropped because too many members are None (see FailurePolicy.min_group_size)": self._incomplete,
            "finished, too few for a step (drop_last=False keeps them)": self._accepted,
        }
        reasons = "; ".join(f"{count} {what}" for what, count in ended.items() if count)
        if not reasons:
            return None
        message = f"the tasks ended without a batch to train on. Groups: {reasons}."
        if self._first is not None and may_raise:
            return self._error(f"{message} The first error: {_shown(self._first)}", self._first)
        log.warning("%s", message)
        return None

    def _counts(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in self._failures.most_common())

    def _error(self, message: str, cause: BaseException | None) -> RolloutError:
        error = RolloutError(message, failures=self._failures)
        error.__cause__ = cause
        return error

    def _reason(self) -> str | None:
        policy = self._policy
        if self._failures_in_a_row >= policy.max_failures_in_a_row:
            return f"{self._failures_in_a_row} groups failed in a row, see FailurePolicy.max_failures_in_a_row."
        failed = sum(self._window)
        if len(self._window) == policy.window and failed >= policy.max_failure_share * policy.window:
            return f"{failed} of the last {policy.window} groups failed, see FailurePolicy.max_failure_share."
        if self._drops_in_a_row >= policy.max_drops_in_a_row:
            return (
                f"{self._drops_in_a_row} groups were dropped in a row: their members have equal rewards, or too many "
                "returned None. Choose other tasks, or see FailurePolicy.max_drops_in_a_row."
            )
        return None


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

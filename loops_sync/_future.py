"""Operations under way, waited for by blocking: written by hand, since here `await` becomes a method."""

from __future__ import annotations

from typing import TypeVar

import loops_async

from ._handle import Handle

__all__ = ["OperationFuture"]

T = TypeVar("T")


class OperationFuture(Handle[loops_async.OperationFuture[T]]):
    """The result of an operation that the service has accepted.

    Any number of threads may wait. A waiter that gives up (time-out, Ctrl-C) harms neither the others nor the
    operation. An outcome, good or bad, is kept; a failure to reach the service is not an outcome, so waiting again
    asks again.

    Example:
        ::

            step = trainer.forward_backward(data)
            optim = trainer.optim_step(loops.AdamParams())
            loss = step.result().loss
            optim.result(timeout=60)
    """

    @property
    def operation_id(self) -> str:
        """The service's id of the operation (of its first part, where it was split)."""
        return self._impl.operation_id

    def done(self) -> bool:
        """Whether the outcome is known here; asks nobody."""
        return self._bridge.call(self._impl.done)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result.

        Args:
            timeout: seconds to wait at most; None waits as long as it takes.

        Raises:
            OperationTimeoutError: this wait is over; the operation goes on, and can be waited for again.
            RemoteOpError: the service ran the operation and it failed.
            UnknownRequestError: the service does not know the operation (any more).
            ServerShutdownError: the trainer is going away.
            TransportError: the service could not be reached for two minutes; waiting again asks again.
            ClosedError: the client was closed before the outcome was known.
        """
        return self._bridge.run(self._impl.result, timeout)

    def settled(self) -> T | None:
        """Wait until there is an outcome, and return it, or None for a failure, which is left for others to hear."""
        return self._bridge.run(self._impl.settled)

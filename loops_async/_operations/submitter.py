"""Submitting the operations of one trainer in order, and collecting their results."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, TypeVar
from uuid import uuid4

from .. import protocol
from .._http.endpoint import Endpoint
from .._http.retry import SUBMIT, retry
from .._http.transport import Answer, Transport
from .._tasks import TaskOwner, gather_or_raise
from ..errors import ApiError, ClosedError, LoopsError, ServerShutdownError
from .future import OperationFuture
from .operation import Encoded, MakeBody, Operation
from .poller import Poller, accepted_id
from .results import decoder_for
from .turns import Turn, Turns

T = TypeVar("T")

log = logging.getLogger("loops_async")

POLLS_AT_ONCE: Final = 8
"""Operations of a trainer finish in order, so polling only the oldest few loses no time."""

LOST: Final = (
    "The trainer does not know the operation: it keeps results for about an hour, and loses them when it restarts. "
    "Submit it again, from the last saved state if the trainer was restarted."
)


class Submitter:
    """Submits the operations of the trainer at `endpoint`, in the order of `turns`.

    Invariant: an operation is not sent until the previous one was answered, and `seq_id` counts the operations that
    the trainer may have accepted. An operation that ends before it is sent affects neither.
    """

    def __init__(self, endpoint: Endpoint, turns: Turns, *, transport: Transport, tasks: TaskOwner) -> None:
        self._endpoint = endpoint
        self._turns = turns
        self._transport = transport
        self._tasks = tasks
        self._poller = Poller(endpoint, transport, explain=_recognize_shutdown, lost=LOST, at_once=POLLS_AT_ONCE)

    async def submit(self, operation: Operation[T]) -> OperationFuture[T]:
        """Submit an operation and return its future as soon as the trainer has accepted it.

        The turn is taken before this coroutine first suspends. If the caller is cancelled before the request is sent,
        the operation is cancelled, too; after that, the operation runs and only its future is lost.
        """
        self._transport.check_usable()
        submission = _Submission(operation.name, self._turns.take())
        task = self._tasks.start(self._send_in_turn(operation, submission), name=f"submit {operation.name}")
        # A callback ends the turn, since a task that is cancelled before it starts never enters its coroutine.
        task.add_done_callback(submission.finish)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise ClosedError(f"the client was closed before {operation.name} was submitted") from None
            submission.abandon(task)
            raise

    async def send(self, operation: Operation[T]) -> OperationFuture[T]:
        """Send an operation within the current turn, for an operation that depends on it, and return its future."""
        return await self._send_parts(operation, await operation.encode())

    async def _send_in_turn(self, operation: Operation[T], submission: _Submission) -> OperationFuture[T]:
        if operation.is_dependent:
            await submission.turn.wait()
        encoded = await operation.encode()
        await submission.turn.wait()
        submission.is_sent = True
        return await self._send_parts(operation, encoded)

    async def _send_parts(self, operation: Operation[T], encoded: Encoded[T]) -> OperationFuture[T]:
        name, decode = operation.name, decoder_for(operation.result)
        ids = [await self._send(name, body) for body in encoded.bodies]

        async def collect() -> T:
            return encoded.merge(await gather_or_raise([self._poller.result(name, each, decode) for each in ids]))

        return OperationFuture(
            collect, tasks=self._tasks, operation=name, operation_id=ids[0], run_id=self._endpoint.run_id
        )

    async def _send(self, name: str, body: MakeBody) -> str:
        seq_id = self._turns.sent + 1
        request = self._endpoint.request(
            "POST",
            f"/{name}",
            f"submit {name} of run {self._endpoint.run_id}",
            body=body(seq_id),
            # The key makes a retry safe, also after a lost answer.
            headers={**self._endpoint.headers, protocol.IDEMPOTENCY_KEY: uuid4().hex},
        )

        async def ask() -> Answer:
            answer = await self._transport.send(request)
            if answer.is_success:
                return answer
            raise _recognize_shutdown(self._transport.error(request, answer))

        self._turns.sent = seq_id
        try:
            answer = await retry(ask, SUBMIT, what=f"{name} was not accepted")
        except ApiError as error:
            if error.status < 500:
                self._turns.sent -= 1
            raise
        return accepted_id(self._transport, request, answer)


class _Submission:
    """The state of one operation until it is submitted."""

    def __init__(self, operation: str, turn: Turn) -> None:
        self.operation = operation
        self.turn = turn
        self.is_sent = False
        self._is_abandoned = False

    def abandon(self, task: asyncio.Task[Any]) -> None:
        """Cancel the operation if it was not sent, since its caller was cancelled."""
        self._is_abandoned = True
        if not self.is_sent:
            task.cancel()

    def finish(self, task: asyncio.Task[Any]) -> None:
        """End the turn, and log a failure that no caller receives."""
        self.turn.end()
        if self._is_abandoned and not task.cancelled() and (error := task.exception()):
            log.warning("%s failed after its caller was cancelled: %s", self.operation, error)


def _recognize_shutdown(error: LoopsError) -> LoopsError:
    """Return `error`, or a `ServerShutdownError` for a 503: the trainer is shutting down, so no retry can succeed."""
    if not isinstance(error, ApiError) or error.status != 503:
        return error
    shutdown = ServerShutdownError(
        f"{error} The trainer is shutting down; create a new run from the last saved state.",
        status=error.status,
        code=error.code,
        reason=error.reason,
        request_id=error.request_id,
        retry_after=error.retry_after,
    )
    shutdown.retryable = False
    return shutdown

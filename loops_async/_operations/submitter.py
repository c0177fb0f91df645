"""Submitting the operations of one trainer in order, and collecting their results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias, TypeVar
from uuid import uuid4

from .. import protocol
from .._http.body import Body as RequestBody
from .._http.retry import SUBMIT, retrying
from .._http.transport import Answer, Request, Transport
from .._tasks import TaskOwner, gather_or_raise
from ..errors import (
    ApiError,
    ClosedError,
    ServerError,
    ServerShutdownError,
)
from .future import OperationFuture
from .poller import Poller, accepted_id
from .results import decoder_for
from .turns import Turn, Turns

T = TypeVar("T")

Body: TypeAlias = Callable[[int], RequestBody]
"""Makes a request's body from its `seq_id`, which is known only when its turn has come."""

log = logging.getLogger("loops_async")

POLLS_AT_ONCE: Final = 8
"""Operations of a trainer finish in order, so asking for the oldest few is as good as asking for all."""

LOST: Final = (
    "The trainer does not know the operation: results are kept for about an hour, and not across a restart of the "
    "trainer. Submit it again, from the last saved state if the trainer is new."
)


class Submitter:
    """The operations of one trainer, in the order of `turns`.

    Invariant: the POST of an operation is not sent before the one before it was answered, and `seq_id` counts the
    operations that the trainer may have accepted. Whatever ends before it is sent leaves no trace in either.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        tasks: TaskOwner,
        turns: Turns,
        root: str,
        run_id: str,
        timeout: float,
        authorize: bool,
    ) -> None:
        self._transport = transport
        self._tasks = tasks
        self._root = root
        self._run_id = run_id
        self._timeout = timeout
        self._authorize = authorize
        self._turns = turns
        self._poller = Poller(
            transport,
            root=root,
            headers={protocol.RUN_ID: run_id},
            authorize=authorize,
            run_id=run_id,
            explain=lambda error: _shutdown(error) if error.status == 503 else error,
            lost=LOST,
            at_once=POLLS_AT_ONCE,
        )

    async def submit(
        self,
        operation: str,
        kind: type[T],
        encode: Callable[[], Awaitable[list[Body]]],
        merge: Callable[[Sequence[T]], T] | None = None,
        *,
        is_dependent: bool = False,
    ) -> OperationFuture[T]:
        """Submit an operation and return its future as soon as the trainer has accepted it.

        The turn is taken before this coroutine first waits. A caller that is cancelled before the request is sent
        withdraws it; later, the operation goes its way and only its future is lost.

        Args:
            operation: its name on the wire.
            kind: the type of its result.
            encode: makes the bodies, one for each part that the operation is sent in.
            merge: makes one result of those of all parts.
            is_dependent: what is sent depends on the operations before: `encode` is called when the turn has come,
                and may call `send`.
        """
        self._transport.check_usable()
        submission = _Submission(operation, self._turns.take())
        task = self._tasks.start(self._send_in_turn(submission, encode, is_dependent), name=f"submit {operation}")
        # A task that is cancelled before it starts never enters its coroutine, so its turn is ended from outside.
        task.add_done_callback(submission.ended)
        try:
            operation_ids = await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise ClosedError(f"the client was closed before {operation} was submitted") from None
            submission.abandon(task)
            raise
        return self._future(operation, operation_ids, kind, merge)

    async def send(
        self, operation: str, kind: type[T], bodies: list[Body], merge: Callable[[Sequence[T]], T] | None = None
    ) -> OperationFuture[T]:
        """Send an operation inside the turn of one that depends on it, and return its future."""
        operation_ids = [await self._send(operation, body) for body in bodies]
        return self._future(operation, operation_ids, kind, merge)

    async def _send_in_turn(
        self, submission: _Submission, encode: Callable[[], Awaitable[list[Body]]], is_dependent: bool
    ) -> list[str]:
        if is_dependent:
            await submission.turn.wait()
        bodies = await encode()
        await submission.turn.wait()
        submission.is_sent = True
        return [await self._send(submission.operation, body) for body in bodies]

    async def _send(self, operation: str, body: Body) -> str:
        seq_id = self._turns.sent + 1
        request = Request(
            method="POST",
            url=f"{self._root}/{operation}",
            what=f"submit {operation} of run {self._run_id}",
            body=body(seq_id),
            headers={protocol.RUN_ID: self._run_id, protocol.IDEMPOTENCY_KEY: uuid4().hex},
            timeout=self._timeout,
            authorize=self._authorize,
        )
        self._turns.sent = seq_id
        try:
            # The key makes a repeated submission harmless, also after an answer that was lost.
            answer = await retrying(lambda: self._ask(request), SUBMIT, what=f"{operation} was not accepted")
        except ApiError as refused:
            if refused.status < 500:
                self._turns.sent -= 1
            raise
        return accepted_id(self._transport, request, answer)

    async def _ask(self, request: Request) -> Answer:
        try:
            return await self._transport.ask(request)
        except ServerError as error:
            if error.status == 503:
                raise _shutdown(error) from error
            raise

    def _future(
        self,
        operation: str,
        operation_ids: list[str],
        kind: type[T],
        merge: Callable[[Sequence[T]], T] | None,
    ) -> OperationFuture[T]:
        decode = decoder_for(kind)

        async def collect() -> T:
            if merge is None:
                return await self._poller.result(operation, operation_ids[0], decode)
            parts = [self._poller.result(operation, operation_id, decode) for operation_id in operation_ids]
            return merge(await gather_or_raise(parts))

        return OperationFuture(
            collect, tasks=self._tasks, operation=operation, operation_id=operation_ids[0], run_id=self._run_id
        )


class _Submission:
    """One operation on its way to the trainer."""

    def __init__(self, operation: str, turn: Turn) -> None:
        self.operation = operation
        self.turn = turn
        self.is_sent = False
        self._is_abandoned = False

    def abandon(self, task: asyncio.Task[Any]) -> None:
        """The caller is gone: withdraw what was not sent, let go what was."""
        self._is_abandoned = True
        if not self.is_sent:
            task.cancel()

    def ended(self, task: asyncio.Task[Any]) -> None:
        self.turn.end()
        if self._is_abandoned and not task.cancelled() and (error := task.exception()):
            log.warning("%s failed after its caller had gone: %s", self.operation, error)


def _shutdown(error: ApiError) -> ServerShutdownError:
    shutdown = ServerShutdownError(
        f"{error} The trainer is shutting down; make a new run from the last saved state.",
        status=error.status,
        code=error.code,
        reason=error.reason,
        request_id=error.request_id,
        retry_after=error.retry_after,
    )
    shutdown.retryable = False
    return shutdown

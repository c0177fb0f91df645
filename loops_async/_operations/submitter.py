"""Submitting the operations of one trainer in order, and collecting their results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from .. import protocol
from .._http.endpoint import Endpoint
from .._http.retry import OPERATION, may_have_acted, retry
from .._http.transport import Transport
from .._journal.journal import Journal
from .._tasks import TaskOwner
from .._work.registry import CURRENT, Entry
from .._work.usage import Counts
from ..errors import (
    ApiError,
    ClosedError,
    LoopsError,
    OperationError,
    ServerShutdownError,
    UnfinishedSubmission,
    without_quote,
)
from .future import OperationFuture
from .operation import Encoded, Operation
from .poller import Decode, Poller, accepted_id
from .recording import NoRecording, Recording, RunRecording
from .results import decoder_for
from .turns import Turn, Turns
from .unfinished import Part, mark_failed, mark_not_accepted, new_parts, parts_of

T = TypeVar("T")
U = TypeVar("U")
R = TypeVar("R")

log = logging.getLogger("loops_async.operations")

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

    def __init__(
        self,
        endpoint: Endpoint,
        turns: Turns,
        *,
        transport: Transport,
        tasks: TaskOwner,
        journal: Journal | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._turns = turns
        self._transport = transport
        self._tasks = tasks
        self._poller = Poller(endpoint, transport, explain=_recognize_shutdown, lost=LOST, at_once=POLLS_AT_ONCE)
        self._recording: Recording = NoRecording()
        if journal is not None and endpoint.run_id is not None:
            self._recording = RunRecording(journal, endpoint.run_id, turns)

    async def submit(
        self, operation: Operation[T], *, resume: UnfinishedSubmission | None = None
    ) -> OperationFuture[T]:
        """Submit an operation and return its future as soon as the trainer has accepted it.

        The turn is taken before this coroutine first suspends. If the caller is cancelled before the request is sent,
        the operation is cancelled, too; after that, the operation runs and only its future is lost.

        An operation that repeats the unfinished one that was sent last, or that of `resume`, gets its keys.
        """
        entry = self._begin(operation)
        send = partial(self._send_in_turn, operation, entry, resume=resume)
        return await self._in_turn(operation.name, [entry], send)

    async def submit_pair(
        self, first: Operation[T], second: Operation[U]
    ) -> tuple[OperationFuture[T], OperationFuture[U]]:
        """Submit two operations in one turn, as `submit` does; the second is sent only if the first was accepted."""
        entries = [self._begin(first), self._begin(second)]

        async def send(submission: _Submission) -> tuple[OperationFuture[T], OperationFuture[U]]:
            accepted = await self._send_in_turn(first, entries[0], submission)
            try:
                return accepted, await self._send_in_turn(second, entries[1], submission)
            except LoopsError as error:
                error.add_note(f"The trainer has accepted {first.name} before; only {second.name} has to be repeated.")
                raise

        return await self._in_turn(f"{first.name} and {second.name}", entries, send)

    def _begin(self, operation: Operation[Any], id_: str | None = None) -> Entry:
        self._transport.check_usable()
        outer = CURRENT.get()
        return self._transport.work.begin(
            "operation",
            operation.name,
            id=id_,
            run_id=self._endpoint.run_id,
            subject=operation,
            endpoint=self._endpoint,
            waiting_for="turn",
            is_counted=outer.is_over or outer.kind != "provisioning",
        )

    async def _in_turn(
        self, name: str, entries: Sequence[Entry], send: Callable[[_Submission], Coroutine[Any, Any, R]]
    ) -> R:
        submission = _Submission(name, self._turns.take(), entries)
        task = self._tasks.start(send(submission), name=f"submit {name}")
        # A callback ends the turn, since a task that is cancelled before it starts never enters its coroutine.
        task.add_done_callback(submission.finish)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise ClosedError(f"the client was closed before {name} was submitted") from None
            submission.abandon(task)
            raise

    async def send(self, operation: Operation[T]) -> OperationFuture[T]:
        """Send an operation within the current turn, for an operation that depends on it, and return its future."""
        entry = self._begin(operation)
        try:
            encoded = await operation.encode()
            self._transport.work.admit(entry, _counts_of(encoded))
            parts = new_parts(encoded)
            await self._recording.begin(encoded, parts)
            return await self._send_parts(operation, entry, encoded, parts)
        except BaseException as error:
            entry.end(error)
            raise

    async def _send_in_turn(
        self,
        operation: Operation[T],
        entry: Entry,
        submission: _Submission,
        *,
        resume: UnfinishedSubmission | None = None,
    ) -> OperationFuture[T]:
        CURRENT.set(entry)  # in the submission's own task
        if operation.is_dependent:
            await submission.turn.wait()
        encoded = await operation.encode()
        await submission.turn.wait()
        parts = await parts_of(operation.name, encoded, resume=resume, latest=self._turns.unfinished)
        self._transport.work.admit(entry, _counts_of(encoded))
        submission.is_sent = True  # what is recorded is sent
        await self._recording.begin(encoded, parts)
        self._turns.latest, self._turns.unfinished = parts[0].key, None
        return await self._send_parts(operation, entry, encoded, parts)

    async def _send_parts(
        self, operation: Operation[T], entry: Entry, encoded: Encoded[T], parts: Sequence[Part]
    ) -> OperationFuture[T]:
        name = operation.name
        entry.id, entry.encoded = parts[0].key, encoded
        CURRENT.set(entry)
        try:
            ids = [await self._accepted(name, part) for part in parts]
        except LoopsError as error:
            if any(part.operation_id or part.may_be_accepted for part in parts):
                await mark_not_accepted(error, name, encoded, parts)
                self._remember(error, parts)
            else:
                self._recording.not_accepted(error)
            raise

        entry.accepted(ids[0])
        entry.release()
        if entry.is_counted:
            entry.counts.add(_counts_of(encoded))

        async def collect() -> T:
            # A wait that failed without news of the operation may be repeated.
            with self._begin(operation, ids[0]) if entry.is_over else entry as waiting:
                waiting.turn_to("outcome")
                return await self._collect(operation, encoded, parts, ids)

        return OperationFuture(
            collect, tasks=self._tasks, operation=name, operation_id=ids[0], run_id=self._endpoint.run_id
        )

    async def _collect(
        self, operation: Operation[T], encoded: Encoded[T], parts: Sequence[Part], ids: Sequence[str]
    ) -> T:
        """Wait for all parts and merge their results."""
        name, decode = operation.name, decoder_for(operation.result)
        polls = [self._result(name, part, id_, decode) for part, id_ in zip(parts, ids, strict=True)]
        if len(polls) == 1:
            return encoded.merge([await polls[0]])
        outcomes = await asyncio.gather(*polls, return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failures:
            if not isinstance(failure, OperationError):
                raise failure
        for failure in failures:
            if isinstance(failure, OperationError):
                await mark_failed(failure, name, encoded, parts, outcomes)
                self._remember(failure, parts)
                raise failure
        return encoded.merge([outcome for outcome in outcomes if not isinstance(outcome, BaseException)])

    async def _result(self, name: str, part: Part, operation_id: str, decode: Decode[T]) -> T:
        """Wait for one part."""
        return await self._recording.result(part, name, partial(self._poller.result, name, operation_id), decode)

    def _remember(self, error: LoopsError, parts: Sequence[Part]) -> None:
        """Let the same call repeat an unfinished operation, unless another one was sent meanwhile."""
        if self._turns.latest == parts[0].key:
            self._turns.unfinished = error.unfinished

    async def _accepted(self, name: str, part: Part) -> str:
        """Return the operation's id of one part, which is sent unless it was accepted before."""
        if part.operation_id is not None:
            self._turns.sent += 1
            return part.operation_id
        operation_id = await self._send(name, part)
        self._recording.accepted(part)
        return operation_id

    async def _send(self, name: str, part: Part) -> str:
        """Send one part until it is accepted, and return its operation's id."""
        seq_id = self._turns.sent + 1
        request = self._endpoint.request(
            "POST",
            f"/{name}",
            f"submit {name} of run {self._endpoint.run_id}",
            body=part.body(seq_id),
            # The key makes a retry safe, also after a lost answer.
            headers={**self._endpoint.headers, protocol.IDEMPOTENCY_KEY: part.key},
        )

        async def ask() -> str:
            try:
                with wait.hearing():
                    answer = await self._transport.send(request)
                    if answer.is_success:
                        return accepted_id(self._transport, request, answer)
                    raise _recognize_shutdown(self._transport.errors.of_answer(request, answer))
            except LoopsError as error:
                part.may_be_accepted = part.may_be_accepted or may_have_acted(error)
                raise

        self._turns.sent = seq_id
        try:
            with self._transport.waits.on(f"run {self._endpoint.run_id} to accept {name}") as wait:
                part.operation_id = await retry(
                    ask, OPERATION, what=f"{name} was not accepted", budget=self._transport.retry_budget
                )
        except LoopsError:
            if not part.may_be_accepted:
                self._turns.sent -= 1
            raise
        return part.operation_id


class _Submission:
    """The state of one operation until it is submitted."""

    def __init__(self, operation: str, turn: Turn, entries: Sequence[Entry]) -> None:
        self.operation = operation
        self.turn = turn
        self._entries = entries
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
        for entry in self._entries:
            if entry.goal != "outcome":  # otherwise its future ends it
                entry.end(asyncio.CancelledError() if task.cancelled() else task.exception())
        if self._is_abandoned and not task.cancelled() and (error := task.exception()):
            log.warning("%s failed after its caller was cancelled: %s", self.operation, without_quote(error))


def _counts_of(encoded: Encoded[Any]) -> Counts:
    return Counts(operations=1, datums=sum(encoded.datums), trained_tokens=encoded.trained_tokens)


def _recognize_shutdown(error: LoopsError) -> LoopsError:
    """Return `error`, or a `ServerShutdownError` for the trainer's own 503: it is shutting down, so no retry succeeds.

    A 503 with a ``Retry-After`` asks to come back, and that of a gateway says nothing of the trainer.
    """
    if not isinstance(error, ApiError) or error.status != 503:
        return error
    if error.from_gateway or error.retry_after is not None:
        return error
    shutdown = ServerShutdownError(
        f"{error} The trainer is shutting down; create a new run from the last saved state.",
        status=error.status,
        code=error.code,
        reason=error.reason,
        request_id=error.request_id,
        retry_after=error.retry_after,
        body=error.body,
    )
    shutdown.retryable = False
    return shutdown

"""Collecting the results of operations by long polls, the same at a trainer and at a serverless sampler."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Final, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from .. import protocol
from .._http import tape
from .._http.decoding import UnreadableError
from .._http.endpoint import Endpoint
from .._http.messages import MOST_RESULT_BYTES, Answer, Request
from .._http.retry import POLL, Failure, failure_of, retry
from .._http.transport import Transport
from .._work.waits import Wait
from ..errors import ApiError, ConnectError, LoopsError, ProtocolError, RemoteOpError, UnknownRequestError

T = TypeVar("T")

Decode: TypeAlias = Callable[[msgspec.Raw], Awaitable[T]]

log = logging.getLogger("loops_async.operations")

POLL_SECONDS: Final = protocol.POLL_HOLD_SECONDS + 5
SHORTEST_HOLD: Final = 0.05
LONGEST_STATUS: Final = 50
CUT_HOLD: Final = 5.0
"""A poll that was held this long and is then cut ran into the patience of a gateway: the operation is not done yet."""


class _Poll(Struct):
    status: str = ""
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str | None = None
    error_class: str | None = None


class Poller:
    """Polls one endpoint for the results of its operations.

    Args:
        endpoint: the trainer, or the serverless sampler.
        transport: the connection pool.
        explain: maps an error to the one to raise, unless it says that the operation is unknown.
        lost: advice to the user, for the error that the endpoint does not know an operation.
        at_once: the largest number of concurrent polls; None for no limit.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        transport: Transport,
        *,
        explain: Callable[[LoopsError], LoopsError],
        lost: str,
        at_once: int | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._transport = transport
        self._explain = explain
        self._lost = lost
        self._gate: AbstractAsyncContextManager[None] = nullcontext() if at_once is None else asyncio.Semaphore(at_once)

    async def result(self, operation: str, operation_id: str, decode: Decode[T]) -> T:
        """Wait for an operation without a time limit, and return its decoded result.

        Raises:
            RemoteOpError: the operation failed.
            UnknownRequestError: the endpoint does not know the operation, or no longer does.
            LoopsError: anything else, which says nothing of the operation: the endpoint could not be reached for two
                minutes, or refused the poll.
        """
        run_id = self._endpoint.run_id
        request = self._endpoint.request(
            "GET",
            f"/operations/{protocol.segment(operation_id)}",
            f"wait for {operation}" + (f" of run {run_id}" if run_id else ""),
            timeout=POLL_SECONDS,
            most_bytes=MOST_RESULT_BYTES,
        )
        # Operations finish in order: the oldest hold the gate until they are done.
        async with self._turn(operation, operation_id) as wait:
            unknown: str | None = None
            while True:
                polled = await self._poll(request, operation, operation_id, wait)
                if polled is None:
                    continue
                answer, poll = polled
                if poll.status == "error":
                    raise RemoteOpError(
                        self._transport.errors.clean(poll.error or "the operation failed without a message"),
                        operation_id=operation_id,
                        operation=operation,
                        run_id=self._endpoint.run_id,
                        error_class=self._transport.errors.clean(poll.error_class) if poll.error_class else None,
                    )
                if poll.status == "done":
                    return await self._decode(request, answer, poll.result, decode)
                status = self._transport.errors.clean(poll.status, LONGEST_STATUS)
                if status != unknown:
                    unknown = status
                    wait.heard(f"the unknown status {status!r}")
                    log.warning("%s: answered with the unknown status %r; polling again", operation, status)
                await tape.pause(1.0)

    @asynccontextmanager
    async def _turn(self, operation: str, operation_id: str) -> AsyncGenerator[Wait]:
        run = f" of run {self._endpoint.run_id}" if self._endpoint.run_id else ""
        with self._transport.waits.on(f"{operation} {operation_id}{run}", queue=self._endpoint.url) as wait:
            async with self._gate:
                yield wait

    async def _poll(
        self, request: Request, operation: str, operation_id: str, wait: Wait
    ) -> tuple[Answer, _Poll] | None:
        """Poll an operation once; None if it is not done yet."""

        async def ask() -> tuple[Answer, _Poll] | None:
            started = time.monotonic()
            try:
                with wait.hearing():
                    answer = await self._transport.send(request)
                    if answer.status == 200:
                        return answer, self._transport.decode(request, answer, _Poll)
                    if answer.status != 408:
                        raise self._error(request, answer, operation, operation_id)
                    wait.heard("it is not done yet")
            except (ApiError, ConnectError) as error:
                if time.monotonic() - started < CUT_HOLD or failure_of(error) not in (Failure.LOST, Failure.CUT):
                    raise
            if time.monotonic() - started < SHORTEST_HOLD:
                await tape.pause(SHORTEST_HOLD)  # limits the rate of polls that the service does not hold
            return None

        return await retry(ask, POLL, what=f"could not {request.what}", budget=self._transport.retry_budget)

    def _error(self, request: Request, answer: Answer, operation: str, operation_id: str) -> LoopsError:
        error = self._transport.errors.of_answer(request, answer)
        if isinstance(error, ProtocolError):
            error.status = None  # the page of a gateway, which knows nothing of operations: to be polled again
        elif isinstance(error, ApiError) and answer.status in (404, 410) and not error.from_gateway:
            return UnknownRequestError(
                f"{error} {self._lost}", operation_id=operation_id, operation=operation, run_id=self._endpoint.run_id
            )
        return self._explain(error)

    async def _decode(self, request: Request, answer: Answer, raw: msgspec.Raw, decode: Decode[T]) -> T:
        try:
            return await decode(raw)
        except UnreadableError as problem:
            raise self._transport.errors.of_protocol(request, answer, str(problem)) from problem.with_traceback(None)


def accepted_id(transport: Transport, request: Request, answer: Answer) -> str:
    """Return the id of the operation that an answer accepts."""
    accepted = transport.decode(request, answer, protocol.Accepted)
    if accepted.schema_version != protocol.SCHEMA_VERSION:
        raise transport.errors.of_protocol(request, answer, "expected schema_version 1")
    return accepted.operation_id

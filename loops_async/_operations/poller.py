"""Collecting what operations came to: the same long poll at a trainer and at a queued sampler."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from .. import protocol
from .._http.retry import POLL, retrying
from .._http.transport import Answer, Request, Transport
from ..errors import ApiError, LoopsError, RemoteOpError, UnknownRequestError

T = TypeVar("T")

Decode: TypeAlias = Callable[[msgspec.Raw], Awaitable[T]]

log = logging.getLogger("loops_async")

POLL_SECONDS: Final = protocol.POLL_HOLD_SECONDS + 5
SHORTEST_HOLD: Final = 0.05


class _Poll(Struct):
    status: str = ""
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str | None = None
    error_class: str | None = None


class Poller:
    """Asks one place for its operations.

    Args:
        transport: the connections.
        root: the URL to which ``/operations/{id}`` is appended.
        headers: what each request carries besides.
        authorize: whether the key is sent.
        run_id: what errors say.
        explain: makes the error to raise of a refusal that is not 404 or 410.
        lost: what to do when the place does not know an operation, for people.
        at_once: the most operations that are asked for at a time; None for any number.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        root: str,
        headers: Mapping[str, str],
        authorize: bool,
        run_id: str | None,
        explain: Callable[[ApiError], LoopsError],
        lost: str,
        at_once: int | None = None,
    ) -> None:
        self._transport = transport
        self._root = root
        self._headers = headers
        self._authorize = authorize
        self._run_id = run_id
        self._explain = explain
        self._lost = lost
        self._gate: AbstractAsyncContextManager[None] = nullcontext() if at_once is None else asyncio.Semaphore(at_once)

    async def result(self, operation: str, operation_id: str, decode: Decode[T]) -> T:
        """Wait for an operation, however long it takes, and return its decoded result.

        Raises:
            RemoteOpError: it failed.
            UnknownRequestError: it is not known (any more).
            TransportError: nobody could be reached for two minutes.
        """
        request = Request(
            method="GET",
            url=f"{self._root}/operations/{protocol.segment(operation_id)}",
            what=f"wait for {operation}" + (f" of run {self._run_id}" if self._run_id else ""),
            headers=self._headers,
            timeout=POLL_SECONDS,
            authorize=self._authorize,
        )
        # Operations finish in order: the gate is for the oldest, and held until they are done.
        async with self._gate:
            while True:
                answer = await self._poll(request, operation, operation_id)
                if answer is None:
                    continue
                poll = self._transport.decoded(request, answer, _Poll)
                if poll.status == "error":
                    raise RemoteOpError(
                        self._transport.clean(poll.error or "the operation failed without a message"),
                        operation_id=operation_id,
                        operation=operation,
                        run_id=self._run_id,
                        error_class=poll.error_class,
                    )
                if poll.status == "done":
                    return await self._decoded(request, answer, poll.result, decode)
                log.warning("%s: a status %r is answered that is not known; asking again", operation, poll.status)
                await asyncio.sleep(1.0)

    async def _poll(self, request: Request, operation: str, operation_id: str) -> Answer | None:
        """Ask once for an operation; None while it is not done."""
        started = time.monotonic()

        async def ask() -> Answer:
            answer = await self._transport.send(request)
            if answer.status == 200 or answer.status == 408:
                return answer
            raise self._error(request, answer, operation, operation_id)

        answer = await retrying(ask, POLL, what=f"could not {request.what}")
        if answer.status == 200:
            return answer
        if time.monotonic() - started < SHORTEST_HOLD:
            await asyncio.sleep(SHORTEST_HOLD)  # a service that does not hold polls must not be hammered
        return None

    def _error(self, request: Request, answer: Answer, operation: str, operation_id: str) -> LoopsError:
        error = self._transport.error(request, answer)
        if answer.status in (404, 410):
            return UnknownRequestError(
                f"{error} {self._lost}", operation_id=operation_id, operation=operation, run_id=self._run_id
            )
        return self._explain(error) if isinstance(error, ApiError) else error

    async def _decoded(self, request: Request, answer: Answer, raw: msgspec.Raw, decode: Decode[T]) -> T:
        try:
            return await decode(raw)
        except msgspec.MsgspecError as problem:
            raise self._transport.not_loops(request, answer, str(problem)) from problem


def accepted_id(transport: Transport, request: Request, answer: Answer) -> str:
    """Return the id under which an operation was accepted."""
    accepted = transport.decoded(request, answer, protocol.Accepted)
    if not accepted.operation_id or accepted.schema_version != protocol.SCHEMA_VERSION:
        raise transport.not_loops(request, answer, "expected an operation_id and schema_version 1")
    return accepted.operation_id

"""The queue before a serverless sampler: a sample is handed in, waited for, and withdrawn when nobody waits any more.

Source: data-plane reference 3.7.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Final

import anyio
import msgspec

from .. import protocol
from .._http.retry import Patience, retrying
from .._http.transport import Answer, Request, Transport
from .._operations.poller import Poller, accepted_id
from ..errors import ApiError, LoopsError, SampleTimeoutError, TransportError

log = logging.getLogger("loops_async")

WITHDRAW_SECONDS: Final = 5.0
HAND_IN_SECONDS: Final = 60.0
LOST: Final = "The sampler's queue does not know this sample (any more); sample again."


class SampleQueue:
    """Hands samples in at one queue.

    Args:
        transport: the connections.
        root: the sampler's URL.
        headers: what names the run, sampler or checkpoint; every request carries it, polls as well.
        run_id: what errors say.
    """

    def __init__(self, transport: Transport, *, root: str, headers: Mapping[str, str], run_id: str | None) -> None:
        self._transport = transport
        self._root = root
        self._headers = headers
        self._poller = Poller(
            transport, root=root, headers=headers, authorize=True, run_id=run_id, explain=_explained, lost=LOST
        )

    async def answer(self, request: Request, *, key: str, submit_seconds: float) -> bytes | msgspec.Raw:
        """Hand a sample in and return the body of its completions.

        The idempotency `key` in its headers makes it harmless to hand in again after an answer that was lost.
        The request's `timeout` bounds the wait from acceptance, `submit_seconds` the attempts to be accepted.

        Raises:
            SampleTimeoutError: there is no completion within `timeout`; the sample was withdrawn.
            RemoteOpError: the sampler failed.
        """
        timeout, handing_in = request.timeout, msgspec.structs.replace(request, timeout=HAND_IN_SECONDS)
        operation_id = key  # what a service calls the operation unless it says otherwise
        try:
            answer = await retrying(
                lambda: self._hand_in(handing_in), Patience(seconds=submit_seconds), what="the sample was not accepted"
            )
            if answer.status != 202:
                return answer.body  # generated at once, so it is paid for
            operation_id = accepted_id(self._transport, request, answer)
            with anyio.move_on_after(timeout):
                return await self._poller.result("sample", operation_id, _as_it_is)
            raise SampleTimeoutError(
                f"{request.what} ({request.url}): no completion within {timeout} s of being queued as {operation_id}; "
                "it was withdrawn. Ask for fewer tokens or samples, or raise `timeout`.",
                timeout=timeout,
            )
        except (asyncio.CancelledError, TransportError):
            await self._withdraw(operation_id)
            raise

    async def _hand_in(self, request: Request) -> Answer:
        try:
            return await self._transport.ask(request)
        except ApiError as error:
            raise _explained(error)  # noqa: B904 - it is the same error

    async def _withdraw(self, operation_id: str) -> None:
        """Give the place in the queue to others if that is still possible."""
        request = Request(
            method="POST",
            url=f"{self._root}/operations/{protocol.segment(operation_id)}/cancel",
            what="withdraw a sample",
            headers=self._headers,
        )
        with anyio.move_on_after(WITHDRAW_SECONDS, shield=True):
            try:
                await self._transport.ask(request)
            except LoopsError as error:
                log.debug("sample %s was not withdrawn: %s", operation_id, error)


async def _as_it_is(raw: msgspec.Raw) -> msgspec.Raw:
    return raw


def _explained(error: ApiError) -> ApiError:
    """A full queue says when to come back; without that, a 503 is final."""
    if error.status == 503 and error.retry_after is None:
        error.retryable = False
    return error

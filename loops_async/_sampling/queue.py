"""The queue of a serverless sampler: a sample is submitted, waited for, and cancelled when its caller stops waiting.

Source: data-plane reference 3.7.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Final

import anyio
import msgspec

from .. import protocol
from .._http.endpoint import Endpoint
from .._http.messages import Answer, Request
from .._http.retry import QUEUED_SAMPLE, failure_of, may_have_acted, retry
from .._http.transport import Transport
from .._operations.poller import Poller, accepted_id
from .._waiting import TimeLimit
from .._work.registry import CURRENT
from .._work.waits import Wait
from ..errors import ApiError, LoopsError, LostAnswerError, SampleTimeoutError
from .limiter import report_rejection

log = logging.getLogger("loops_async.sampling")

CANCEL_SECONDS: Final = 5.0
SUBMIT_SECONDS: Final = 60.0
LOST: Final = "The sampler's queue never had this sample or has deleted it; sample again."


class SampleQueue:
    """Submits samples to the queue at `endpoint`. Every request, also a poll, carries the endpoint's headers."""

    def __init__(self, endpoint: Endpoint, transport: Transport) -> None:
        self._endpoint = endpoint
        self._transport = transport
        self._poller = Poller(endpoint, transport, explain=_explained, lost=LOST)

    async def answer(self, request: Request, *, key: str) -> tuple[bytes | msgspec.Raw, str | None]:
        """Submit a sample; return the body of its completions, and the id of the request that submitted it.

        The idempotency `key` in its headers makes it safe to submit again after a lost answer. The
        request's `timeout` limits all of it, the endpoint's `ready_timeout` the attempts to submit.

        Raises:
            SampleTimeoutError: there is no completion within `timeout`; the sample was cancelled.
            LostAnswerError: the queue did not answer for more than a minute, and may have the sample.
            RemoteOpError: the sampler failed.
        """
        timeout, submission = request.timeout, msgspec.structs.replace(request, timeout=SUBMIT_SECONDS)
        operation_id = key  # the operation's id, unless the service chooses another
        may_be_queued, entry = False, CURRENT.get()

        async def submit(wait: Wait) -> tuple[Answer, str | None]:
            nonlocal may_be_queued
            try:
                return await self._submit(submission, wait)
            except LoopsError as error:
                may_be_queued = may_be_queued or may_have_acted(error)
                report_rejection(error)
                raise

        try:
            with TimeLimit(timeout):
                with self._transport.waits.on(f"the queue to accept sample {key}", queue="samples to submit") as wait:
                    answer, accepted = await retry(
                        partial(submit, wait),
                        QUEUED_SAMPLE.waiting(self._endpoint.ready_timeout),
                        what="the sample was not accepted",
                        budget=self._transport.retry_budget,
                    )
                request_id = self._transport.errors.request_id(answer)
                if accepted is None:
                    return answer.body, request_id  # completed without waiting in the queue
                operation_id, may_be_queued = accepted, True
                entry.accepted(accepted)
                return await self._poller.result("sample", operation_id, _raw), request_id
            raise SampleTimeoutError(
                f"{request.what} ({request.url}): no completion within {timeout} s; it was cancelled (operation "
                f"{operation_id}). Request fewer tokens or samples, or increase `timeout`.",
                timeout=timeout,
            )
        except (asyncio.CancelledError, SampleTimeoutError):
            await self._cancel(operation_id)
            raise
        except LoopsError as error:
            if failure_of(error) is None or not may_be_queued:
                raise
            await self._cancel(operation_id)
            raise LostAnswerError(
                f"{error} The sample may have been generated and paid for; it was cancelled in case it was not. Sample "
                "again if you accept to pay for it twice."
            ) from error

    async def _submit(self, request: Request, wait: Wait) -> tuple[Answer, str | None]:
        """Submit a sample; return the answer, and the id under which it is queued, None if the answer is complete."""
        with wait.hearing():
            answer = await self._transport.send(request)
            if answer.status == 202:
                return answer, accepted_id(self._transport, request, answer)
            if answer.is_success:
                return answer, None
            raise _explained(self._transport.errors.of_answer(request, answer))

    async def _cancel(self, operation_id: str) -> None:
        """Free the place in the queue if that is still possible."""
        route = f"/operations/{protocol.segment(operation_id)}/cancel"
        # Not with the time limit of samples, which may be shorter than the way to the service.
        request = self._endpoint.request("POST", route, "cancel a sample", timeout=CANCEL_SECONDS)
        with anyio.move_on_after(CANCEL_SECONDS, shield=True):
            try:
                await self._transport.ask(request)
            except LoopsError as error:
                log.debug("sample %s was not cancelled: %s", operation_id, error)


async def _raw(raw: msgspec.Raw) -> msgspec.Raw:
    return raw


def _explained(error: LoopsError) -> LoopsError:
    """Mark a 503 as final unless it has a ``Retry-After``, which a full queue sends."""
    if isinstance(error, ApiError) and error.status == 503 and error.retry_after is None and not error.from_gateway:
        error.retryable = False
    return error

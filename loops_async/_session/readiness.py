"""Waiting until a trainer or a sampler is ready (control-plane reference 6)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias
from urllib.parse import quote

from .. import protocol
from .._http.endpoint import Endpoint
from .._http.messages import Answer, Request
from .._http.retry import until
from .._http.transport import Transport
from .._tasks import SingleFlight, TaskOwner
from .._waiting import TimeLimit
from .._work.registry import CURRENT, Entry
from ..control_plane import ControlPlane
from ..errors import (
    ApiError,
    AuthenticationError,
    ClosedError,
    ConnectError,
    LoopsError,
    NotReadyError,
    PermissionDeniedError,
    ProtocolError,
    ProvisioningError,
    RequestTimeoutError,
    SamplerTerminatedError,
    TransportError,
)
from ..types import BasetenDeployment, LocalDeployment

log = logging.getLogger("loops_async.provisioning")

HEALTH_SECONDS: Final = 30.0
VERSION_REQUEST_SECONDS: Final = 10.0
VERSION_PAUSE_SECONDS: Final = 2.0
LONGEST_LOG_EXCERPT: Final = 500

OnStatus: TypeAlias = Callable[[str | None], object]
"""Is called with each state of a deployment; None if it is unknown."""


def _ignore(_: str | None) -> None: ...


def health_request(trainer: Endpoint) -> Request:
    """Return the health check of a trainer, whose answer is 200 once the trainer is ready."""
    return trainer.request(
        "GET",
        f"/health?base_model={quote(trainer.base_model, safe='')}",
        f"check the health of run {trainer.run_id}",
        timeout=HEALTH_SECONDS,
    )


async def wait_for_trainer(
    trainer: Endpoint, transport: Transport, control_plane: ControlPlane, *, on_status: OnStatus = _ignore
) -> None:
    """Wait until a trainer reports that it is healthy, for up to its `ready_timeout`.

    Raises:
        ProvisioningError: its deployment failed, was stopped or was preempted.
        NotReadyError: it was not ready in time.
        ApiError: waiting would not help: the key was rejected, or a gateway reports that the trainer does not exist.
    """
    request = health_request(trainer)
    # A local trainer must already be running: if it is not, raise immediately.
    is_local = isinstance(trainer.deployment, LocalDeployment)

    async def probe() -> str | None:
        status = await _trainer_status(trainer, control_plane, transport)
        on_status(status)
        try:
            answer = await _ask(transport, request, must_run=is_local)
        except LoopsError:
            # It may have failed since its state was read, and that error says more than this one.
            await _trainer_status(trainer, control_plane, transport)
            raise
        if isinstance(answer, Answer):
            return None
        return f"{status}, {answer}" if status else str(answer)

    name = f"the trainer of run {trainer.run_id} ({trainer.base_model})"
    last = await _poll(probe, name, transport, seconds=trainer.ready_timeout)
    if last is not None:
        raise NotReadyError(
            f"{name} was not ready after {trainer.ready_timeout:g} s; its last answer was: {last}. Wait longer with a "
            "larger ready_timeout, or check its deployment."
        )


async def wait_for_version(sampler: Endpoint, version: int, transport: Transport, *, seconds: float) -> None:
    """Wait until a sampler that is up serves at least version `version`, for up to `seconds`.

    Raises:
        NotReadyError: it still serves an older one.
        ApiError: waiting would not help, e.g. the key was rejected.
    """
    what = f"wait for version {version}"
    request = sampler.request("GET", "/trainers_policy_version", what, timeout=VERSION_REQUEST_SECONDS)

    async def probe() -> str | None:
        answer = await _ask(transport, request)
        if not isinstance(answer, Answer):
            # Without this route, the minimum version in each request is the only check, and it is enough.
            return None if getattr(answer, "status", None) in protocol.NO_SUCH_ROUTE else str(answer)
        try:
            served = transport.decode(request, answer, protocol.PolicyVersion).policy_version
        except ProtocolError as error:
            return str(error)
        return None if served is not None and served >= version else f"it serves version {served}"

    name = f"the sampler at {sampler.url} to serve version {version}"
    last = await _poll(probe, name, transport, seconds=seconds, longest_pause=VERSION_PAUSE_SECONDS)
    if last is not None:
        raise NotReadyError(
            f"the sampler at {sampler.url} does not serve version {version} {seconds:g} s after it was published; its "
            f"last answer was: {last}. Publish again, or check the sampler's logs."
        )


async def _poll(
    probe: Callable[[], Awaitable[str | None]],
    what: str,
    transport: Transport,
    *,
    seconds: float | None,
    longest_pause: float = 10.0,
) -> str | None:
    """Call `probe` until it returns None, which means ready, and return that; else its last answer after `seconds`."""
    with transport.waits.on(what) as wait, transport.work.within("readiness", what) as entry:
        entry.turn_to("ready")

        async def is_ready() -> bool | None:
            answer = await probe()
            if answer is None:
                return True
            wait.heard(answer)
            entry.waiting_for = "ready"
            return None

        if await until(is_ready, seconds=seconds, longest_pause=longest_pause):
            return None
        return wait.answer or "none"


async def _ask(transport: Transport, request: Request, *, must_run: bool = False) -> Answer | LoopsError:
    """Return the answer, or an error that may be temporary; raise an error that waiting cannot change.

    With `must_run`, these include that nothing answers there, or a service that is not Loops.
    """
    try:
        answer = await transport.send(request)
    except TransportError as failure:
        if _is_final_failure(failure) or (must_run and not isinstance(failure, RequestTimeoutError)):
            raise
        return failure
    if answer.is_success:
        return answer
    error = transport.errors.of_answer(request, answer)
    if answer.is_final or _is_final_failure(error) or (must_run and isinstance(error, ProtocolError)):
        raise error
    return error


def _is_final_failure(error: LoopsError) -> bool:
    """Whether waiting cannot help: the key was rejected, or the server's certificate."""
    if isinstance(error, ConnectError):
        return not error.retryable
    return isinstance(error, AuthenticationError | PermissionDeniedError)


async def _trainer_status(trainer: Endpoint, control_plane: ControlPlane, transport: Transport) -> str | None:
    """Return the state of a trainer's deployment, None if it is unknown; raise if it cannot become ready."""
    match trainer.deployment:
        case BasetenDeployment(deployment_id=str() as deployment_id):
            pass
        case _:
            return None
    try:
        status = (await control_plane.get_deployment(deployment_id)).status.name
    except (ApiError, TransportError) as error:
        log.debug("the state of deployment %s is unknown: %s", deployment_id, error)
        return None
    if status in protocol.TRAINER_TERMINAL:
        raise ProvisioningError(
            f"the trainer of run {trainer.run_id} cannot become ready: deployment {deployment_id} is {status}"
            f"{await _last_error(deployment_id, control_plane, transport)}. Check the deployment's logs "
            f"(`loops deployments logs {deployment_id}`), then create a new run.",
            deployment_id=deployment_id,
            status=status,
        )
    return status


async def _last_error(deployment_id: str, control_plane: ControlPlane, transport: Transport) -> str:
    """Return the last error in a deployment's log, in parentheses; empty if there is none or logs are unavailable."""
    try:
        lines = await control_plane.get_deployment_logs(deployment_id, direction="desc", limit=1, min_level="ERROR")
    except LoopsError as error:
        log.debug("the logs of deployment %s are unavailable: %s", deployment_id, error)
        return ""
    return f" ({transport.errors.clean(lines[0].message)[:LONGEST_LOG_EXCERPT].strip()})" if lines else ""


class SamplerGate:
    """Holds samples until the sampler's deployment is ACTIVE; shared by all clients of the deployment."""

    def __init__(
        self,
        url: str,
        model_id: str,
        deployment_id: str,
        *,
        transport: Transport,
        control_plane: ControlPlane,
        tasks: TaskOwner,
    ) -> None:
        self._url = url
        self._model_id = model_id
        self._deployment_id = deployment_id
        self._transport = transport
        self._control_plane = control_plane
        self._opening: SingleFlight[str, None] = SingleFlight(tasks)
        self._is_woken = False
        self._listeners: list[OnStatus] = []
        self._last_answer = "none"
        self._entry: Entry | None = None
        """The wait of the task that polls for all callers."""
        self.is_open: bool = False

    async def wait(self, ready_timeout: float | None, on_status: OnStatus = _ignore) -> None:
        """Wait until samples may be sent; wake a sampler that was scaled to zero, once.

        Raises:
            SamplerTerminatedError: the deployment cannot become ready.
            NotReadyError: it was not ready after `ready_timeout` seconds.
        """
        if self.is_open:
            return
        CURRENT.get().waiting_for = "ready"
        # One task polls for all callers, until the last of them stops waiting.
        opening = self._opening.start(self._deployment_id, self._open)
        self._listeners.append(on_status)
        try:
            with TimeLimit(ready_timeout):
                await asyncio.wait([opening])
        finally:
            self._listeners.remove(on_status)
            if not self._listeners and not opening.done():
                self._opening.discard(self._deployment_id)
                opening.cancel()
        if not opening.done():
            raise NotReadyError(
                f"{self._name} was not ready after {ready_timeout:g} s; the last answer about it was: "
                f"{self._last_answer}. Wait longer with a larger ready_timeout, or check its deployment."
            )
        if opening.cancelled():
            raise ClosedError(f"the client was closed while it waited for sampler {self._deployment_id}")
        if error := opening.exception():
            raise error.with_traceback(None)

    async def recheck(self) -> None:
        """Check the deployment again, after an answer that suggests that it is not ACTIVE, and set `is_open`."""
        self.is_open = await self._probe() is None
        if not self.is_open:
            self._opening.discard(self._deployment_id)

    async def _open(self) -> None:
        self._is_woken = False
        with self._transport.work.begin("readiness", self._name, id=self._deployment_id) as self._entry:
            await _poll(self._probe, self._name, self._transport, seconds=None)
        self.is_open = True

    async def _probe(self) -> str | None:
        answer = await self._ask()
        self._last_answer = answer or "ready"
        return answer

    @property
    def _name(self) -> str:
        return f"the sampler (model {self._model_id}, deployment {self._deployment_id})"

    async def _ask(self) -> str | None:
        """Return None when samples may be sent, else the answer."""
        try:
            status = await self._control_plane.get_model_deployment_status(self._model_id, self._deployment_id)
        except (ApiError, TransportError) as error:
            if _does_not_report(error):
                return None
            if isinstance(error, ConnectError) and not error.retryable:
                raise
            return str(error)
        if self._entry is not None:
            self._entry.staged(str(status))
        for notify in self._listeners:
            notify(status)
        if status in protocol.SAMPLER_TERMINAL:
            raise SamplerTerminatedError(
                f"the sampler cannot become ready: deployment {self._deployment_id} of model {self._model_id} is "
                f"{status}. Check its logs, then create a new sampler.",
                deployment_id=self._deployment_id,
                status=status,
            )
        if status == protocol.SCALED_TO_ZERO and not self._is_woken:
            self._is_woken = True
            await self._wake()
        return None if status == protocol.SAMPLER_READY else str(status)

    async def _wake(self) -> None:
        url = f"{self._url.removesuffix('/sync')}/wake"
        request = Request(method="POST", url=url, what=f"wake sampler {self._deployment_id}", timeout=30.0)
        try:
            await self._transport.ask(request)
        except LoopsError as error:
            log.warning("%s", error)


def _does_not_report(error: ApiError | TransportError) -> bool:
    """Whether a service refuses to report the state of a sampler, so that samples must not wait for it."""
    status = getattr(error, "status", None)
    return status is not None and 400 <= status < 500 and status not in (408, 429)

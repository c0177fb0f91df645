"""Waiting until a trainer or a sampler is ready (control-plane reference 6)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, TypeAlias
from urllib.parse import quote

from .. import protocol
from .._http.endpoint import Endpoint
from .._http.retry import until
from .._http.transport import Request, Transport, is_final
from .._tasks import SingleFlight, TaskOwner
from ..control_plane import ControlPlane
from ..errors import (
    ApiError,
    AuthenticationError,
    ClosedError,
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

log = logging.getLogger("loops_async")

HEALTH_SECONDS: Final = 30.0
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
    last = "nothing yet"

    async def probe() -> bool | None:
        nonlocal last
        on_status(await _trainer_status(trainer, control_plane, transport))
        try:
            answer = await transport.send(request)
        except TransportError as error:
            if is_local and not isinstance(error, RequestTimeoutError):
                raise
            last = str(error)
            return None
        if answer.is_success:
            return True
        failure = transport.error(request, answer)
        if is_final(answer):
            # It may have failed since its state was read, and that error says more than this one.
            await _trainer_status(trainer, control_plane, transport)
            raise failure
        if isinstance(failure, AuthenticationError | PermissionDeniedError):
            raise failure
        if is_local and isinstance(failure, ProtocolError):
            raise failure
        last = str(failure)
        return None

    if await until(probe, seconds=trainer.ready_timeout) is None:
        raise NotReadyError(
            f"the trainer of run {trainer.run_id} ({trainer.base_model}) was not ready after "
            f"{trainer.ready_timeout:g} s; its last answer was: {last}. Wait longer with a larger ready_timeout, or "
            "check its deployment."
        )


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
    return f" ({transport.clean(lines[0].message)[:LONGEST_LOG_EXCERPT].strip()})" if lines else ""


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
        self.is_open = False

    async def wait(self, ready_timeout: float | None, on_status: OnStatus = _ignore) -> None:
        """Wait until samples may be sent; wake a sampler that was scaled to zero, once.

        Raises:
            SamplerTerminatedError: the deployment cannot become ready.
            NotReadyError: it was not ready after `ready_timeout` seconds.
        """
        if self.is_open:
            return
        # One task polls for all callers; a caller that stops waiting does not stop it.
        opening = self._opening.start(self._deployment_id, self._open)
        self._listeners.append(on_status)
        try:
            await asyncio.wait([opening], timeout=ready_timeout)
        finally:
            self._listeners.remove(on_status)
        if not opening.done():
            raise NotReadyError(
                f"the sampler (model {self._model_id}, deployment {self._deployment_id}) was not ready after "
                f"{ready_timeout:g} s; wait longer with a larger ready_timeout"
            )
        if opening.cancelled():
            raise ClosedError(f"the client was closed while it waited for sampler {self._deployment_id}")
        if error := opening.exception():
            raise error.with_traceback(None)

    async def recheck(self) -> None:
        """Check the deployment again, after an answer that suggests that it is not ACTIVE, and set `is_open`."""
        self.is_open = await self._is_active() is True
        if not self.is_open:
            self._opening.discard(self._deployment_id)

    async def _open(self) -> None:
        self._is_woken = False
        self.is_open = await until(self._is_active, seconds=None) is True

    async def _is_active(self) -> bool | None:
        try:
            status = await self._control_plane.get_model_deployment_status(self._model_id, self._deployment_id)
        except ApiError as error:
            # If the service does not report the state, samples must not wait for it; they are retried anyway.
            return None if error.status >= 500 else True
        except TransportError as error:
            log.debug("the state of sampler %s is unknown: %s", self._deployment_id, error)
            return None
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
        return True if status == protocol.SAMPLER_READY else None

    async def _wake(self) -> None:
        url = f"{self._url.removesuffix('/sync')}/wake"
        request = Request(method="POST", url=url, what=f"wake sampler {self._deployment_id}", timeout=30.0)
        try:
            await self._transport.ask(request)
        except LoopsError as error:
            log.warning("%s", error)

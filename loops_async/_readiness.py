"""Waiting until a trainer or a sampler is ready (control-plane reference 6)."""

from __future__ import annotations

import asyncio
import logging
from typing import Final
from urllib.parse import quote

from . import protocol
from ._retry import until
from ._runtime import Runtime
from ._transport import Request
from .errors import (
    ApiError,
    AuthenticationError,
    ClosedError,
    ConnectError,
    LoopsError,
    NotReadyError,
    PermissionDeniedError,
    ProvisioningError,
    SamplerTerminatedError,
    TransportError,
)
from .types import Run

log = logging.getLogger("loops_async")

HEALTH_SECONDS: Final = 30.0


def health_request(run: Run, *, authorize: bool) -> Request:
    """Make the request whose 200 means that the run's trainer is ready."""
    return Request(
        method="GET",
        url=f"{run.base_url}/health?base_model={quote(run.base_model, safe='')}",
        what=f"check the health of run {run.id}",
        headers={protocol.RUN_ID: run.id},
        timeout=HEALTH_SECONDS,
        authorize=authorize,
    )


async def wait_for_trainer(runtime: Runtime, run: Run, *, ready_timeout: float, is_local: bool) -> None:
    """Wait until the trainer of `run` answers that it is healthy.

    Raises:
        ProvisioningError: its deployment failed, was stopped or was preempted.
        NotReadyError: it is not ready after `ready_timeout` seconds.
        AuthenticationError, PermissionDeniedError: waiting would not help.
    """
    request = health_request(run, authorize=not is_local)
    last: LoopsError | None = None

    async def probe() -> bool | None:
        nonlocal last
        if run.deployment_id is not None:
            await _refuse_terminal_trainer(runtime, run, run.deployment_id)
        try:
            await runtime.transport.ask(request)
        except (AuthenticationError, PermissionDeniedError):
            raise
        except LoopsError as error:
            if is_local and isinstance(error, ConnectError):
                raise
            last = error
            return None
        return True

    if await until(probe, seconds=ready_timeout) is None:
        raise NotReadyError(
            f"the trainer of run {run.id} ({run.base_model}) was not ready after {ready_timeout:g} s; its last answer "
            f"was: {last}. The run still exists: wait longer with a larger ready_timeout, or look at its deployment."
        )


async def _refuse_terminal_trainer(runtime: Runtime, run: Run, deployment_id: str) -> None:
    try:
        deployment = await runtime.control_plane.get_deployment(deployment_id)
    except (ApiError, TransportError) as error:
        log.debug("the state of deployment %s is not known: %s", deployment_id, error)
        return
    if deployment.status.name in protocol.TRAINER_TERMINAL:
        raise ProvisioningError(
            f"the trainer of run {run.id} will not come up: deployment {deployment_id} is {deployment.status.name}. "
            "Look at the deployment's logs, then create a new run.",
            deployment_id=deployment_id,
            status=deployment.status.name,
        )


class SamplerGate:
    """Lets samples through once a sampler's deployment is ACTIVE; shared by all clients of the deployment."""

    def __init__(self, runtime: Runtime, *, base_url: str, model_id: str, deployment_id: str) -> None:
        self._runtime = runtime
        self._base_url = base_url
        self._model_id = model_id
        self._deployment_id = deployment_id
        self._opening: asyncio.Task[bool | None] | None = None
        self._is_woken = False
        self.is_open = False

    async def wait(self, ready_timeout: float | None) -> None:
        """Return when samples may be sent; a sampler that was scaled to zero is woken once.

        Raises:
            SamplerTerminatedError: the deployment does not come up any more.
            NotReadyError: it is not ready after `ready_timeout` seconds.
        """
        if self.is_open:
            return
        if self._opening is None or self._opening.done():
            self._opening = self._runtime.tasks.start(self._open(), name=f"wait for sampler {self._deployment_id}")
        opening = self._opening
        # One task asks for everybody; whoever stops waiting does not stop it.
        await asyncio.wait([opening], timeout=ready_timeout)
        if not opening.done():
            raise NotReadyError(
                f"the sampler (model {self._model_id}, deployment {self._deployment_id}) was not ready after "
                f"{ready_timeout:g} s; wait longer with a larger ready_timeout"
            )
        if opening.cancelled():
            raise ClosedError(f"the client was closed while it waited for sampler {self._deployment_id}")
        if error := opening.exception():
            raise error.with_traceback(None)

    async def doubt(self) -> bool:
        """Ask again whether the deployment is up, after an answer that suggests otherwise; True when it is not."""
        self.is_open = await self._is_active() is True
        return not self.is_open

    async def _open(self) -> bool | None:
        self._is_woken = False
        self.is_open = await until(self._is_active, seconds=None) is True
        return self.is_open

    async def _is_active(self) -> bool | None:
        try:
            status = await self._runtime.control_plane.get_model_deployment_status(self._model_id, self._deployment_id)
        except ApiError as error:
            # A service that does not tell the state must not keep us out; requests are tried again anyway.
            return None if error.status >= 500 else True
        except TransportError as error:
            log.debug("the state of sampler %s is not known: %s", self._deployment_id, error)
            return None
        if status in protocol.SAMPLER_TERMINAL:
            raise SamplerTerminatedError(
                f"the sampler will not come up: deployment {self._deployment_id} of model {self._model_id} is "
                f"{status}. Look at its logs, then make a new sampler.",
                deployment_id=self._deployment_id,
                status=status,
            )
        if status == protocol.SCALED_TO_ZERO and not self._is_woken:
            self._is_woken = True
            await self._wake()
        return True if status == protocol.SAMPLER_READY else None

    async def _wake(self) -> None:
        root = self._base_url.removesuffix("/sync")
        what = f"wake sampler {self._deployment_id}"
        try:
            await self._runtime.transport.ask(Request(method="POST", url=f"{root}/wake", what=what, timeout=30.0))
        except LoopsError as error:
            log.warning("%s", error)

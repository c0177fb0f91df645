"""Waiting until a trainer or a sampler is ready (control-plane reference 6)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, TypeAlias
from urllib.parse import quote

from .. import protocol
from .._http.retry import until
from .._http.transport import Request, is_final
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
from ..types import Run
from .runtime import Runtime

log = logging.getLogger("loops_async")

HEALTH_SECONDS: Final = 30.0
LAST_WORDS: Final = 500

OnStatus: TypeAlias = Callable[[str | None], object]


def _nobody(_: str | None) -> None: ...


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


async def wait_for_trainer(
    runtime: Runtime, run: Run, *, ready_timeout: float, is_local: bool, tell: OnStatus = _nobody
) -> None:
    """Wait until the trainer of `run` answers that it is healthy; `tell` gets each state of its deployment.

    Raises:
        ProvisioningError: its deployment failed, was stopped or was preempted.
        NotReadyError: it is not ready after `ready_timeout` seconds.
        ApiError: waiting would not help: the key is refused, or a gateway says that there is no such trainer.
    """
    request = health_request(run, authorize=not is_local)
    last = "nothing yet"

    async def probe() -> bool | None:
        nonlocal last
        status = None if run.deployment_id is None else await _trainer_status(runtime, run, run.deployment_id)
        tell(status)
        try:
            answer = await runtime.transport.send(request)
        except TransportError as error:
            # Whoever names a URL of a process that runs already is told at once that it does not.
            if is_local and not isinstance(error, RequestTimeoutError):
                raise
            last = str(error)
            return None
        if answer.is_success:
            return True
        refusal = runtime.transport.error(request, answer)
        if isinstance(refusal, AuthenticationError | PermissionDeniedError) or is_final(answer):
            # It may have failed since its state was asked for, which says more than this refusal.
            if is_final(answer) and run.deployment_id is not None:
                await _trainer_status(runtime, run, run.deployment_id)
            raise refusal
        if is_local and isinstance(refusal, ProtocolError):
            raise refusal
        last = str(refusal)
        return None

    if await until(probe, seconds=ready_timeout) is None:
        raise NotReadyError(
            f"the trainer of run {run.id} ({run.base_model}) was not ready after {ready_timeout:g} s; its last answer "
            f"was: {last}. Give it longer with a larger ready_timeout, or look at its deployment."
        )


async def _trainer_status(runtime: Runtime, run: Run, deployment_id: str) -> str | None:
    """Return the state of the deployment, None when it is not known; raise if it is the end."""
    try:
        status = (await runtime.control_plane.get_deployment(deployment_id)).status.name
    except (ApiError, TransportError) as error:
        log.debug("the state of deployment %s is not known: %s", deployment_id, error)
        return None
    if status in protocol.TRAINER_TERMINAL:
        raise ProvisioningError(
            f"the trainer of run {run.id} will not come up: deployment {deployment_id} is {status}"
            f"{await _last_words(runtime, deployment_id)}. Look at the deployment's logs "
            f"(`loops deployments logs {deployment_id}`), then create a new run.",
            deployment_id=deployment_id,
            status=status,
        )
    return status


async def _last_words(runtime: Runtime, deployment_id: str) -> str:
    """Return what a deployment logged as its last error, if the service tells."""
    try:
        lines = await runtime.control_plane.get_deployment_logs(
            deployment_id, direction="desc", limit=1, min_level="ERROR"
        )
    except LoopsError as error:
        log.debug("the logs of deployment %s are not known: %s", deployment_id, error)
        return ""
    return f" ({runtime.transport.clean(lines[0].message)[:LAST_WORDS].strip()})" if lines else ""


def sampler_gate(
    runtime: Runtime, *, base_url: str, model_id: str | None, deployment_id: str | None
) -> SamplerGate | None:
    """Return the gate that all clients of a deployment share; None for a sampler without one, which is always up."""
    if model_id is None or deployment_id is None:
        return None
    key = ("sampler", deployment_id)
    gate: SamplerGate | None = runtime.shared.get(key)
    if gate is None:
        gate = SamplerGate(runtime, base_url=base_url, model_id=model_id, deployment_id=deployment_id)
        runtime.shared[key] = gate
    return gate


class SamplerGate:
    """Lets samples through once a sampler's deployment is ACTIVE; shared by all clients of the deployment."""

    def __init__(self, runtime: Runtime, *, base_url: str, model_id: str, deployment_id: str) -> None:
        self._runtime = runtime
        self._base_url = base_url
        self._model_id = model_id
        self._deployment_id = deployment_id
        self._opening: asyncio.Task[bool | None] | None = None
        self._is_woken = False
        self._told: list[OnStatus] = []
        self.is_open = False

    async def wait(self, ready_timeout: float | None, tell: OnStatus = _nobody) -> None:
        """Return when samples may be sent; a sampler that was scaled to zero is woken once.

        `tell` gets each state of the deployment meanwhile.

        Raises:
            SamplerTerminatedError: the deployment does not come up any more.
            NotReadyError: it is not ready after `ready_timeout` seconds.
        """
        if self.is_open:
            return
        if self._opening is None or self._opening.done():
            self._opening = self._runtime.tasks.start(self._open(), name=f"wait for sampler {self._deployment_id}")
        opening = self._opening
        self._told.append(tell)
        try:
            # One task asks for everybody; whoever stops waiting does not stop it.
            await asyncio.wait([opening], timeout=ready_timeout)
        finally:
            self._told.remove(tell)
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
        for tell in self._told:
            tell(status)
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

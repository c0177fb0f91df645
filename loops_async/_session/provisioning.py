"""Making runs and samplers and waiting for them. What fails or is cancelled on the way is switched off again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any, Final, Literal, TypeAlias, TypeVar

import anyio

from .._arguments import check_positive
from ..control_plane import ControlPlane
from ..errors import ApiError, LoopsError, ProtocolError, UnsupportedError
from ..types import CreateRunRequest, CreateSamplerRequest, ProvisioningEvent, Run, Sampler
from .readiness import sampler_gate, wait_for_trainer
from .runtime import Runtime

T = TypeVar("T", Run, Sampler)

Kind: TypeAlias = Literal["run", "sampler"]
Stage: TypeAlias = Literal["created", "waiting", "ready", "failed", "deactivated"]

log = logging.getLogger("loops_async")

SWITCH_OFF_SECONDS: Final = 10.0
"""How long a failure or a cancellation is held up, at most, to switch off what was made."""

NO_SUCH_ROUTE: Final = (404, 405, 501)


class Wishes:
    """How one provisioning is to go: how long it may take, what happens when it fails, and who is told."""

    def __init__(
        self,
        kind: Kind,
        *,
        ready_timeout: float,
        keep_on_failure: bool = False,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
    ) -> None:
        check_positive(ready_timeout, "ready_timeout")
        self.kind: Kind = kind
        self.ready_timeout = ready_timeout
        self.keep_on_failure = keep_on_failure
        self._on_progress = on_progress
        self._started = monotonic()
        self._last: tuple[str, str | None] | None = None

    def tell(self, made: Run | Sampler, stage: Stage, status: str | None = None) -> None:
        """Tell whoever wants to know, of each change once."""
        if self._on_progress is None or self._last == (stage, status):
            return
        self._last = (stage, status)
        seconds = monotonic() - self._started
        self._on_progress(ProvisioningEvent(kind=self.kind, id=made.id, stage=stage, status=status, seconds=seconds))


@asynccontextmanager
async def provisioned_run(
    runtime: Runtime, request: CreateRunRequest, wishes: Wishes, *, team_id: str | None
) -> AsyncGenerator[Run]:
    """Make a run and give it when its trainer is ready; switch it off if that fails, or what is done within."""
    making = runtime.control_plane.create_run(request, team_id=team_id)
    async with _made(making, switch_off_run, runtime, wishes) as run:
        await until_ready(runtime, run, wishes)
        yield run


@asynccontextmanager
async def provisioned_sampler(
    runtime: Runtime, request: CreateSamplerRequest, wishes: Wishes, *, team_id: str | None
) -> AsyncGenerator[Sampler]:
    """Make a sampler and give it when it is ready; switch it off if that fails, or what is done within."""
    making = runtime.control_plane.create_sampler(request, team_id=team_id)
    async with _made(making, switch_off_sampler, runtime, wishes) as sampler:
        gate = sampler_gate(
            runtime, base_url=sampler.base_url, model_id=sampler.model_id, deployment_id=sampler.deployment_id
        )
        if gate is not None:
            await gate.wait(wishes.ready_timeout, lambda status: wishes.tell(sampler, "waiting", status))
        wishes.tell(sampler, "ready")
        yield sampler


async def until_ready(runtime: Runtime, run: Run, wishes: Wishes, *, is_local: bool = False) -> None:
    """Wait until the trainer of a run is ready."""
    if run.base_url is None:
        raise ProtocolError(f"run {run.id} was made without the URL of its trainer; look at it with get_run")
    await wait_for_trainer(
        runtime,
        run,
        ready_timeout=wishes.ready_timeout,
        is_local=is_local,
        tell=lambda status: wishes.tell(run, "waiting", status),
    )
    wishes.tell(run, "ready")


async def switch_off_run(control_plane: ControlPlane, run: Run) -> None:
    """Deactivate a run by whichever route the service has."""
    try:
        await control_plane.deactivate_run(run.id)
    except (ApiError, ProtocolError) as error:
        if not _is_missing(error):
            raise
        # Older services only know the deployment, and do not say which one a run has.
        deployment_id = run.deployment_id or next(
            (each.id for each in await control_plane.list_deployments() if each.base_url == run.base_url), None
        )
        if deployment_id is None:
            raise UnsupportedError(f"this service has no route to deactivate run {run.id}") from error
        await control_plane.deactivate_deployment(deployment_id)


async def switch_off_sampler(control_plane: ControlPlane, sampler: Sampler) -> None:
    """Deactivate a sampler where the service can."""
    try:
        await control_plane.deactivate_sampler(sampler.id)
    except (ApiError, ProtocolError) as error:
        if not _is_missing(error):
            raise
        raise UnsupportedError(f"this service has no route to deactivate sampler {sampler.id}") from error


def _is_missing(error: ApiError | ProtocolError) -> bool:
    """Whether a service may mean that it does not have the route."""
    return isinstance(error, ProtocolError) or error.status in NO_SUCH_ROUTE


@asynccontextmanager
async def _made(
    making: Coroutine[Any, Any, T],
    switch_off: Callable[[ControlPlane, T], Awaitable[None]],
    runtime: Runtime,
    wishes: Wishes,
) -> AsyncGenerator[T]:
    """Give what `making` makes; switch it off if what is done within fails or is cancelled."""
    task = asyncio.create_task(making, name=f"loops_async: create a {wishes.kind}")
    try:
        made = await asyncio.shield(task)
        wishes.tell(made, "created")
        yield made
    except BaseException as failure:
        with anyio.CancelScope(shield=True):
            late = await _late(task, wishes)
            if late is not None:
                await _end(late, switch_off, runtime, wishes, failure)
        raise


async def _late(task: asyncio.Task[T], wishes: Wishes) -> T | None:
    """Return what a creation makes though nobody waits for it any more: it costs money all the same."""
    await asyncio.wait([task], timeout=SWITCH_OFF_SECONDS)
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
        log.warning("a cancelled creation was not answered in time: a %s that nobody uses may exist", wishes.kind)
    return None if task.cancelled() or task.exception() else task.result()


async def _end(
    made: T,
    switch_off: Callable[[ControlPlane, T], Awaitable[None]],
    runtime: Runtime,
    wishes: Wishes,
    failure: BaseException,
) -> None:
    name = f"{wishes.kind} {made.id}"
    # A listener that fails must not stop the clean-up.
    with suppress(Exception):
        wishes.tell(made, "failed")
    if wishes.keep_on_failure:
        failure.add_note(f"{name} was kept, as asked, and costs money until it is deactivated")
        return
    try:
        with anyio.fail_after(SWITCH_OFF_SECONDS):
            await switch_off(runtime.control_plane, made)
    except (LoopsError, TimeoutError) as error:
        failure.add_note(f"{name} could not be deactivated and may still cost money: {error}")
        log.warning("%s could not be deactivated and may still cost money: %s", name, error)
    else:
        with suppress(Exception):
            wishes.tell(made, "deactivated")

"""Deactivating runs and samplers: by a call, at the end of a scope, and when the client that created them closes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, Literal, TypeAlias

import anyio

from .._http.settings import DEFAULT_BASE_URL
from .._running import Running, kind_of
from ..control_plane import ControlPlane
from ..errors import ApiError, LoopsError, ProtocolError, UnsupportedError
from ..protocol import NO_SUCH_ROUTE
from ..types import Deployment, Run, Sampler

log = logging.getLogger("loops_async.provisioning")

OnExit: TypeAlias = Literal["deactivate", "warn", "leave"]
"""What happens when a client closes to what it created and did not deactivate."""

END_SECONDS: Final = 30.0
"""The time limit of deactivating at the end of a scope, and of all that a client deactivates when it closes."""

MOST_NAMED: Final = 5
"""More runs and samplers than this are counted instead."""


async def deactivate(control_plane: ControlPlane, created: Run | Sampler) -> None:
    """Deactivate a run with its sampler, or a standalone sampler, by the route that the service has.

    Raises:
        UnsupportedError: it has none.
    """
    if isinstance(created, Run):
        await deactivate_run(control_plane, created)
    else:
        await deactivate_sampler(control_plane, created.id)


async def deactivate_run(control_plane: ControlPlane, run: Run) -> None:
    """Deactivate a run by the route that the service has."""
    try:
        await control_plane.deactivate_run(run.id)
    except (ApiError, ProtocolError) as error:
        if not _is_missing(error):
            raise
        deployment_id = await deployment_id_of(control_plane, run)
        if deployment_id is None:
            raise UnsupportedError(f"this service has no route to deactivate run {run.id}") from error
        await control_plane.deactivate_deployment(deployment_id)


async def deployment_id_of(control_plane: ControlPlane, run: Run) -> str | None:
    """Return the id of a run's deployment; None for a serverless run."""
    if run.deployment_id is not None:
        return run.deployment_id
    found = deployment_of(run, await control_plane.list_deployments())
    return None if found is None else found.id


def deployment_of(run: Run, deployments: Iterable[Deployment]) -> Deployment | None:
    """Return the deployment of a run; older services do not say which one it is."""
    for each in deployments:
        if run.deployment_id == each.id or (run.deployment_id is None and run.base_url == each.base_url):
            return each
    return None


async def deactivate_sampler(control_plane: ControlPlane, sampler_id: str) -> None:
    """Deactivate a standalone sampler, if the service supports that."""
    try:
        await control_plane.deactivate_sampler(sampler_id)
    except (ApiError, ProtocolError) as error:
        if not _is_missing(error):
            raise
        raise UnsupportedError(f"this service has no route to deactivate sampler {sampler_id}") from error


def _is_missing(error: ApiError | ProtocolError) -> bool:
    """Whether the error may mean that the service does not have the route."""
    return isinstance(error, ProtocolError) or error.status in NO_SUCH_ROUTE


async def problem_of_deactivating(control_plane: ControlPlane, created: Run | Sampler, seconds: float) -> str | None:
    """Deactivate within `seconds`; return why that failed, None if it did not."""
    try:
        with anyio.fail_after(seconds):
            await deactivate(control_plane, created)
    except LoopsError as error:
        return str(error)
    except TimeoutError:
        return f"the service did not answer within {seconds:g} s"
    return None


class Leftovers:
    """Ends what a client created, or says that it still runs."""

    def __init__(self, running: Running, control_plane: ControlPlane, on_exit: OnExit, base_url: str) -> None:
        self._running = running
        self._control_plane = control_plane
        self._on_exit: OnExit = on_exit
        self._base_url = base_url

    async def end(self, id_: str | None) -> None:
        """Deactivate what the client created, unless that was done before; a failure is logged."""
        created = None if id_ is None else self._running.get(id_)
        if created is not None:
            await self._deactivate([created])

    async def settle(self) -> None:
        """Do what the user wants to be done at the end; failures are logged."""
        if self._on_exit == "deactivate":
            await self._deactivate(self._running.take_all())
        else:
            self.name()

    def name(self) -> None:
        """Log what still runs, in one line, unless that is as the user wants it."""
        created = self._running.take_all()
        if created and self._on_exit != "leave":
            log.warning("%s", self._still_running(created))

    async def _deactivate(self, created: Sequence[Run | Sampler]) -> None:
        left = [each for each in await asyncio.gather(*map(self._left, created)) if each is not None]
        if left:
            log.warning("%s", self._still_running(left))

    async def _left(self, created: Run | Sampler) -> Run | Sampler | None:
        """Deactivate it; return it if that failed."""
        problem = await problem_of_deactivating(self._control_plane, created, END_SECONDS)
        if problem is None:
            self._running.deactivated(created.id, kind_of(created))
            return None
        log.warning("%s %s could not be deactivated: %s", kind_of(created), created.id, problem)
        return created

    def _still_running(self, created: Sequence[Run | Sampler]) -> str:
        known = os.environ.get("LOOPS_BASE_URL") or DEFAULT_BASE_URL
        where = "" if known.strip().rstrip("/") == self._base_url else f"--base-url {self._base_url} "
        ids = " ".join(each.id for each in created)
        return f"still running, and may cost money: {_named(created)}. To stop: loops {where}down {ids}"


def _named(created: Sequence[Run | Sampler]) -> str:
    """Return e.g. ``run r1 (org/model), sampler s1 (org/model)``; many are counted: the command has their ids."""
    if len(created) <= MOST_NAMED:
        return ", ".join(f"{kind_of(each)} {each.id} ({each.base_model})" for each in created)
    counts = Counter(map(kind_of, created))
    return " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in sorted(counts.items()))

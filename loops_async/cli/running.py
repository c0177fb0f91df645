"""``loops ps`` and ``loops down``: what runs and may cost money, and how to stop it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Final

import typer
from msgspec import Struct

from .._running import kind_of
from .._session.deactivation import deactivate, deployment_of
from ..control_plane import ControlPlane
from ..errors import LoopsError, NotFoundError
from ..protocol import SCALED_TO_ZERO, TRAINER_TERMINAL
from ..types import Deployment, Run, Sampler, Scope
from ._connection import confirm, on_control_plane, team_id
from ._deactivate import deactivate_all
from ._options import AsJson, Quiet
from ._show import Columns, emit_rows, note

SAMPLER_ENDED: Final = frozenset(
    {"DEPLOY_FAILED", "BUILD_FAILED", "BUILD_STOPPED", "DEACTIVATING", "INACTIVE", "FAILED"}
)
"""The states of a sampler that costs nothing any longer; an unhealthy one may still cost."""

IDLE_WINDOW: Final = timedelta(hours=1)
"""How far back the last request to a trainer is looked for."""

IDLE_STEP: Final = 60


class Entry(Struct, frozen=True, kw_only=True):
    """A run or a standalone sampler that was not deactivated. What the service does not tell is None."""

    id: str
    kind: str
    model: str
    name: str | None
    status: str | None
    created_at: datetime
    age_seconds: float
    idle_seconds: float | None = None
    """The time since the last request; at least that long if there was none in the last hour."""
    deployment_id: str | None = None
    switches_off: str | None = None
    """``off`` where it was scaled to zero, and costs nothing until its next use."""
    owner: str | None = None


COLUMNS: Final[Columns[Entry]] = {
    "id": lambda row: row.id,
    "kind": lambda row: row.kind,
    "status": lambda row: row.status,
    "age": lambda row: _in_words(row.age_seconds),
    "idle": lambda row: _idle_in_words(row.idle_seconds),
    "model": lambda row: row.model,
    "switches off": lambda row: row.switches_off,
    "name": lambda row: row.name if row.name != row.model else None,
    "owner": lambda row: row.owner,
}


def ps(
    context: typer.Context,
    everyone: Annotated[bool, typer.Option("--all", help="Also show those of the whole organization.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show the runs and standalone samplers that were not deactivated: they may cost money."""
    found = on_control_plane(context, partial(running, context, everyone=everyone))
    emit_rows(COLUMNS, found, as_json=as_json, quiet=quiet)


def down(
    context: typer.Context,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID…", help="Ids of runs and of standalone samplers.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Deactivate all that you have running.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before deactivating all.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Deactivate runs, with their samplers, and standalone samplers. Unsaved training state is lost."""
    if bool(ids) == everything:
        raise typer.BadParameter("give the ids of runs and samplers (see `loops ps`), or --all")
    chosen = list(dict.fromkeys(ids or []))
    if everything:
        found = on_control_plane(context, partial(running, context, everyone=False))
        chosen = [row.id for row in found]
        if found and not yes:
            confirm(f"Deactivate all {len(found)}: {', '.join(f'{row.kind} {row.id} ({row.model})' for row in found)}?")
        if not found:
            note("none")
    deactivate_all(context, chosen, _deactivate, as_json=as_json, quiet=quiet)


async def _deactivate(plane: ControlPlane, id_: str) -> None:
    await deactivate(plane, await _named(plane, id_))


async def _named(plane: ControlPlane, id_: str) -> Run | Sampler:
    """Return the run or the sampler of this id."""
    with suppress(NotFoundError):
        return await plane.get_run(id_)
    try:
        return await plane.get_sampler(id_)
    except NotFoundError as error:
        error.add_note("There is no run of this id either; `loops ps` lists what runs.")
        raise


async def running(context: typer.Context, plane: ControlPlane, *, everyone: bool) -> list[Entry]:
    """Return what runs, the newest first."""
    team: str | None = await team_id(context, plane)
    scope: Scope | None = "org" if everyone else None
    runs, samplers, deployments = await asyncio.gather(
        plane.list_runs(scope=scope, team_id=team),
        plane.list_samplers(scope=scope, team_id=team),
        plane.list_deployments(scope=scope),
    )
    paired = {run.sampler.id for run in runs if run.sampler is not None}
    now = datetime.now(UTC)
    found = [
        _row(each, each.status.name, now)
        for each in samplers
        if each.id not in paired and each.status.name not in SAMPLER_ENDED
    ]
    trainers = [(run, deployment_of(run, deployments)) for run in runs if run.status.name != "INACTIVE"]
    found += await asyncio.gather(
        *(
            _run_row(plane, run, deployment, now)
            for run, deployment in trainers
            if deployment is None or deployment.status.name not in TRAINER_TERMINAL
        )
    )
    return sorted(found, key=lambda row: row.created_at, reverse=True)


async def _run_row(plane: ControlPlane, run: Run, deployment: Deployment | None, now: datetime) -> Entry:
    if deployment is None:
        return _row(run, run.status.name, now)
    idle = await _idle_seconds(plane, deployment.id, run.created_at, now)
    return _row(run, deployment.status.name, now, idle_seconds=idle, deployment_id=deployment.id)


def _row(
    found: Run | Sampler,
    status: str | None,
    now: datetime,
    *,
    idle_seconds: float | None = None,
    deployment_id: str | None = None,
) -> Entry:
    return Entry(
        id=found.id,
        kind=kind_of(found),
        model=found.base_model,
        name=found.name if isinstance(found, Run) else None,
        status=status,
        created_at=found.created_at,
        age_seconds=_seconds(now - found.created_at),
        idle_seconds=idle_seconds,
        switches_off="off" if status == SCALED_TO_ZERO else None,
        deployment_id=deployment_id or found.deployment_id,
        owner=found.user.email if found.user else None,
    )


async def _idle_seconds(plane: ControlPlane, deployment_id: str, created_at: datetime, now: datetime) -> float | None:
    """Return the time since the last request to a trainer; None where the service does not tell."""
    start = max(created_at, now - IDLE_WINDOW)
    try:
        metrics = await plane.get_deployment_metrics(
            deployment_id,
            start_epoch_millis=int(start.timestamp() * 1000),
            end_epoch_millis=int(now.timestamp() * 1000) + 1,
            step_seconds=IDLE_STEP,
        )
    except LoopsError:  # the list is worth more than this column
        return None
    if not metrics.inference_volume:
        return None
    used = [point.timestamp for point in metrics.inference_volume if point.value]
    # A point is the beginning of its step, so something newer may have happened within it.
    return _seconds(now - max(used) - timedelta(seconds=IDLE_STEP)) if used else _seconds(now - start)


def _seconds(length: timedelta) -> float:
    """Return a length of time, which clocks that differ must not make negative."""
    return max(0.0, round(length.total_seconds(), 1))


def _idle_in_words(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"> {_in_words(seconds)}" if seconds >= IDLE_WINDOW.total_seconds() else _in_words(seconds)


def _in_words(seconds: float) -> str:
    """Return e.g. ``45 s``, ``12 min``, ``3.5 h`` or ``2.1 d``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"

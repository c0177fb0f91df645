"""Ids for completion scripts, one a line: at most a second, and silent if that fails."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, NoReturn

from .._http.settings import resolve_settings
from .._session.runtime import Runtime
from ..control_plane import ControlPlane, resolve_team

SECONDS: Final = 0.9
"""How long it takes at most, unless ``LOOPS_COMPLETION_SECONDS`` is set."""
LEAST_SECONDS: Final = 0.2
MOST_RUNS: Final = 20
"""How many runs' checkpoints are looked up: the service lists those of one run at a time."""

_IS_HARMLESS: Final = re.compile(r"[\w.-]+", re.ASCII)
"""Ids that mean nothing to a shell, which puts them into the command line as they are."""


def print_ids(kind: str) -> NoReturn:
    """Print the ids of a kind, and end."""
    logging.disable()
    # The interpreter took a part of the second before this runs. What hangs, e.g. a look-up of a host, cannot be
    # cancelled, so the process ends from another thread.
    ending = threading.Timer(max(LEAST_SECONDS, _seconds() - time.process_time()), os._exit, args=(0,))
    ending.daemon = True
    ending.start()
    with suppress(Exception):
        ids = asyncio.run(_ids(kind))
        sys.stdout.write("".join(f"{id_}\n" for id_ in ids if _IS_HARMLESS.fullmatch(id_)))
        sys.stdout.flush()
    os._exit(0)


def _seconds() -> float:
    try:
        return float(os.environ.get("LOOPS_COMPLETION_SECONDS") or SECONDS)
    except ValueError:
        return SECONDS


async def _ids(kind: str) -> Sequence[str]:
    runtime = Runtime(resolve_settings())
    try:
        plane = runtime.control_plane
        team = None if runtime.settings.team is None else await resolve_team(plane, runtime.settings.team)
        return await KINDS[kind](plane, team)
    finally:
        await runtime.close()


async def _runs(plane: ControlPlane, team: str | None) -> list[str]:
    return [each.id for each in await plane.list_runs(team_id=team)]


async def _samplers(plane: ControlPlane, team: str | None) -> list[str]:
    return [each.id for each in await plane.list_samplers(team_id=team)]


async def _deployments(plane: ControlPlane, _: str | None) -> list[str]:
    return [each.id for each in await plane.list_deployments()]


async def _checkpoints(plane: ControlPlane, team: str | None) -> list[str]:
    runs = await plane.list_runs(team_id=team)
    newest = sorted(runs, key=lambda run: run.created_at, reverse=True)[:MOST_RUNS]
    found = await asyncio.gather(*(plane.list_checkpoints(run_id=run.id) for run in newest))
    return [each.id for checkpoints in found for each in checkpoints]


async def _running(plane: ControlPlane, team: str | None) -> list[str]:
    """Return what `loops down` takes: runs that are active, and samplers that are of none."""
    runs, samplers = await asyncio.gather(plane.list_runs(team_id=team), plane.list_samplers(team_id=team))
    paired = {run.sampler.id for run in runs if run.sampler is not None}
    active = [run.id for run in runs if run.status.name != "INACTIVE"]
    return active + [each.id for each in samplers if each.id not in paired and each.status.name != "INACTIVE"]


KINDS: Final[dict[str, Callable[[ControlPlane, str | None], Awaitable[Sequence[str]]]]] = {
    "runs": _runs,
    "samplers": _samplers,
    "deployments": _deployments,
    "checkpoints": _checkpoints,
    "running": _running,
}

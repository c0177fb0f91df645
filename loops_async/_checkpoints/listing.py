"""The checkpoints of all runs, for which the service has no route of its own."""

from __future__ import annotations

import asyncio
from typing import Final

from .._tasks import gather_or_raise
from ..control_plane import ControlPlane
from ..errors import NotFoundError
from ..types import Checkpoint

__all__ = ["checkpoints_of_all_runs"]

AT_ONCE: Final = 16
"""How many runs are asked for at once: there may be thousands."""


async def checkpoints_of_all_runs(plane: ControlPlane) -> list[Checkpoint]:
    """Return the checkpoints of every run that the service lists, oldest first."""
    places = asyncio.Semaphore(AT_ONCE)

    async def of_run(run_id: str) -> list[Checkpoint]:
        async with places:
            try:
                return await plane.list_checkpoints(run_id=run_id)
            except NotFoundError:  # the run has gone meanwhile
                return []

    of_runs = await gather_or_raise([of_run(run.id) for run in await plane.list_runs()])
    return sorted((each for found in of_runs for each in found), key=lambda checkpoint: checkpoint.created_at)

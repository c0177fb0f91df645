"""Listings that take several requests: the checkpoints of all runs, and the files of one checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from .._tasks import gather_or_raise
from ..control_plane import ControlPlane
from ..errors import ApiError, LoopsError, NotFoundError, ProtocolError, UnsupportedError
from ..types import Checkpoint, CheckpointFile

__all__ = ["checkpoint_files", "checkpoints_of_all_runs"]

AT_ONCE: Final = 16
"""How many runs are asked for at once: there may be thousands."""

PAGE_SIZE: Final = 1000
"""How many files a page has."""


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


async def checkpoint_files(
    plane: ControlPlane, checkpoint_id: str, *, page_size: int = PAGE_SIZE
) -> AsyncGenerator[CheckpointFile]:
    """Yield every file of a checkpoint, fetching pages as they are needed.

    Raises:
        UnsupportedError: the checkpoint is stored where there are no file URLs.
        ProtocolError: the pages are not one consistent listing.
    """
    token, count, total = 0, 0, 0
    while True:
        try:
            page = await plane.get_checkpoint_files(checkpoint_id, page_size=page_size, page_token=token)
        except ApiError as error:
            if error.reason != "NOT_PRESIGNABLE":
                raise
            raise await _without_urls(plane, checkpoint_id, error) from error
        for file in page.presigned_urls:
            yield file
        count, total = count + len(page.presigned_urls), max(total, page.total_count)
        if page.next_page_token is None:
            break
        if page.next_page_token <= token:
            raise ProtocolError(
                f"checkpoint {checkpoint_id}: page {token} of its files names {page.next_page_token} as the next"
            )
        token = page.next_page_token
    if count < total:
        raise ProtocolError(f"checkpoint {checkpoint_id}: its pages list {count} files of {total}; call again")


async def _without_urls(plane: ControlPlane, checkpoint_id: str, error: ApiError) -> UnsupportedError:
    """Return the error that says where the files are stored and how to read them."""
    try:
        source = await plane.get_checkpoint_source(checkpoint_id)
    except LoopsError:  # an older service, which does not report it
        return UnsupportedError(str(error))
    if source.kind == "volume":
        return UnsupportedError(
            f"checkpoint {checkpoint_id} is on volume {source.volume_ref}, in directory {source.path!r}, and has no "
            "file URLs. It cannot be downloaded; to read it, mount that volume in a deployment of your workspace."
        )
    return UnsupportedError(f"{error}. The checkpoint's source is of kind {source.kind!r}, which has no file URLs.")

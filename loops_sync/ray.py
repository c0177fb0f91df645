"""Batches on Ray, as plain calls: see `loops_async.ray`, whose `RayExecutor.submit` is the same here."""

from __future__ import annotations

import os
from typing import Any

import loops_async.ray as _core
from loops_async import Adaptive, BatchReport, BatchSettings
from loops_async.ray import RayExecutor, Sampler, SharedLimit

from ._bridge import current
from ._handle import unwrap
from .sampling import SamplingClient

__all__ = ["RayExecutor", "Sampler", "SharedLimit", "sample", "sample_files"]


def sample(ds: Any, client: SamplingClient, *, settings: BatchSettings, workers: int, **options: Any) -> Any:
    """Return a dataset of the records of a dataset of rows: see `loops_async.ray.sample`."""
    return _core.sample(ds, unwrap(client), settings=settings, workers=workers, **options)


def sample_files(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    client: SamplingClient,
    *,
    workers: int,
    limit: int | Adaptive,
    **options: Any,
) -> BatchReport:
    """Sample files of rows into a folder of records: see `loops_async.ray.sample_files`."""
    return current().run(_core.sample_files, source, target, unwrap(client), workers=workers, limit=limit, **options)

"""Batches and rollouts on Ray, as plain calls: see `loops_async.ray`."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import loops_async.ray as _core
from loops_async import Adaptive, BatchReport, BatchSettings
from loops_async.ray import Sampler, SharedLimit

from ._bridge import current
from ._handle import Closing, unwrap
from ._workers import InThread
from .sampling import SamplingClient

__all__ = ["RayExecutor", "Sampler", "SharedLimit", "sample", "sample_files"]

K = TypeVar("K")
P = TypeVar("P")
T = TypeVar("T")


class RayExecutor(Closing[_core.RayExecutor]):
    """Runs functions and whole rollouts in actors of a Ray cluster: see `loops_async.ray.RayExecutor`.

    Example:
        ::

            with loops_ray.RayExecutor(64) as executor:
                stream = trainer.rollouts(rollout, tasks, group_size=8, groups_per_step=4, executor=executor)
    """

    def __init__(self, workers: int, *, per_worker: int = 8, num_cpus: float = 1, **options: Any) -> None:
        self._create(_core.RayExecutor, workers, per_worker=per_worker, num_cpus=num_cpus, **options)

    @property
    def capacity(self) -> int:
        """How many rollouts run at the same time; further ones wait for a place."""
        return self._impl.capacity

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Start ``fn(*args)`` in an actor; see `ProcessExecutor.submit`."""
        return self._impl.submit(fn, *args)

    def run(self, rollout: Callable[[P, K], T], policy: P, task: K, *, timeout: float | None = None) -> T:
        """Return ``rollout(policy, task)``, a plain function that runs in an actor; see `ProcessExecutor.run`."""
        result: T = self._bridge.run(self._impl.run, InThread(rollout), policy, task, timeout=timeout)
        return result

    def close(self) -> None:
        """End all calls and actors, and wait for their end."""
        self._bridge.run(self._impl.close)


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

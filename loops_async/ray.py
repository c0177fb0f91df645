"""Batches and rollouts on Ray, for what one process or one machine is too small for: the ``ray`` extra.

- `sample_files`: a batch from files to files. `sample`: the same between datasets; `Sampler` is what it maps.
- `SharedLimit`: one limit of completions in flight for all workers of a job.
- `RayExecutor`: graders and whole rollouts on the machines of a cluster.

Example:
    ::

        import loops_async.ray as loops_ray

        report = await loops_ray.sample_files(
            "s3://bucket/prompts/", "s3://bucket/answers/", sampler, num_samples=4, workers=64, limit=20_000
        )
"""

try:
    import ray as _ray  # noqa: F401
    import ray.data as _ray_data  # noqa: F401
except ImportError as _missing:
    raise ImportError("loops_async.ray needs Ray: pip install 'loops-async[ray]'", name="ray") from _missing

from ._ray.batch import sample, sample_files
from ._ray.executor import RayExecutor
from ._ray.limit import SharedLimit
from ._ray.sampler import Sampler

__all__ = ["RayExecutor", "Sampler", "SharedLimit", "sample", "sample_files"]

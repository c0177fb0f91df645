"""The representations of objects in the control plane's responses.

They have the newest published schema, which contains every field of the older one.
"""

from __future__ import annotations

import os

from yarl import URL

from loops_async import types

from .._http.paths import SAMPLERS, TRAINERS
from .._resources.deployment import Deployment
from .._resources.registry import Registry, Sampler
from .._resources.run import Run
from .._storage.records import CheckpointRecord, DeploymentRecord, RunRecord, SamplerRecord

__all__ = ["Representations", "represent_checkpoint", "represent_deactivated"]

_USER = types.User()
"""The service has one key, and does not know the name of its user."""

_LORA_CONFIG_VERSION = "v1"
_MACHINE = types.InstanceType(id="local", name="this machine", millicpu_limit=1000 * (os.cpu_count() or 1), gpu_count=0)


class Representations:
    """Represents objects with their URLs; `base_url` is set once the service listens.

    In the `serverless` form, objects have no deployment, and samplers have the URL of their queue.
    """

    def __init__(self, registry: Registry, *, serverless: bool) -> None:
        self._registry = registry
        self._serverless = serverless
        self.base_url = URL()

    def run(self, run: Run) -> types.Run:
        """Represent a run."""
        record = run.record
        sampler = self._registry.find_sampler_of(record.id)
        return types.Run(
            id=record.id,
            session_id=record.session_id,
            base_model=record.base_model,
            base_url=self._url(TRAINERS, record.id),
            created_at=record.created_at,
            sampler=None if sampler is None else self.sampler(sampler),
            name=record.name or record.base_model,
            deployment_id=None if self._serverless else record.deployment_id,
            lora_config_version=_LORA_CONFIG_VERSION,
            status=types.Status("ACTIVE" if record.active else "INACTIVE"),
            user=_USER,
        )

    def sampler(self, sampler: Sampler) -> types.Sampler:
        """Represent a sampler."""
        record, deployment = sampler.record, sampler.deployment
        return types.Sampler(
            id=record.id,
            base_url=self._url(SAMPLERS, record.id, "queue" if self._serverless else "sync"),
            base_model=record.base_model,
            created_at=record.created_at,
            model_id=None if self._serverless else deployment.record.model_id,
            deployment_id=None if self._serverless else deployment.record.id,
            status=types.Status(deployment.status),
            user=_USER,
            instance_type=_MACHINE,
            node_count=1,
        )

    def deployment(self, deployment: Deployment) -> types.Deployment:
        """Represent a trainer's deployment, with its newest run."""
        latest = self._registry.latest_run_on(deployment.record.id)
        sampler = self._registry.find_sampler_of(latest.record.id)
        return types.Deployment(
            id=deployment.record.id,
            base_model=deployment.record.base_model,
            base_url=self._url(TRAINERS, latest.record.id),
            status=types.Status(deployment.status),
            sampler=None if sampler is None else self.sampler(sampler),
            user=_USER,
            active_run_id=latest.record.id if latest.record.active else None,
            latest_run_id=latest.record.id,
            created_at=deployment.record.created_at,
            availability_model=deployment.record.availability_model,
            instance_type=_MACHINE,
            node_count=1,
        )

    def _url(self, root: str, *segments: str) -> str:
        return str(self.base_url.joinpath(root.strip("/"), *segments))


def represent_checkpoint(record: CheckpointRecord) -> types.Checkpoint:
    """Represent a checkpoint."""
    return types.Checkpoint(
        id=record.id,
        run_id=record.run_id,
        checkpoint_id=record.name,
        checkpoint_type="lora",
        created_at=record.created_at,
        base_model=record.base_model,
        lora_adapter_config=types.LoraAdapterConfig(rank=record.rank),
        size_bytes=record.size_bytes,
        target=record.target,
        lora_config=types.LoraConfig(config_version=_LORA_CONFIG_VERSION, targets=record.targets),
    )


def represent_deactivated(record: RunRecord | SamplerRecord | DeploymentRecord) -> types.Deactivated:
    """Represent an object that was deactivated by this request."""
    return types.Deactivated(id=record.id, base_model=record.base_model, user=_USER)

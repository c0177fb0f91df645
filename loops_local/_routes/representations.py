"""How objects look to callers of the control plane, in the newest shape, which holds the seed's."""

from __future__ import annotations

import os

from yarl import URL

from loops_async import types

from .provisioning import Deployment
from .records import CheckpointRecord
from .registry import LiveSampler, Registry
from .runs import LiveRun

__all__ = ["NOBODY", "Views", "show_checkpoint"]

NOBODY = types.User()
"""The service has one key and knows no names."""

_LORA_CONFIG_VERSION = "v1"
_MACHINE = types.InstanceType(id="local", name="this machine", millicpu_limit=1000 * (os.cpu_count() or 1), gpu_count=0)


class Views:
    """Shows objects with their URLs; `base_url` is known once the service listens.

    What is `serverless` has no deployment to look at, and samples through a queue.
    """

    def __init__(self, registry: Registry, *, serverless: bool) -> None:
        self._registry = registry
        self._serverless = serverless
        self.base_url = URL()

    def run(self, run: LiveRun) -> types.Run:
        """Show a run."""
        record = run.record
        sampler = self._registry.paired(record.id)
        return types.Run(
            id=record.id,
            session_id=record.session_id,
            base_model=record.base_model,
            base_url=self._trainer_url(record.id),
            created_at=record.created_at,
            sampler=None if sampler is None else self.sampler(sampler),
            name=record.name or record.base_model,
            deployment_id=None if self._serverless else record.deployment_id,
            lora_config_version=_LORA_CONFIG_VERSION,
            status=types.Status("ACTIVE" if record.active else "INACTIVE"),
            user=NOBODY,
        )

    def sampler(self, sampler: LiveSampler) -> types.Sampler:
        """Show a sampler."""
        record, deployment = sampler.record, sampler.deployment
        return types.Sampler(
            id=record.id,
            base_url=str(self.base_url / "samplers" / record.id / ("queue" if self._serverless else "sync")),
            base_model=record.base_model,
            created_at=record.created_at,
            model_id=None if self._serverless else deployment.record.model_id,
            deployment_id=None if self._serverless else deployment.record.id,
            status=types.Status(deployment.status),
            user=NOBODY,
            instance_type=_MACHINE,
            node_count=1,
        )

    def deployment(self, deployment: Deployment) -> types.Deployment:
        """Show what a trainer runs on, with the run that it serves now."""
        latest = self._registry.latest_run_on(deployment.record.id)
        sampler = self._registry.paired(latest.record.id)
        return types.Deployment(
            id=deployment.record.id,
            base_model=deployment.record.base_model,
            base_url=self._trainer_url(latest.record.id),
            status=types.Status(deployment.status),
            sampler=None if sampler is None else self.sampler(sampler),
            user=NOBODY,
            active_run_id=latest.record.id if latest.record.active else None,
            latest_run_id=latest.record.id,
            created_at=deployment.record.created_at,
            availability_model=deployment.record.availability_model,
            instance_type=_MACHINE,
            node_count=1,
        )

    def _trainer_url(self, run_id: str) -> str:
        return str(self.base_url / "trainers" / run_id)


def show_checkpoint(record: CheckpointRecord) -> types.Checkpoint:
    """Show a checkpoint."""
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

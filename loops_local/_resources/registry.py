"""Every session, run, sampler and deployment, by id."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from loops_async.protocol import CheckpointUri

from .._errors import not_found
from .._execution.models import Models
from .._storage.checkpoints import Checkpoints
from .._storage.logs import Logs
from .._storage.records import DeploymentRecord, RunRecord, SamplerRecord, SessionRecord
from .._storage.store import Store
from .deployment import Deployment
from .run import Run

__all__ = ["Registry", "Sampler"]

T = TypeVar("T")

logger = logging.getLogger("loops_local.provisioning")


class Sampler(Struct, frozen=True):
    """A sampler: of `run`, of a checkpoint, or, with neither, of the base model."""

    record: SamplerRecord
    deployment: Deployment
    run: Run | None
    checkpoint: CheckpointUri | None


class Registry:
    """All objects by id, in the order of their creation. Read from the store at the start; `Lifecycle` adds to it."""

    def __init__(
        self,
        store: Store,
        models: Models,
        checkpoints: Checkpoints,
        logs: Logs,
        *,
        data_dir: Path,
        provisioning_seconds: float,
    ) -> None:
        self.models = models
        self.checkpoints = checkpoints
        self.logs = logs
        self._store = store
        self._data_dir = data_dir
        self._provisioning_seconds = provisioning_seconds
        self._sessions: dict[str, SessionRecord] = {}
        self._deployments: dict[str, Deployment] = {}
        self._runs: dict[str, Run] = {}
        self._samplers: dict[str, Sampler] = {}
        self._samplers_of_runs: dict[str, Sampler] = {}

    async def open(self) -> None:
        """Read everything; deployments are scaled to zero until they are used."""
        runs = await self._store.load(RunRecord)
        await self.checkpoints.open(runs)
        self._sessions = {record.id: record for record in await self._store.load(SessionRecord)}
        for deployment in await self._store.load(DeploymentRecord):
            self.add_deployment(deployment)
        for run in runs:
            self.add_run(run)
        for sampler in await self._store.load(SamplerRecord):
            self.add_sampler(sampler)

    async def close(self) -> None:
        """Save a snapshot of every trainer. If that fails, its weights are lost, as after a kill."""
        for run in self._runs.values():
            try:
                await run.save_snapshot()
            except Exception:
                logger.exception("no snapshot of run %s could be saved", run.record.id)

    # Lookup. A method whose name starts with `find` returns None where there is none; the others refuse the request.

    def session(self, session_id: str) -> SessionRecord:
        """Return a session."""
        return _get(self._sessions, session_id, "session")

    def run(self, run_id: str) -> Run:
        """Return a run of the control plane."""
        run = self.any_run(run_id)
        if run.record.local:
            raise not_found("run", run_id)
        return run

    def local_run(self, run_id: str) -> Run:
        """Return a run of local mode."""
        run = self.any_run(run_id)
        if not run.record.local:
            raise not_found("run", run_id)
        return run

    def any_run(self, run_id: str) -> Run:
        """Return a run of either kind."""
        return _get(self._runs, run_id, "run")

    def find_run(self, run_id: str) -> Run | None:
        """Return a run of either kind."""
        return self._runs.get(run_id)

    def runs(self) -> list[Run]:
        """Return the runs of the control plane, newest first."""
        return [run for run in self.all_runs() if not run.record.local]

    def all_runs(self) -> list[Run]:
        """Return the runs of both kinds, newest first."""
        return list(reversed(self._runs.values()))

    def sampler(self, sampler_id: str) -> Sampler:
        """Return a sampler."""
        return _get(self._samplers, sampler_id, "sampler")

    def find_sampler(self, sampler_id: str) -> Sampler | None:
        """Return a sampler."""
        return self._samplers.get(sampler_id)

    def samplers(self) -> list[Sampler]:
        """Return all samplers, newest first."""
        return list(reversed(self._samplers.values()))

    def find_sampler_of(self, run_id: str) -> Sampler | None:
        """Return the sampler that serves a run's weights."""
        return self._samplers_of_runs.get(run_id)

    def trainer_deployments(self) -> list[Deployment]:
        """Return the deployments of the control plane's runs, newest first."""
        return list(dict.fromkeys(run.deployment for run in self.runs()))

    def latest_run_on(self, deployment_id: str) -> Run:
        """Return the newest run on a trainer's deployment."""
        for run in self.runs():
            if run.record.deployment_id == deployment_id:
                return run
        raise not_found("deployment", deployment_id)

    def any_deployment(self, deployment_id: str) -> Deployment:
        """Return a deployment of a trainer or a sampler; both have logs and metrics."""
        return _get(self._deployments, deployment_id, "deployment")

    def model_deployment(self, model_id: str, deployment_id: str) -> Deployment:
        """Return the deployment of a sampler."""
        deployment = self.any_deployment(deployment_id)
        if deployment.record.model_id != model_id or deployment.record.kind != "sampler":
            raise not_found("deployment", deployment_id)
        return deployment

    # From stored records to objects.

    def add_session(self, record: SessionRecord) -> None:
        """Add a session."""
        self._sessions[record.id] = record

    def add_deployment(self, record: DeploymentRecord) -> Deployment:
        """Add a deployment, scaled to zero."""
        host = self.models.host(record.base_model)
        provisioning_seconds = 0.0 if record.local else self._provisioning_seconds
        deployment = Deployment(record, host, provisioning_seconds, self.logs.of(record.id))
        self._deployments[record.id] = deployment
        return deployment

    def add_run(self, record: RunRecord) -> Run:
        """Add a run; its deployment was added before."""
        deployment = self._deployments[record.deployment_id]
        run = Run(record, deployment, store=self._store, checkpoints=self.checkpoints, data_dir=self._data_dir)
        self._runs[record.id] = run
        return run

    def add_sampler(self, record: SamplerRecord) -> Sampler:
        """Add a sampler; its deployment and its run were added before."""
        run = self._runs.get(record.run_id) if record.run_id else None
        checkpoint = CheckpointUri.parse(record.model_path) if record.model_path else None
        sampler = Sampler(record, self._deployments[record.deployment_id], run, checkpoint)
        self._samplers[record.id] = sampler
        if record.run_id is not None:
            self._samplers_of_runs[record.run_id] = sampler
        return sampler


def _get(objects: dict[str, T], key: str, kind: str) -> T:
    if key not in objects:
        raise not_found(kind, key)
    return objects[key]

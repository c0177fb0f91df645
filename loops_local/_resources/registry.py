"""Every session, run, sampler and deployment that there is, by id."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from loops_async.errors import InputError
from loops_async.protocol import CheckpointUri

from .checkpoints import Checkpoints
from .journal import Journal
from .models import Models
from .provisioning import Deployment
from .records import CheckpointRecord, DeploymentRecord, RunRecord, SamplerRecord, SessionRecord
from .runs import LiveRun
from .store import Store
from .web import HttpError, invalid, not_found

__all__ = ["LiveSampler", "Registry"]

T = TypeVar("T")

logger = logging.getLogger(__name__)


class LiveSampler(Struct, frozen=True):
    """A sampler: of `run`, of a checkpoint, or, with neither, of the base model."""

    record: SamplerRecord
    deployment: Deployment
    run: LiveRun | None
    checkpoint: CheckpointUri | None


class Registry:
    """Objects by id, in the order in which they were made. Read from the store at start; `Maker` adds to it."""

    def __init__(
        self,
        store: Store,
        models: Models,
        checkpoints: Checkpoints,
        journal: Journal,
        *,
        data_dir: Path,
        provisioning_seconds: float,
    ) -> None:
        self.models = models
        self.checkpoints = checkpoints
        self._store = store
        self._journal = journal
        self._data_dir = data_dir
        self._provisioning_seconds = provisioning_seconds
        self._sessions: dict[str, SessionRecord] = {}
        self._deployments: dict[str, Deployment] = {}
        self._runs: dict[str, LiveRun] = {}
        self._samplers: dict[str, LiveSampler] = {}
        self._paired: dict[str, LiveSampler] = {}

    async def open(self) -> None:
        """Read everything; what was deployed sleeps until it is used."""
        await self.checkpoints.open()
        self._sessions = {record.id: record for record in await self._store.load(SessionRecord)}
        for deployment in await self._store.load(DeploymentRecord):
            self.deploy(deployment)
        for run in await self._store.load(RunRecord):
            self.add_run(run)
            if run.live is not None:
                await self.checkpoints.serve(run.id, run.live.checkpoint_id)
        for sampler in await self._store.load(SamplerRecord):
            self.add_sampler(sampler)
        await self.checkpoints.remove_leftovers()

    async def close(self) -> None:
        """Put the trainers aside. One that cannot be is lost, and says so later, as after a kill."""
        for run in self._runs.values():
            try:
                await run.put_aside()
            except Exception:
                logger.exception("the weights of run %s could not be put aside", run.record.id)

    # Looking up.

    def session(self, session_id: str) -> SessionRecord:
        """Return a session."""
        return _found(self._sessions, session_id, "session")

    def run(self, run_id: str) -> LiveRun:
        """Return a run of the control plane."""
        run = _found(self._runs, run_id, "run")
        if run.record.local:
            raise not_found("run", run_id)
        return run

    def local_run(self, run_id: str) -> LiveRun:
        """Return a run of local mode."""
        run = self._runs.get(run_id)
        if run is None or not run.record.local:
            raise not_found("run", run_id)
        return run

    def find_run(self, run_id: str) -> LiveRun | None:
        """Return a run of either kind, None when there is none."""
        return self._runs.get(run_id)

    def any_run(self, run_id: str) -> LiveRun:
        """Return a run of either kind."""
        return _found(self._runs, run_id, "run")

    def runs(self) -> list[LiveRun]:
        """Return the runs of the control plane, newest first."""
        return [run for run in reversed(self._runs.values()) if not run.record.local]

    def sampler(self, sampler_id: str) -> LiveSampler:
        """Return a sampler."""
        return _found(self._samplers, sampler_id, "sampler")

    def find_sampler(self, sampler_id: str) -> LiveSampler | None:
        """Return a sampler, None when there is none."""
        return self._samplers.get(sampler_id)

    def samplers(self) -> list[LiveSampler]:
        """Return all samplers, newest first."""
        return list(reversed(self._samplers.values()))

    def paired(self, run_id: str) -> LiveSampler | None:
        """Return the sampler that serves a run's weights."""
        return self._paired.get(run_id)

    def trainer_deployments(self) -> list[Deployment]:
        """Return what the trainers of the control plane's runs run on, newest first."""
        return list(dict.fromkeys(run.deployment for run in self.runs()))

    def trainer_deployment(self, deployment_id: str) -> Deployment:
        """Return what a trainer runs on."""
        return self.latest_run_on(deployment_id).deployment

    def latest_run_on(self, deployment_id: str) -> LiveRun:
        """Return the newest run on a trainer's deployment."""
        for run in self.runs():
            if run.record.deployment_id == deployment_id:
                return run
        raise not_found("deployment", deployment_id)

    def any_deployment(self, deployment_id: str) -> Deployment:
        """Return a deployment of either kind; both keep logs and measurements."""
        return _found(self._deployments, deployment_id, "deployment")

    def model_deployment(self, model_id: str, deployment_id: str) -> Deployment:
        """Return the deployment of a sampler."""
        deployment = self._deployments.get(deployment_id)
        if deployment is None or deployment.record.model_id != model_id or deployment.record.kind != "sampler":
            raise not_found("deployment", deployment_id)
        return deployment

    async def sampler_checkpoint(self, path: str, *, field: str = "checkpoint_path") -> CheckpointRecord:
        """Return the checkpoint that a request wants served; a path that cannot be is a 400."""
        try:
            return await self.checkpoints.at(CheckpointUri.parse(path, kind="sampler_weights", path=field))
        except InputError as error:
            raise HttpError(400, "VALIDATION_ERROR", str(error), details={"field": field}) from error
        except HttpError as missing:
            raise invalid(field, str(missing)) from missing

    # From records to what works.

    def add_session(self, record: SessionRecord) -> None:
        """Add a session."""
        self._sessions[record.id] = record

    def deploy(self, record: DeploymentRecord) -> Deployment:
        """Add a deployment, which sleeps."""
        host = self.models.host(record.base_model)
        rise_seconds = 0.0 if record.local else self._provisioning_seconds
        deployment = Deployment(record, host, rise_seconds, self._journal.log(record.id))
        self._deployments[record.id] = deployment
        return deployment

    def add_run(self, record: RunRecord) -> LiveRun:
        """Add a run on a deployment that is there."""
        deployment = self._deployments[record.deployment_id]
        run = LiveRun(record, deployment, store=self._store, checkpoints=self.checkpoints, data_dir=self._data_dir)
        self._runs[record.id] = run
        return run

    def add_sampler(self, record: SamplerRecord) -> LiveSampler:
        """Add a sampler on a deployment that is there."""
        run = self._runs.get(record.run_id) if record.run_id else None
        checkpoint = CheckpointUri.parse(record.model_path) if record.model_path else None
        sampler = LiveSampler(record, self._deployments[record.deployment_id], run, checkpoint)
        self._samplers[record.id] = sampler
        if record.run_id is not None:
            self._paired[record.run_id] = sampler
        return sampler


def _found(objects: dict[str, T], key: str, what: str) -> T:
    if key not in objects:
        raise not_found(what, key)
    return objects[key]

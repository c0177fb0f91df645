"""Every session, run, sampler and deployment that there is, and how they are made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

from msgspec import UNSET, Struct
from yarl import URL

from loops_async import types
from loops_async.errors import InputError
from loops_async.protocol import CheckpointUri

from .checkpoints import Checkpoints
from .models import Models
from .provisioning import Deployment
from .records import CheckpointRecord, DeploymentRecord, RunRecord, SamplerRecord, SessionRecord
from .runs import LiveRun
from .store import Store
from .web import HttpError, invalid, not_found

__all__ = ["LOCAL_RUN_ID", "LiveSampler", "Registry"]

T = TypeVar("T")

LOCAL_RUN_ID = "local"
_LOCAL_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NEVER = 10**9
_SAMPLER_DELAY_SECONDS = 3600


class LiveSampler(Struct, frozen=True):
    """A sampler: of `run`, of a checkpoint, or, with neither, of the base model."""

    record: SamplerRecord
    deployment: Deployment
    run: LiveRun | None
    checkpoint: CheckpointUri | None


class Registry:
    """Objects by id. Changes are made here first and are on their way to the store at once."""

    def __init__(
        self, store: Store, models: Models, checkpoints: Checkpoints, *, data_dir: Path, provisioning_seconds: float
    ) -> None:
        self.models = models
        self.checkpoints = checkpoints
        self.base_url = URL()
        self._store = store
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
            self._deploy(deployment)
        for run in await self._store.load(RunRecord):
            self._add_run(run)
            if run.live is not None:
                await self.checkpoints.serve(run.id, run.live.checkpoint_id)
        for sampler in await self._store.load(SamplerRecord):
            self._add_sampler(sampler)
        await self.checkpoints.remove_leftovers()

    async def close(self) -> None:
        """Put the trainers aside."""
        for run in self._runs.values():
            await run.put_aside()

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

    def is_local(self, run_id: str) -> bool:
        """Tell whether there is such a run of local mode."""
        return run_id in self._runs and self._runs[run_id].record.local

    def any_run(self, run_id: str) -> LiveRun:
        """Return a run of either kind."""
        return _found(self._runs, run_id, "run")

    def runs(self) -> list[LiveRun]:
        """Return the runs of the control plane, newest first."""
        return [run for run in reversed(self._runs.values()) if not run.record.local]

    def sampler(self, sampler_id: str) -> LiveSampler:
        """Return a sampler."""
        return _found(self._samplers, sampler_id, "sampler")

    def samplers(self) -> list[LiveSampler]:
        """Return all samplers, newest first."""
        return list(reversed(self._samplers.values()))

    def paired(self, run_id: str) -> LiveSampler | None:
        """Return the sampler that serves a run's weights."""
        return self._paired.get(run_id)

    def trainer_deployment(self, deployment_id: str) -> LiveRun:
        """Return the run on a trainer's deployment."""
        for run in self.runs():
            if run.record.deployment_id == deployment_id:
                return run
        raise not_found("deployment", deployment_id)

    def model_deployment(self, model_id: str, deployment_id: str) -> Deployment:
        """Return the deployment of a sampler."""
        deployment = self._deployments.get(deployment_id)
        if deployment is None or deployment.record.model_id != model_id or deployment.record.kind != "sampler":
            raise not_found("deployment", deployment_id)
        return deployment

    # Making.

    async def create_session(self) -> SessionRecord:
        """Make a session."""
        session = SessionRecord()
        self._sessions[session.id] = session
        await self._store.put(session)
        return session

    async def create_run(self, request: types.CreateRunRequest) -> LiveRun:
        """Make a run with its sampler, both rising."""
        self.session(request.session_id)
        host = self.models.find(request.base_model)
        _check_length("max_seq_len", request.max_seq_len, host.max_seq_len)
        if request.path is not None:
            await self._check_start(request.path, request.base_model)
        trainer = DeploymentRecord(
            kind="trainer",
            base_model=request.base_model,
            scale_down_delay_seconds=request.scale_down_delay_seconds,
        )
        run = RunRecord(
            session_id=request.session_id,
            base_model=request.base_model,
            name=None if request.name is UNSET else request.name,
            lora_rank=request.lora_rank,
            max_seq_len=request.max_seq_len,
            seed=request.seed,
            replicas=request.replicas,
            path=request.path,
            deployment_id=trainer.id,
        )
        serving = DeploymentRecord(
            kind="sampler",
            base_model=request.base_model,
            scale_down_delay_seconds=request.scale_down_delay_seconds,
        )
        sampler = SamplerRecord(
            session_id=run.session_id,
            base_model=run.base_model,
            deployment_id=serving.id,
            run_id=run.id,
            max_seq_length=request.max_seq_len,
        )
        self._deploy(trainer).start()
        self._deploy(serving).start()
        live = self._add_run(run)
        self._add_sampler(sampler)
        await self._store.put(trainer, serving, run, sampler)
        return live

    async def create_sampler(self, request: types.CreateSamplerRequest) -> LiveSampler:
        """Make a sampler of a base model or of a checkpoint."""
        self.session(request.session_id)
        base_model = None if request.base_model is UNSET else request.base_model
        if request.model_path is not None:
            checkpoint = await self.sampler_checkpoint(request.model_path, field="model_path")
            if base_model not in (None, checkpoint.base_model):
                raise invalid(
                    "base_model", f"the checkpoint was made with {checkpoint.base_model!r}; got {base_model!r}"
                )
            base_model = checkpoint.base_model
        if base_model is None:
            raise invalid("base_model", "is required without a model_path")
        host = self.models.find(base_model)
        _check_length("max_seq_length", request.max_seq_length, host.max_seq_len)
        deployment = DeploymentRecord(
            kind="sampler", base_model=base_model, scale_down_delay_seconds=_SAMPLER_DELAY_SECONDS
        )
        record = SamplerRecord(
            session_id=request.session_id,
            base_model=base_model,
            deployment_id=deployment.id,
            model_path=request.model_path,
            max_seq_length=request.max_seq_length,
        )
        self._deploy(deployment).start()
        sampler = self._add_sampler(record)
        await self._store.put(deployment, record)
        return sampler

    async def begin_local_run(self, run_id: str, base_model: str, lora_rank: int) -> LiveRun:
        """Return the local run of this id; make it when there is none, or only one of another model."""
        if not _LOCAL_RUN.fullmatch(run_id):
            raise invalid("run_id", f"must be 1 to 64 letters, digits, '_' or '-'; got {run_id!r}", status=422)
        known = self._runs.get(run_id)
        if known is not None and not known.record.local:
            raise invalid("run_id", f"{run_id!r} is not a run of local mode", status=422)
        if known is not None and known.record.base_model == base_model:
            return known
        self.models.find(base_model)
        deployment = DeploymentRecord(kind="trainer", base_model=base_model, scale_down_delay_seconds=_NEVER)
        run = RunRecord(
            id=run_id,
            session_id=LOCAL_RUN_ID,
            base_model=base_model,
            name=None,
            lora_rank=lora_rank,
            max_seq_len=None,
            seed=None,
            replicas=1,
            path=None,
            deployment_id=deployment.id,
            local=True,
        )
        self._deploy(deployment)
        live = self._add_run(run)
        await self._store.put(deployment, run)
        return live

    async def stop_run(self, run: LiveRun) -> None:
        """Switch a run off, and its sampler."""
        run.record.active = False
        run.deployment.stop()
        records: list[RunRecord | DeploymentRecord] = [run.record, run.deployment.record]
        if (sampler := self.paired(run.record.id)) is not None:
            sampler.deployment.stop()
            records.append(sampler.deployment.record)
        await self._store.put(*records)

    async def sampler_checkpoint(self, path: str, *, field: str = "checkpoint_path") -> CheckpointRecord:
        """Return the checkpoint that a request wants served; a path that cannot be is a 400."""
        try:
            return await self.checkpoints.at(CheckpointUri.parse(path, kind="sampler_weights", path=field))
        except InputError as error:
            raise HttpError(400, "VALIDATION_ERROR", str(error), details={"field": field}) from error
        except HttpError as missing:
            raise invalid(field, str(missing)) from missing

    async def _check_start(self, path: str, base_model: str) -> None:
        try:
            checkpoint = await self.checkpoints.at(CheckpointUri.parse(path, kind="weights"))
        except InputError as error:
            raise HttpError(400, "VALIDATION_ERROR", str(error), details={"field": "path"}) from error
        except HttpError as missing:
            raise invalid("path", str(missing)) from missing
        if checkpoint.base_model != base_model:
            raise invalid("path", f"belongs to {checkpoint.base_model!r}; the run asks for {base_model!r}")

    # From records to what works.

    def _deploy(self, record: DeploymentRecord) -> Deployment:
        host = self.models.host(record.base_model)
        deployment = Deployment(record, host, self._provisioning_seconds)
        self._deployments[record.id] = deployment
        return deployment

    def _add_run(self, record: RunRecord) -> LiveRun:
        deployment = self._deployments[record.deployment_id]
        if record.local:
            deployment.skip_rise()
        run = LiveRun(record, deployment, store=self._store, checkpoints=self.checkpoints, data_dir=self._data_dir)
        self._runs[record.id] = run
        return run

    def _add_sampler(self, record: SamplerRecord) -> LiveSampler:
        run = self._runs.get(record.run_id) if record.run_id else None
        checkpoint = CheckpointUri.parse(record.model_path) if record.model_path else None
        sampler = LiveSampler(record, self._deployments[record.deployment_id], run, checkpoint)
        self._samplers[record.id] = sampler
        if record.run_id is not None:
            self._paired[record.run_id] = sampler
        return sampler

    # How objects look to callers.

    def show_run(self, run: LiveRun) -> types.Run:
        """Return a run as the control plane shows it."""
        record = run.record
        sampler = self.paired(record.id)
        return types.Run(
            id=record.id,
            session_id=record.session_id,
            base_model=record.base_model,
            base_url=self.trainer_url(record.id),
            created_at=record.created_at,
            sampler=None if sampler is None else self.show_sampler(sampler),
            name=record.name or record.base_model,
            deployment_id=record.deployment_id,
            status=types.Status("ACTIVE" if record.active else "INACTIVE"),
            user=types.User(),
        )

    def show_sampler(self, sampler: LiveSampler) -> types.Sampler:
        """Return a sampler as the control plane shows it."""
        record, deployment = sampler.record, sampler.deployment
        return types.Sampler(
            id=record.id,
            base_url=str(self.base_url / "samplers" / record.id / "sync"),
            base_model=record.base_model,
            created_at=record.created_at,
            model_id=deployment.record.model_id,
            deployment_id=deployment.record.id,
            status=types.Status(deployment.status),
            user=types.User(),
            node_count=1,
        )

    def show_deployment(self, run: LiveRun) -> types.Deployment:
        """Return the deployment of a run's trainer as the control plane shows it."""
        sampler = self.paired(run.record.id)
        return types.Deployment(
            id=run.record.deployment_id,
            base_model=run.record.base_model,
            base_url=self.trainer_url(run.record.id),
            status=types.Status(run.deployment.status),
            sampler=None if sampler is None else self.show_sampler(sampler),
            user=types.User(),
            active_run_id=run.record.id if run.record.active else None,
            latest_run_id=run.record.id,
            created_at=run.deployment.record.created_at,
        )

    def trainer_url(self, run_id: str) -> str:
        """Return the root of a run's trainer."""
        return str(self.base_url / "trainers" / run_id)


def _found(objects: dict[str, T], key: str, what: str) -> T:
    if key not in objects:
        raise not_found(what, key)
    return objects[key]


def _check_length(field: str, asked: int | None, most: int | None) -> None:
    if asked is not None and most is not None and asked > most:
        raise invalid(field, f"must be at most {most}, the model's longest sequence; got {asked}")

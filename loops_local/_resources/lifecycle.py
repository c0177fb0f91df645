"""How sessions, runs and samplers are created and deactivated. Source: control-plane reference 3."""

from __future__ import annotations

import re
from typing import Final, Literal, TypeAlias, TypeVar

from msgspec import UNSET, UnsetType

from loops_async import types
from loops_async.errors import InputError
from loops_async.types import AvailabilityModel

from .._storage.records import CheckpointRecord, DeploymentRecord, Record, RunRecord, SamplerRecord, SessionRecord
from .._storage.store import Store
from .deployment import Deployment
from .registry import Registry, Sampler
from .run import Run

__all__ = ["LOCAL_RUN_ID", "Lifecycle"]

T = TypeVar("T")
RunRequest: TypeAlias = types.CreateRunRequest | types.CreateTrainerRequest

LOCAL_RUN_ID: Final = "local"
_LOCAL_RUN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NEVER: Final = 10**9
_SAMPLER_DELAY_SECONDS: Final = 3600


class Lifecycle:
    """Creates and deactivates objects: in memory without a pause between, then in the store in one transaction."""

    def __init__(self, registry: Registry, store: Store) -> None:
        self._registry = registry
        self._store = store

    async def create_session(self) -> SessionRecord:
        """Create a session."""
        session = SessionRecord()
        self._registry.add_session(session)
        await self._store.put(session)
        return session

    async def create_run(self, request: types.CreateRunRequest) -> Run:
        """Create a run with its sampler."""
        await self._check_run(request)
        prior = self._reusable_run(request)
        prior_sampler = None if prior is None else self._registry.find_sampler_of(prior.record.id)
        run, records = self._new_run(request, prior)
        records += self._new_sampler_of(run, None if prior_sampler is None else prior_sampler.deployment)
        await self._store.put(*records)
        return run

    async def create_trainer(self, request: types.CreateTrainerRequest) -> Run:
        """Create a run without a sampler."""
        if request.base_checkpoint not in (UNSET, None):
            raise InputError("base_checkpoint", "this service has none; ask for a base_model")
        await self._check_run(request)
        run, records = self._new_run(request, self._reusable_run(request))
        await self._store.put(*records)
        return run

    async def create_sampler(self, request: types.CreateSamplerRequest) -> Sampler:
        """Create a sampler of a checkpoint or of a base model; return that of a run, created if it is missing."""
        self._registry.session(request.session_id)
        if (run_id := _given(request.run_id)) is not None:
            return await self._sampler_of(self._registry.run(run_id), request)
        checkpoint = await self._checkpoint_of(request)
        base_model = self._base_model_of(request, checkpoint)
        host = self._registry.models.find(base_model)
        _check_length("max_seq_length", request.max_seq_length, host.max_seq_len)
        deployment = self._start_deployment(
            "sampler", base_model, _SAMPLER_DELAY_SECONDS, _given(request.availability_model)
        )
        record = SamplerRecord(
            session_id=request.session_id,
            base_model=base_model,
            deployment_id=deployment.record.id,
            model_path=request.model_path,
            checkpoint_id=None if checkpoint is None else checkpoint.id,
            max_seq_length=request.max_seq_length,
        )
        sampler = self._registry.add_sampler(record)
        if checkpoint is not None:
            await self._registry.checkpoints.pin(checkpoint, record.id)
        await self._store.put(deployment.record, record)
        return sampler

    async def deploy_checkpoints(self, request: types.DeployCheckpointsRequest) -> Deployment:
        """Create one deployment for sampler checkpoints of one base model, with a sampler for each."""
        checkpoints = [await self._registry.checkpoints.get(checkpoint_id) for checkpoint_id in request.checkpoint_ids]
        if any(checkpoint.target != "sampler" for checkpoint in checkpoints):
            raise InputError("checkpoint_ids", "must be checkpoints of sampler weights")
        if len({checkpoint.base_model for checkpoint in checkpoints}) > 1:
            raise InputError("checkpoint_ids", "must be of one base model")
        runs = [self._registry.any_run(checkpoint.run_id) for checkpoint in checkpoints]
        deployment = self._start_deployment("sampler", checkpoints[0].base_model, _SAMPLER_DELAY_SECONDS)
        samplers = [
            SamplerRecord(
                session_id=run.record.session_id,
                base_model=checkpoint.base_model,
                deployment_id=deployment.record.id,
                model_path=str(checkpoint.uri),
                checkpoint_id=checkpoint.id,
            )
            for run, checkpoint in zip(runs, checkpoints, strict=True)
        ]
        for sampler, checkpoint in zip(samplers, checkpoints, strict=True):
            self._registry.add_sampler(sampler)
            await self._registry.checkpoints.pin(checkpoint, sampler.id)
        await self._store.put(deployment.record, *samplers)
        return deployment

    async def get_or_create_local_run(self, run_id: str, base_model: str, lora_rank: int) -> Run:
        """Return the run of local mode with this id and base model; a new one replaces one of another model."""
        if not _LOCAL_RUN.fullmatch(run_id):
            raise InputError("run_id", f"must be 1 to 64 letters, digits, '_' or '-'; got {run_id!r}")
        known = self._registry.find_run(run_id)
        if known is not None and not known.record.local:
            raise InputError("run_id", f"{run_id!r} is not a run of local mode")
        if known is not None and known.record.base_model == base_model:
            return known
        self._registry.models.find(base_model)
        deployment = DeploymentRecord(
            kind="trainer", base_model=base_model, scale_down_delay_seconds=_NEVER, local=True
        )
        record = RunRecord(
            id=run_id,
            session_id=LOCAL_RUN_ID,
            base_model=base_model,
            lora_rank=lora_rank,
            deployment_id=deployment.id,
            local=True,
        )
        self._registry.add_deployment(deployment)
        run = self._registry.add_run(record)
        await self._store.put(deployment, record)
        return run

    async def deactivate_run(self, run: Run) -> None:
        """Deactivate a run, its sampler and the deployments of both."""
        run.deactivate()
        run.deployment.deactivate()
        records: list[Record] = [run.record, run.deployment.record]
        if (sampler := self._registry.find_sampler_of(run.record.id)) is not None:
            sampler.deployment.deactivate()
            records.append(sampler.deployment.record)
        await self._store.put(*records)
        await self._registry.checkpoints.unpin(run.record.id)

    async def deactivate_sampler(self, sampler: Sampler) -> None:
        """Deactivate a sampler that belongs to no run."""
        if sampler.run is not None:
            problem = f"this sampler belongs to run {sampler.run.record.id!r}; deactivate the run"
            raise InputError("sampler_id", problem)
        sampler.deployment.deactivate()
        await self._store.put(sampler.deployment.record)
        await self._registry.checkpoints.unpin(sampler.record.id)

    async def _check_run(self, request: RunRequest) -> None:
        self._registry.session(request.session_id)
        host = self._registry.models.find(request.base_model)
        _check_length("max_seq_len", request.max_seq_len, host.max_seq_len)
        if request.path is None:
            return
        checkpoint = await self._registry.checkpoints.argument(request.path, kind="weights", field="path")
        if checkpoint.base_model != request.base_model:
            problem = f"belongs to {checkpoint.base_model!r}; the run asks for {request.base_model!r}"
            raise InputError("path", problem)

    def _reusable_run(self, request: RunRequest) -> Run | None:
        """Return the run whose deployments the new run takes over, if any. Source: control-plane reference 3.2."""
        run_id, session_id = _given(request.reuse_from_run_id), request.reuse_from_session_id
        if request.replicas != 1 or run_id is session_id is None:
            return None
        return next((run for run in self._registry.runs() if self._is_reusable(run, request, run_id, session_id)), None)

    def _is_reusable(self, run: Run, request: RunRequest, run_id: str | None, session_id: str | None) -> bool:
        record = run.record
        named = record.id == run_id if run_id is not None else record.session_id == session_id
        sampler = self._registry.find_sampler_of(record.id)
        healthy = run.deployment.failure is None and (sampler is None or sampler.deployment.failure is None)
        return named and record.active and healthy and (record.base_model, record.replicas) == (request.base_model, 1)

    def _start_deployment(
        self,
        kind: Literal["trainer", "sampler"],
        base_model: str,
        scale_down_delay_seconds: int,
        availability_model: AvailabilityModel | None = None,
    ) -> Deployment:
        record = DeploymentRecord(
            kind=kind,
            base_model=base_model,
            scale_down_delay_seconds=scale_down_delay_seconds,
            availability_model=availability_model or AvailabilityModel.DEDICATED,
        )
        deployment = self._registry.add_deployment(record)
        deployment.start()
        return deployment

    def _new_run(self, request: RunRequest, prior: Run | None) -> tuple[Run, list[Record]]:
        """Create a run, on a new deployment or on that of `prior`; return it with the records to store."""
        if prior is None:
            deployment = self._start_deployment(
                "trainer",
                request.base_model,
                request.scale_down_delay_seconds,
                _given(request.availability_model),
            )
            changed: Record = deployment.record
        else:
            deployment = prior.deployment
            deployment.keep_active()
            prior.deactivate()
            changed = prior.record
        record = RunRecord(
            session_id=request.session_id,
            base_model=request.base_model,
            name=_given(request.name),
            lora_rank=request.lora_rank,
            max_seq_len=request.max_seq_len,
            seed=request.seed,
            replicas=request.replicas,
            path=request.path,
            deployment_id=deployment.record.id,
        )
        return self._registry.add_run(record), [changed, record]

    def _new_sampler_of(self, run: Run, reused: Deployment | None = None) -> list[Record]:
        """Create the sampler of a run; return the records to store."""
        records: list[Record] = []
        if reused is not None:
            deployment = reused
            deployment.keep_active()
        else:
            trainer = run.deployment.record
            deployment = self._start_deployment(
                "sampler", run.record.base_model, trainer.scale_down_delay_seconds, trainer.availability_model
            )
            records.append(deployment.record)
        record = SamplerRecord(
            session_id=run.record.session_id,
            base_model=run.record.base_model,
            deployment_id=deployment.record.id,
            run_id=run.record.id,
            max_seq_length=run.record.max_seq_len,
        )
        self._registry.add_sampler(record)
        return [*records, record]

    async def _sampler_of(self, run: Run, request: types.CreateSamplerRequest) -> Sampler:
        """Return the sampler of a run, created if it is missing. Source: control-plane reference 3.4."""
        record = run.record
        if request.model_path is not None:
            raise InputError("model_path", "a sampler of a run serves the run's weights; give run_id or model_path")
        if _given(request.base_model) not in (None, record.base_model):
            problem = f"run {record.id!r} trains {record.base_model!r}; got {request.base_model!r}"
            raise InputError("base_model", problem)
        own = run.deployment.record.availability_model
        if _given(request.availability_model) not in (None, own):
            problem = f"must be the run's, {own!r}; got {request.availability_model!r}"
            raise InputError("availability_model", problem)
        if not record.active:
            raise InputError("run_id", f"run {record.id!r} is not active")
        if (sampler := self._registry.find_sampler_of(record.id)) is None:
            records = self._new_sampler_of(run)
            sampler = self._registry.sampler(records[-1].id)
            await self._store.put(*records)
        return sampler

    async def _checkpoint_of(self, request: types.CreateSamplerRequest) -> CheckpointRecord | None:
        if request.model_path is None:
            return None
        return await self._registry.checkpoints.argument(request.model_path, kind="sampler_weights", field="model_path")

    def _base_model_of(self, request: types.CreateSamplerRequest, checkpoint: CheckpointRecord | None) -> str:
        """Return the base model of a sampler without a run: the one that is named, or the checkpoint's."""
        base_model = _given(request.base_model)
        if checkpoint is not None:
            if base_model not in (None, checkpoint.base_model):
                problem = f"the checkpoint was made with {checkpoint.base_model!r}; got {base_model!r}"
                raise InputError("base_model", problem)
            base_model = checkpoint.base_model
        if base_model is None:
            raise InputError("base_model", "is required without a run_id or model_path")
        return base_model


def _given(value: T | UnsetType | None) -> T | None:
    return None if isinstance(value, UnsetType) else value


def _check_length(field: str, length: int | None, maximum: int | None) -> None:
    if length is not None and maximum is not None and length > maximum:
        raise InputError(field, f"must be at most {maximum}, the model's longest sequence; got {length}")

"""How sessions, runs and samplers are made and switched off. Source: control-plane reference 3."""

from __future__ import annotations

import re
from typing import Final, TypeAlias, TypeVar

from msgspec import UNSET, UnsetType

from loops_async import types
from loops_async.errors import InputError
from loops_async.protocol import CheckpointUri

from .provisioning import Deployment
from .records import DeploymentRecord, Record, RunRecord, SamplerRecord, SessionRecord
from .registry import LiveSampler, Registry
from .runs import LiveRun
from .store import Store
from .web import HttpError, invalid

__all__ = ["LOCAL_RUN_ID", "Maker"]

T = TypeVar("T")
NewRun: TypeAlias = types.CreateRunRequest | types.CreateTrainerRequest

LOCAL_RUN_ID: Final = "local"
_LOCAL_RUN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NEVER: Final = 10**9
_SAMPLER_DELAY_SECONDS: Final = 3600


class Maker:
    """Makes objects: first in memory, in one go, then in the store, in one transaction."""

    def __init__(self, registry: Registry, store: Store) -> None:
        self._registry = registry
        self._store = store

    async def create_session(self) -> SessionRecord:
        """Make a session."""
        session = SessionRecord()
        self._registry.add_session(session)
        await self._store.put(session)
        return session

    async def create_run(self, request: types.CreateRunRequest) -> LiveRun:
        """Make a run with its sampler."""
        await self._check_run(request)
        prior = self._reusable(request)
        serving = None if prior is None else self._registry.paired(prior.record.id)
        run, records = self._new_run(request, prior)
        records += self._new_paired_sampler(run, None if serving is None else serving.deployment)
        await self._store.put(*records)
        return run

    async def create_trainer(self, request: types.CreateTrainerRequest) -> LiveRun:
        """Make a run without a sampler."""
        if request.base_checkpoint not in (UNSET, None):
            raise invalid("base_checkpoint", "this service has none; ask for a base_model")
        await self._check_run(request)
        run, records = self._new_run(request, self._reusable(request))
        await self._store.put(*records)
        return run

    async def create_sampler(self, request: types.CreateSamplerRequest) -> LiveSampler:
        """Make a sampler of a run, of a checkpoint, or of a base model; that of a run is made once."""
        self._registry.session(request.session_id)
        base_model = _value(request.base_model)
        if (run_id := _value(request.run_id)) is not None:
            return await self._pair(self._registry.run(run_id), request)
        if request.model_path is not None:
            checkpoint = await self._registry.sampler_checkpoint(request.model_path, field="model_path")
            if base_model not in (None, checkpoint.base_model):
                rule = f"the checkpoint was made with {checkpoint.base_model!r}; got {base_model!r}"
                raise invalid("base_model", rule)
            base_model = checkpoint.base_model
        if base_model is None:
            raise invalid("base_model", "is required without a run_id or model_path")
        host = self._registry.models.find(base_model)
        _check_length("max_seq_length", request.max_seq_length, host.max_seq_len)
        deployment = DeploymentRecord(
            kind="sampler",
            base_model=base_model,
            scale_down_delay_seconds=_SAMPLER_DELAY_SECONDS,
            availability_model=_value(request.availability_model) or "dedicated",
        )
        record = SamplerRecord(
            session_id=request.session_id,
            base_model=base_model,
            deployment_id=deployment.id,
            model_path=request.model_path,
            max_seq_length=request.max_seq_length,
        )
        self._registry.deploy(deployment).start()
        sampler = self._registry.add_sampler(record)
        await self._store.put(deployment, record)
        return sampler

    async def deploy_checkpoints(self, request: types.DeployCheckpointsRequest) -> Deployment:
        """Serve sampler checkpoints of one base model on one deployment, each with a sampler."""
        records = [await self._registry.checkpoints.get(checkpoint_id) for checkpoint_id in request.checkpoint_ids]
        if any(record.target != "sampler" for record in records):
            raise invalid("checkpoint_ids", "must be checkpoints of sampler weights")
        if len({record.base_model for record in records}) > 1:
            raise invalid("checkpoint_ids", "must be of one base model")
        deployment = DeploymentRecord(
            kind="sampler",
            base_model=records[0].base_model,
            scale_down_delay_seconds=_SAMPLER_DELAY_SECONDS,
        )
        samplers = [
            SamplerRecord(
                session_id=self._registry.any_run(record.run_id).record.session_id,
                base_model=record.base_model,
                deployment_id=deployment.id,
                model_path=str(record.uri),
            )
            for record in records
        ]
        live = self._registry.deploy(deployment)
        live.start()
        for sampler in samplers:
            self._registry.add_sampler(sampler)
        await self._store.put(deployment, *samplers)
        return live

    async def begin_local_run(self, run_id: str, base_model: str, lora_rank: int) -> LiveRun:
        """Return the local run of this id; make it when there is none, or only one of another model."""
        if not _LOCAL_RUN.fullmatch(run_id):
            raise invalid("run_id", f"must be 1 to 64 letters, digits, '_' or '-'; got {run_id!r}", status=422)
        known = self._registry.find_run(run_id)
        if known is not None and not known.record.local:
            raise invalid("run_id", f"{run_id!r} is not a run of local mode", status=422)
        if known is not None and known.record.base_model == base_model:
            return known
        self._registry.models.find(base_model, status=422)
        deployment = DeploymentRecord(
            kind="trainer", base_model=base_model, scale_down_delay_seconds=_NEVER, local=True
        )
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
        self._registry.deploy(deployment)
        live = self._registry.add_run(run)
        await self._store.put(deployment, run)
        return live

    async def stop_run(self, run: LiveRun) -> None:
        """Switch a run off, with its sampler and what both run on."""
        run.retire()
        run.deployment.stop()
        records: list[Record] = [run.record, run.deployment.record]
        if (sampler := self._registry.paired(run.record.id)) is not None:
            sampler.deployment.stop()
            records.append(sampler.deployment.record)
        await self._store.put(*records)

    async def stop_sampler(self, sampler: LiveSampler) -> None:
        """Switch off a sampler that belongs to no run."""
        if sampler.run is not None:
            raise invalid("sampler_id", f"this sampler belongs to run {sampler.run.record.id!r}; deactivate the run")
        sampler.deployment.stop()
        await self._store.put(sampler.deployment.record)

    async def _check_run(self, request: NewRun) -> None:
        self._registry.session(request.session_id)
        host = self._registry.models.find(request.base_model)
        _check_length("max_seq_len", request.max_seq_len, host.max_seq_len)
        if request.path is None:
            return
        try:
            checkpoint = await self._registry.checkpoints.at(CheckpointUri.parse(request.path, kind="weights"))
        except InputError as error:
            raise HttpError(400, "VALIDATION_ERROR", str(error), details={"field": "path"}) from error
        except HttpError as missing:
            raise invalid("path", str(missing)) from missing
        if checkpoint.base_model != request.base_model:
            raise invalid("path", f"belongs to {checkpoint.base_model!r}; the run asks for {request.base_model!r}")

    def _reusable(self, request: NewRun) -> LiveRun | None:
        """Return the run whose deployments the new one takes over, if there is one that can be.

        Source: control-plane reference 3.2.
        """
        run_id, session_id = _value(request.reuse_from_run_id), request.reuse_from_session_id
        if request.replicas != 1 or run_id is session_id is None:
            return None
        return next(
            (run for run in self._registry.runs() if self._can_be_reused(run, request, run_id, session_id)), None
        )

    def _can_be_reused(
        self,
        run: LiveRun,
        request: NewRun,
        run_id: str | None,
        session_id: str | None,
    ) -> bool:
        record = run.record
        named = record.id == run_id if run_id is not None else record.session_id == session_id
        sampler = self._registry.paired(record.id)
        healthy = run.deployment.failure is None and (sampler is None or sampler.deployment.failure is None)
        return named and record.active and healthy and (record.base_model, record.replicas) == (request.base_model, 1)

    def _new_run(self, request: NewRun, prior: LiveRun | None) -> tuple[LiveRun, list[Record]]:
        """Make a run, on a deployment of its own or instead of `prior`; return it with the records to store."""
        records: list[Record] = []
        if prior is None:
            own = DeploymentRecord(
                kind="trainer",
                base_model=request.base_model,
                scale_down_delay_seconds=request.scale_down_delay_seconds,
                availability_model=_value(request.availability_model) or "dedicated",
            )
            self._registry.deploy(own).start()
            records.append(own)
            deployment_id = own.id
        else:
            prior.deployment.wake()
            prior.retire()
            records.append(prior.record)
            deployment_id = prior.record.deployment_id
        run = RunRecord(
            session_id=request.session_id,
            base_model=request.base_model,
            name=_value(request.name),
            lora_rank=request.lora_rank,
            max_seq_len=request.max_seq_len,
            seed=request.seed,
            replicas=request.replicas,
            path=request.path,
            deployment_id=deployment_id,
        )
        return self._registry.add_run(run), [*records, run]

    def _new_paired_sampler(self, run: LiveRun, reused: Deployment | None = None) -> list[Record]:
        """Make the sampler of a run; return the records to store."""
        records: list[Record] = []
        if reused is not None:
            reused.wake()
            deployment_id = reused.record.id
        else:
            trainer = run.deployment.record
            own = DeploymentRecord(
                kind="sampler",
                base_model=run.record.base_model,
                scale_down_delay_seconds=trainer.scale_down_delay_seconds,
                availability_model=trainer.availability_model,
            )
            self._registry.deploy(own).start()
            records.append(own)
            deployment_id = own.id
        sampler = SamplerRecord(
            session_id=run.record.session_id,
            base_model=run.record.base_model,
            deployment_id=deployment_id,
            run_id=run.record.id,
            max_seq_length=run.record.max_seq_len,
        )
        self._registry.add_sampler(sampler)
        return [*records, sampler]

    async def _pair(self, run: LiveRun, request: types.CreateSamplerRequest) -> LiveSampler:
        """Return the sampler of a run, made when there is none. Source: control-plane reference 3.4."""
        record = run.record
        if request.model_path is not None:
            raise invalid("model_path", "a sampler of a run serves the run's weights; give run_id or model_path")
        if _value(request.base_model) not in (None, record.base_model):
            raise invalid("base_model", f"run {record.id!r} trains {record.base_model!r}; got {request.base_model!r}")
        own = run.deployment.record.availability_model
        if _value(request.availability_model) not in (None, own):
            raise invalid("availability_model", f"must be the run's, {own!r}; got {request.availability_model!r}")
        if not record.active:
            raise invalid("run_id", f"run {record.id!r} is not active any more")
        if (paired := self._registry.paired(record.id)) is None:
            records = self._new_paired_sampler(run)
            paired = self._registry.sampler(records[-1].id)
            await self._store.put(*records)
        return paired


def _value(given: T | UnsetType | None) -> T | None:
    return None if isinstance(given, UnsetType) else given


def _check_length(field: str, asked: int | None, most: int | None) -> None:
    if asked is not None and most is not None and asked > most:
        raise invalid(field, f"must be at most {most}, the model's longest sequence; got {asked}")

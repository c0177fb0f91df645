"""A run at work: its trainer, and the weights that its sampler serves."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET

from loops_async import protocol as wire
from loops_async.types import (
    AdamParams,
    ForwardBackwardOutput,
    InitTrainerServerResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)

from .checkpoints import Checkpoints, size_below
from .engine import Engine, RefusedError
from .engine.base import Adapter, Trainer
from .models import ModelHost
from .provisioning import Deployment
from .records import CheckpointRecord, CheckpointTargetName, LiveWeights, RunRecord, new_id, now
from .store import Store
from .web import deactivated

__all__ = ["LiveRun", "LostWeightsError"]

T = TypeVar("T")


class LostWeightsError(RuntimeError):
    """The service was killed, and this run's trainer held weights that were not saved."""


class LiveRun:
    """A run's trainer and published weights.

    The trainer is made when the first operation needs it and is touched in the training thread only. A clean close
    of the service puts it aside on disk; after a kill, operations fail until the run begins again or loads a
    checkpoint, for going on with other weights than the caller believes in would be worse.
    """

    def __init__(
        self,
        record: RunRecord,
        deployment: Deployment,
        *,
        store: Store,
        checkpoints: Checkpoints,
        data_dir: Path,
    ) -> None:
        self.record = record
        self.deployment = deployment
        self._store = store
        self._checkpoints = checkpoints
        self._data_dir = data_dir
        self._trainer: Trainer | None = None
        self._published = asyncio.Event()

    @property
    def host(self) -> ModelHost:
        """The base model's host."""
        return self.deployment.host

    @property
    def step(self) -> int:
        """Optimizer steps applied."""
        return self.record.step if self._trainer is None else self._trainer.step

    @property
    def live_version(self) -> int | None:
        """The version that is served; None while that is the base model."""
        return None if self.record.live is None else self.record.live.version

    async def live_weights(self, engine: Engine) -> tuple[Adapter | None, int]:
        """Return the weights that are served and their version; None and 0 are the base model."""
        while (live := self.record.live) is not None:
            try:
                return await self._checkpoints.adapter(self.record.id, live.checkpoint_id, engine), live.version
            except (OSError, RefusedError):
                # Reading takes a while, in which others may have been published and these removed.
                if self.record.live is live:
                    raise
        return None, 0

    async def wait_for_version(self, version: int, seconds: float) -> bool:
        """Wait until at least `version` is served; tell whether it is."""
        try:
            async with asyncio.timeout(seconds):
                while (self.live_version or 0) < version:
                    await self._published.wait()
        except TimeoutError:
            return False
        return True

    # Operations. Each returns the result that the wire shows.

    async def init_trainer_server(self, body: wire.InitTrainerServerBody) -> InitTrainerServerResponse:
        """Begin with a fresh adapter, or with the checkpoint that the run was created with."""
        start = await self._start_directory()

        def begin(engine: Engine) -> Trainer:
            trainer = engine.trainer(body.lora_rank, self.record.seed)
            if start is not None:
                trainer.load(start, optimizer=False)
            return trainer

        trainer = await self._replace_trainer(begin)
        return InitTrainerServerResponse(step=trainer.step, lora_rank=trainer.rank)

    async def forward(self, body: wire.ForwardBody, *, backward: bool) -> ForwardBackwardOutput:
        """Compute loss and logprobs; with `backward` gradients too."""
        config = body.loss_fn_config or {}
        return await self._train(
            lambda trainer: trainer.forward(
                body.data, body.loss_fn, config, backward=backward, top_k=body.top_k_logprobs
            ),
            changes=backward,
        )

    async def optim_step(self, params: AdamParams) -> OptimStepResponse:
        """Apply the gradients."""
        return OptimStepResponse(metrics=await self._train(lambda trainer: trainer.optim_step(params)))

    async def save_state(self, body: wire.SaveStateBody) -> SaveWeightsResponse:
        """Save weights, optimizer and step."""
        saved = await self._save(body.name, "trainer", body.ttl_seconds, lambda trainer, path: trainer.save(path))
        return SaveWeightsResponse(mode="lora", path=str(saved.uri))

    async def save_weights_for_sampler(self, body: wire.SaveWeightsForSamplerBody) -> SaveWeightsForSamplerResponse:
        """Save the adapter; unless it is only staged, the sampler serves it from now on."""
        copied: list[tuple[Adapter, int]] = []

        def save(trainer: Trainer, path: Path) -> None:
            adapter = trainer.adapter()
            adapter.save(path)
            copied.append((adapter, trainer.step))

        ttl = None if body.ttl_seconds is UNSET else body.ttl_seconds
        saved = await self._save(body.name, "sampler", ttl, save)
        adapter, version = copied[0]
        if body.bump_version:
            await self._publish(saved, adapter, version)
        return SaveWeightsForSamplerResponse(version=version, path=str(saved.uri))

    async def load_state(self, path: str, *, optimizer: bool) -> LoadWeightsResponse:
        """Continue from a checkpoint."""
        directory = await self._readable_directory(path)

        def load(engine: Engine) -> Trainer:
            trainer = engine.trainer(self.record.lora_rank, self.record.seed)
            trainer.load(directory, optimizer=optimizer)
            return trainer

        trainer = await self._replace_trainer(load)
        return LoadWeightsResponse(step=trainer.step)

    def retire(self) -> None:
        """End: another run takes its place, or it was switched off. What was not saved is gone."""
        self.record.active = False
        self.record.unsaved = False
        self._trainer = None

    def check(self) -> None:
        """Refuse a request that this run cannot take now."""
        if not self.record.active:
            raise deactivated("run")
        self.deployment.check()

    async def put_aside(self) -> None:
        """Save the trainer, so that a service started later goes on with it. Gradients not yet applied are lost."""
        trainer = self._trainer
        if trainer is None or not self.record.unsaved:
            return
        await self.host.in_training_thread(_save_into, trainer, self._aside)
        self.record.step = trainer.step
        self.record.unsaved = False
        await self._store.put(self.record)

    # How operations reach the trainer.

    @property
    def _aside(self) -> Path:
        return self._data_dir / "trainers" / self.record.id

    async def _train(self, work: Callable[[Trainer], T], *, changes: bool = True) -> T:
        """Do `work` with the trainer in the training thread."""
        engine = await self._engine()
        start = None if self._trainer else await self._start_directory()
        with self.deployment.in_use():
            if self._trainer is None:
                self._trainer = await self.host.in_training_thread(self._resume, engine, start)
            if changes:
                await self._mark_unsaved()
            return await self.host.in_training_thread(work, self._trainer)

    async def _engine(self) -> Engine:
        engine = await self.deployment.risen()
        if not self.record.active:
            raise deactivated("run")
        return engine

    async def _replace_trainer(self, make: Callable[[Engine], Trainer]) -> Trainer:
        engine = await self._engine()
        with self.deployment.in_use():
            self._trainer = await self.host.in_training_thread(make, engine)
            await self._mark_unsaved()
            return self._trainer

    def _resume(self, engine: Engine, start: Path | None) -> Trainer:
        if self.record.unsaved:
            raise LostWeightsError(
                "the service was killed and this run's unsaved weights are lost; load_state a checkpoint, "
                "or init_trainer_server to begin again"
            )
        trainer = engine.trainer(self.record.lora_rank, self.record.seed)
        if self._aside.is_dir():
            trainer.load(self._aside, optimizer=True)
        elif start is not None:
            trainer.load(start, optimizer=False)
        return trainer

    async def _mark_unsaved(self) -> None:
        """Note, before it happens, that the trainer is about to hold what the disk does not."""
        if not self.record.unsaved:
            self.record.unsaved = True
            await self._store.put(self.record)
            await asyncio.to_thread(shutil.rmtree, self._aside, ignore_errors=True)

    async def _save(
        self,
        name: str,
        target: CheckpointTargetName,
        ttl_seconds: int | None,
        write: Callable[[Trainer, Path], Any],
    ) -> CheckpointRecord:
        checkpoint_id = new_id()
        directory = self._checkpoints.draft(self.record.id, checkpoint_id)

        def save(trainer: Trainer) -> tuple[int, int, list[str]]:
            directory.mkdir(parents=True)
            try:
                write(trainer, directory)
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise
            return trainer.rank, size_below(directory), _targets(directory)

        rank, size_bytes, targets = await self._train(save, changes=False)
        record = CheckpointRecord(
            id=checkpoint_id,
            run_id=self.record.id,
            name=name,
            target=target,
            base_model=self.record.base_model,
            rank=rank,
            targets=targets,
            size_bytes=size_bytes,
            local=self.record.local,
            expires_at=None if ttl_seconds is None else now() + timedelta(seconds=ttl_seconds),
        )
        await self._checkpoints.add(record)
        return record

    async def _publish(self, saved: CheckpointRecord, adapter: Adapter, version: int) -> None:
        await self._checkpoints.serve(self.record.id, saved.id, adapter)
        self.record.live = LiveWeights(version=version, checkpoint_id=saved.id, name=saved.name)
        await self._store.put(self.record)
        self.deployment.log.write("INFO", f"the sampler serves version {version} now, {saved.name!r}")
        published, self._published = self._published, asyncio.Event()
        published.set()

    async def _start_directory(self) -> Path | None:
        return None if self.record.path is None else await self._readable_directory(self.record.path)

    async def _readable_directory(self, path: str) -> Path:
        return await self._checkpoints.readable(path, base_model=self.record.base_model, local=self.record.local)


def _save_into(trainer: Trainer, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    trainer.save(directory)


def _targets(directory: Path) -> list[str]:
    """Return the modules that an adapter changes, from its file in PEFT's format."""
    return sorted(msgspec.json.decode((directory / "adapter_config.json").read_bytes())["target_modules"])

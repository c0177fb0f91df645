"""A run: its trainer, and the weights that its sampler serves."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Struct

from loops_async import protocol as wire
from loops_async.types import (
    ForwardBackwardOutput,
    InitTrainerServerResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)

from .._errors import deactivated
from .._execution.models import ModelHost
from .._storage.checkpoints import Checkpoints, total_size
from .._storage.private import make_private_directory, make_tree_private
from .._storage.records import CheckpointRecord, CheckpointTargetName, PublishedWeights, RunRecord, new_id, now
from .._storage.store import Store
from ..engine import Engine
from ..engine.base import Adapter, Trainer
from ..engine.checks import check_batch
from .deployment import Deployment
from .history import RunHistory

__all__ = ["BASE_WEIGHTS", "LostWeightsError", "Run", "Weights"]

T = TypeVar("T")


class LostWeightsError(RuntimeError):
    """The service was killed while this run's trainer held weights that were not on disk."""


class Weights(Struct, frozen=True):
    """Weights to sample from and their version, as one value; `version` is None for those of a checkpoint."""

    adapter: Adapter | None
    version: int | None


BASE_WEIGHTS: Final = Weights(None, 0)
"""Those of the base model."""


class Run:
    """A run's trainer and published weights.

    The trainer is created for the first operation, and used in the training thread only. Closing the service saves a
    snapshot of it. If the service is killed instead, operations fail until the caller initializes the trainer again or
    loads a checkpoint: to continue silently from older weights would be worse.
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
        self.history = RunHistory()
        self._store = store
        self._checkpoints = checkpoints
        self._snapshot = data_dir / "trainers" / record.id
        self._trainer: Trainer | None = None
        self._weights: Weights | None = None
        self._published = asyncio.Event()

    @property
    def host(self) -> ModelHost:
        """The base model's host."""
        return self.deployment.host

    @property
    def step(self) -> int:
        """The number of optimizer steps."""
        return self.record.step if self._trainer is None else self._trainer.step

    @property
    def published_version(self) -> int | None:
        """The version that the sampler serves; None while it serves the base model."""
        return None if self.record.live is None else self.record.live.version

    async def weights(self, engine: Engine) -> Weights:
        """Return the weights that the sampler serves; the first call after a restart of the service reads them."""
        if self._weights is not None:
            return self._weights
        weights = await self._read_weights(engine)
        if self._weights is None and self.record.active:
            self._weights = weights
        return self._weights or weights  # others may have been published meanwhile

    async def _read_weights(self, engine: Engine) -> Weights:
        if (live := self.record.live) is None:
            return BASE_WEIGHTS
        return Weights(await self._checkpoints.adapter(self.record.id, live.checkpoint_id, engine), live.version)

    async def wait_for_version(self, version: int, seconds: float) -> None:
        """Wait until the sampler serves `version` or a newer one, at most so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while (self.published_version or 0) < version:
                    await self._published.wait()

    # Operations. Each returns the result that the wire shows.

    async def init_trainer_server(self, body: wire.InitTrainerServerBody) -> InitTrainerServerResponse:
        """Start with a fresh adapter, or with the checkpoint that the run was created from."""
        async with self._start_directory() as start:

            def create(engine: Engine) -> Trainer:
                trainer = engine.trainer(body.lora_rank, self.record.seed)
                if start is not None:
                    trainer.load(start, optimizer=False)
                return trainer

            trainer = await self._replace_trainer(create)
        return InitTrainerServerResponse(step=trainer.step, lora_rank=trainer.rank)

    async def forward(self, body: wire.ForwardBody, *, backward: bool) -> ForwardBackwardOutput:
        """Compute loss and logprobs; with `backward` gradients too."""
        config = body.loss_fn_config or {}

        def compute(trainer: Trainer) -> ForwardBackwardOutput:
            check_batch(body.data, body.loss_fn, config)  # here, since a large batch would hold the event loop
            return trainer.forward(body.data, body.loss_fn, config, backward=backward, top_k=body.top_k_logprobs)

        output = await self._train(compute, changes=backward)
        if backward:
            self.history.passed(output, len(body.data))
        return output

    async def optim_step(self, body: wire.OptimStepBody) -> OptimStepResponse:
        """Apply the gradients."""
        metrics = await self._train(lambda trainer: trainer.optim_step(body.adam_params))
        self.history.stepped(self.step, metrics)
        return OptimStepResponse(metrics=metrics)

    async def save_state(self, body: wire.SaveStateBody) -> SaveWeightsResponse:
        """Save weights, optimizer and step."""
        saved = await self._write(body.name, "trainer", body.ttl_seconds, lambda trainer, path: trainer.save(path))
        await self._checkpoints.add(saved)
        return SaveWeightsResponse(mode="lora", path=str(saved.uri))

    async def save_weights_for_sampler(self, body: wire.SaveWeightsForSamplerBody) -> SaveWeightsForSamplerResponse:
        """Save the adapter; with `bump_version` the sampler serves it from then on."""
        copied: list[tuple[Adapter, int]] = []

        def save(trainer: Trainer, path: Path) -> None:
            adapter = trainer.adapter()
            adapter.save(path)
            copied.append((adapter, trainer.step))

        ttl = None if body.ttl_seconds is UNSET else body.ttl_seconds
        saved = await self._write(body.name, "sampler", ttl, save)
        adapter, version = copied[0]
        if body.bump_version:
            await self._publish(saved, adapter, version)
        else:
            await self._checkpoints.add(saved, adapter=adapter)
        return SaveWeightsForSamplerResponse(version=version, path=str(saved.uri))

    async def load_state(self, body: wire.LoadStateBody, *, optimizer: bool) -> LoadWeightsResponse:
        """Continue from a checkpoint."""
        async with self._loadable(body.path) as directory:

            def load(engine: Engine) -> Trainer:
                trainer = engine.trainer(self.record.lora_rank, self.record.seed)
                trainer.load(directory, optimizer=optimizer)
                return trainer

            trainer = await self._replace_trainer(load)
        return LoadWeightsResponse(step=trainer.step)

    def deactivate(self) -> None:
        """End the run, also when another one takes over its deployment. Weights that were not saved are lost."""
        self.record.active = False
        self.record.unsaved = False
        self._trainer = None
        self._weights = None

    def check(self) -> None:
        """Refuse a request that this run cannot execute now."""
        if not self.record.active:
            raise deactivated("run")
        self.deployment.check()

    async def save_snapshot(self) -> None:
        """Save the trainer and its gradients, so that the next start of the service continues with it."""
        trainer = self._trainer
        if trainer is None or not self.record.unsaved:
            return
        await self.host.run_in_training_thread(_save_into, trainer, self._snapshot)
        self.record.step = trainer.step
        self.record.unsaved = False
        await self._store.put(self.record)

    # How operations use the trainer.

    async def _train(self, work: Callable[[Trainer], T], *, changes: bool = True) -> T:
        """Run `work` with the trainer in the training thread; `changes` says whether it changes the trainer."""
        engine = await self._engine()
        self.history.used()
        with self.deployment.in_use():
            trainer = self._trainer
            if trainer is None:
                async with self._start_directory() as start:
                    trainer = self._trainer = await self.host.run_in_training_thread(self._restore, engine, start)
            if changes:
                await self._mark_unsaved()
            return await self.host.run_in_training_thread(work, trainer)

    async def _engine(self) -> Engine:
        engine = await self.deployment.active_engine()
        if not self.record.active:
            raise deactivated("run")
        return engine

    async def _replace_trainer(self, create: Callable[[Engine], Trainer]) -> Trainer:
        engine = await self._engine()
        self.history.used()
        with self.deployment.in_use():
            trainer = self._trainer = await self.host.run_in_training_thread(create, engine)
            await self._mark_unsaved()
            self.history.returned(trainer.step)
            return trainer  # the run's own may be gone by now: it may have been deactivated meanwhile

    def _restore(self, engine: Engine, start: Path | None) -> Trainer:
        """Create the trainer from its snapshot, else from the checkpoint that the run was created from."""
        if self.record.unsaved:
            raise LostWeightsError(
                "the service was killed and this run's unsaved weights are lost; load_state a checkpoint, "
                "or init_trainer_server to begin again"
            )
        trainer = engine.trainer(self.record.lora_rank, self.record.seed)
        if self._snapshot.is_dir():
            trainer.load(self._snapshot, optimizer=True)
            trainer.load_gradients(self._snapshot)
        elif start is not None:
            trainer.load(start, optimizer=False)
        return trainer

    async def _mark_unsaved(self) -> None:
        """Record on disk, before it happens, that the trainer will hold weights that are not on disk."""
        if not self.record.unsaved:
            self.record.unsaved = True
            await self._store.put(self.record)
            await asyncio.to_thread(shutil.rmtree, self._snapshot, ignore_errors=True)

    async def _write(
        self,
        name: str,
        target: CheckpointTargetName,
        ttl_seconds: int | None,
        write: Callable[[Trainer, Path], Any],
    ) -> CheckpointRecord:
        """Write the files of a checkpoint, and return its record, which is not stored yet."""
        checkpoint_id = new_id()
        directory = self._checkpoints.path(self.record.id, checkpoint_id)

        def save(trainer: Trainer) -> tuple[int, int, list[str]]:
            make_private_directory(directory.parent)
            directory.mkdir()
            try:
                write(trainer, directory)
                make_tree_private(directory)
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise
            return trainer.rank, total_size(directory), _target_modules(directory)

        rank, size_bytes, targets = await self._train(save, changes=False)
        return CheckpointRecord(
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

    async def _publish(self, saved: CheckpointRecord, adapter: Adapter, version: int) -> None:
        """Serve these weights from now on, and add their checkpoint."""
        # Without a pause, so that every request gets the old weights and version, or the new ones.
        self._weights = Weights(adapter, version)
        self.record.live = PublishedWeights(version=version, checkpoint_id=saved.id, name=saved.name)
        published, self._published = self._published, asyncio.Event()
        published.set()
        self.history.published(version, saved.name)
        await self._checkpoints.add(saved, adapter=adapter, served_by=self.record)
        self.deployment.log.write("INFO", f"the sampler serves version {version} now, {saved.name!r}")

    @asynccontextmanager
    async def _start_directory(self) -> AsyncIterator[Path | None]:
        """Give the directory of the checkpoint that the run was created from, None if there was none."""
        if self.record.path is None:
            yield None
        else:
            async with self._loadable(self.record.path) as directory:
                yield directory

    def _loadable(self, path: str) -> AbstractAsyncContextManager[Path]:
        return self._checkpoints.loadable(path, base_model=self.record.base_model, local=self.record.local)


def _save_into(trainer: Trainer, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    trainer.save(directory)
    trainer.save_gradients(directory)
    make_tree_private(directory)


def _target_modules(directory: Path) -> list[str]:
    """Return the modules that an adapter changes, from its file in PEFT's format."""
    return sorted(msgspec.json.decode((directory / "adapter_config.json").read_bytes())["target_modules"])

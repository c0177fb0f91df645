"""The base models that the service can load, each loaded once and shared by all trainers and samplers."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from loops_async._tasks import SingleFlight, TaskOwner
from loops_async.errors import InputError

from .._storage.private import make_tree_private
from ..engine import Engine, EngineFactory
from ..engine.base import Sampler, SamplerUsage

__all__ = ["ModelHost", "Models"]

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("loops_local.provisioning")


class ModelHost:
    """One base model: its engine, its training thread, its sampler and its tokenizer's files."""

    def __init__(
        self, name: str, factory: EngineFactory, tokenizer_dir: Path, owner: TaskOwner, known_length: int | None
    ) -> None:
        self.name = name
        self._factory = factory
        self._known_length = known_length
        self._tokenizer_dir = tokenizer_dir
        self._training_thread = ThreadPoolExecutor(1, f"loops-train-{name}")
        self._engines: SingleFlight[str, Engine] = SingleFlight(owner)
        self._samplers: SingleFlight[str, Sampler] = SingleFlight(owner)
        self._tokenizers: SingleFlight[str, Path] = SingleFlight(owner)

    def load(self) -> asyncio.Task[Engine]:
        """Start to load the engine, unless it is loaded or being loaded; a failed load is tried again."""
        return self._engines.start(self.name, self._load)

    async def _load(self) -> Engine:
        logger.info("loading %s", self.name)
        engine = await self.run_in_training_thread(self._factory, self.name)
        logger.info("loaded %s", self.name)
        return engine

    @property
    def is_loaded(self) -> bool:
        """Whether the engine is there."""
        return self._engines.peek(self.name) is not None

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence in tokens; None while it is not known."""
        engine = self._engines.peek(self.name)
        return self._known_length if engine is None else engine.model.max_seq_len

    async def engine(self) -> Engine:
        """Return the engine; the first call loads it."""
        return await self._engines.get(self.name, self._load)

    async def sampler(self) -> Sampler:
        """Return the sampler; the first call starts it."""
        return await self._samplers.get(self.name, self._start_sampler)

    async def _start_sampler(self) -> Sampler:
        return (await self.engine()).sampler()

    @property
    def usage(self) -> SamplerUsage:
        """What the sampler holds and has done: nothing before it is started."""
        sampler = self._samplers.peek(self.name)
        return SamplerUsage() if sampler is None else sampler.usage

    async def tokenizer(self) -> Path:
        """Return the directory of the tokenizer's files; the first call writes them."""
        return await self._tokenizers.get(self.name, self._write_tokenizer)

    async def _write_tokenizer(self) -> Path:
        engine = await self.engine()
        await asyncio.to_thread(_write_tokenizer, engine, self._tokenizer_dir)
        return self._tokenizer_dir

    def run_in_training_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run `work` in the only thread that trains, after everything that was submitted earlier."""
        return asyncio.wrap_future(self._training_thread.submit(work, *args, **kwargs))

    async def close(self) -> None:
        """Finish the running work and end the threads."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._training_thread.shutdown(cancel_futures=True)
        if (sampler := self._samplers.peek(self.name)) is not None:
            sampler.close()


def _write_tokenizer(engine: Engine, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    engine.write_tokenizer(directory)
    make_tree_private(directory)


class Models:
    """The base models by name.

    Args:
        factory: loads an engine.
        names: the models on offer; None offers every name, as the echo engine does.
        default: the model of local mode where a request names none.
        directory: where the tokenizers' files are written.
        owner: owns the tasks that load; it is closed before this.
        known_length: the longest sequence of every model, if it is known before a model is loaded.
    """

    def __init__(
        self,
        factory: EngineFactory,
        names: Sequence[str] | None,
        default: str,
        directory: Path,
        owner: TaskOwner,
        known_length: int | None = None,
    ) -> None:
        self._factory = factory
        self._directory = directory
        self._owner = owner
        self._known_length = known_length
        self._hosts: dict[str, ModelHost] = {}
        self.names = names
        self.default = default

    @property
    def hosts(self) -> list[ModelHost]:
        """The models on offer, and others that requests have named."""
        for name in self.names or (self.default,):
            self.host(name)
        return list(self._hosts.values())

    def offers(self, name: str) -> bool:
        """Return whether a model is on offer."""
        return self.names is None or name in self.names

    def find(self, name: str) -> ModelHost:
        """Return the host of the base model that a request names.

        Raises:
            InputError: it is not on offer.
        """
        if not name.isprintable():
            raise InputError("base_model", f"must be printable; got {name!r}")
        if not self.offers(name):
            raise InputError("base_model", f"this service has {', '.join(self.names or ())}; got {name!r}")
        return self.host(name)

    def host(self, name: str) -> ModelHost:
        """Return the host of a model, also of one that is not on offer now: a stored run may need it."""
        if name not in self._hosts:
            # Numbered, since a model's name may be a path.
            directory = self._directory / str(len(self._hosts))
            self._hosts[name] = ModelHost(name, self._factory, directory, self._owner, self._known_length)
        return self._hosts[name]

    async def close(self) -> None:
        """Close every model."""
        await asyncio.gather(*(host.close() for host in self._hosts.values()))

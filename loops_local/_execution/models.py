"""The base models that the service can load, each loaded once and shared by everything that uses it."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from .engine import Engine, EngineFactory
from .engine.base import Sampler
from .web import invalid

__all__ = ["ModelHost", "Models"]

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)


class ModelHost:
    """One base model: its engine, its training thread and its sampler."""

    def __init__(self, name: str, factory: EngineFactory, tokenizer_dir: Path) -> None:
        self.name = name
        self._factory = factory
        self._tokenizer_dir = tokenizer_dir
        self._thread = ThreadPoolExecutor(1, f"loops-train-{name}")
        self._loading: asyncio.Future[Engine] | None = None
        self._writing: asyncio.Future[Path] | None = None
        self._sampler: Sampler | None = None

    def load(self) -> asyncio.Future[Engine]:
        """Begin to load the engine, unless it is loaded or being loaded; a failed load is tried again."""
        if self._loading is None or (self._loading.done() and self._loading.exception()):
            logger.info("loading %s", self.name)
            self._loading = self.in_training_thread(self._factory, self.name)
            self._loading.add_done_callback(self._log_loaded)
        return self._loading

    def _log_loaded(self, loading: asyncio.Future[Engine]) -> None:
        # A failure is told to whoever waits for the model.
        if not loading.cancelled() and loading.exception() is None:
            logger.info("loaded %s", self.name)

    @property
    def loaded(self) -> Engine | None:
        """The engine, when it is loaded."""
        loading = self._loading
        if loading is None or not loading.done() or loading.cancelled() or loading.exception():
            return None
        return loading.result()

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence in tokens; None while the engine is not loaded."""
        return self.loaded.model.max_seq_len if self.loaded else None

    async def engine(self) -> Engine:
        """Return the engine, loading it when necessary."""
        return await asyncio.shield(self.load())

    async def sampler(self) -> Sampler:
        """Return the sampler, started when it is first asked for."""
        engine = await self.engine()
        if self._sampler is None:
            self._sampler = engine.sampler()
        return self._sampler

    async def tokenizer(self) -> Path:
        """Return the directory of the tokenizer's files."""
        await self.engine()
        if self._writing is None:
            self._writing = asyncio.ensure_future(asyncio.to_thread(self._write_tokenizer))
        return await asyncio.shield(self._writing)

    def _write_tokenizer(self) -> Path:
        if self.loaded is None:
            raise RuntimeError(f"{self.name} is not loaded")
        shutil.rmtree(self._tokenizer_dir, ignore_errors=True)
        self._tokenizer_dir.mkdir(parents=True)
        self.loaded.write_tokenizer(self._tokenizer_dir)
        return self._tokenizer_dir

    def in_training_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run `work` in the one thread that trains, behind what it is doing."""
        return asyncio.wrap_future(self._thread.submit(work, *args, **kwargs))

    async def close(self) -> None:
        """Finish the work under way and end the threads."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._sampler is not None:
            self._sampler.close()


class Models:
    """The models by name. `names` are those on offer; None offers any name, as the echo engine does."""

    def __init__(self, factory: EngineFactory, names: Sequence[str] | None, default: str, directory: Path) -> None:
        self._factory = factory
        self._directory = directory
        self._hosts: dict[str, ModelHost] = {}
        self.names = names
        self.default = default

    @property
    def hosts(self) -> list[ModelHost]:
        """The models on offer, and those that were asked for by a name of their own."""
        for name in self.names or (self.default,):
            self.host(name)
        return list(self._hosts.values())

    def offers(self, name: str) -> bool:
        """Tell whether a model is on offer."""
        return self.names is None or name in self.names

    def find(self, name: str, *, status: int = 400) -> ModelHost:
        """Return the host of a model that a request names, refusing a model that is not on offer."""
        if not self.offers(name):
            raise invalid("base_model", f"this service has {', '.join(self.names or ())}; got {name!r}", status=status)
        return self.host(name)

    def host(self, name: str) -> ModelHost:
        """Return the host of a model, whether it is on offer (still) or not."""
        if name not in self._hosts:
            # Numbered, since a model's name may be a path.
            directory = self._directory / str(len(self._hosts))
            self._hosts[name] = ModelHost(name, self._factory, directory)
        return self._hosts[name]

    async def close(self) -> None:
        """Close every model."""
        await asyncio.gather(*(host.close() for host in self._hosts.values()))

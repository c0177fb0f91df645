"""The service as an object with a beginning and an end."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from yarl import URL

from .account import Account
from .app import build_app
from .checkpoint_routes import CheckpointRoutes
from .checkpoints import Checkpoints
from .control_plane import ControlPlane
from .deployment_routes import DeploymentRoutes
from .engine import EngineFactory, load_engine
from .faults import Faults
from .files import Files
from .journal import Journal
from .making import Maker
from .meter import Machine
from .models import Models
from .operations import Operations
from .queue_routes import QueueRoutes
from .registry import Registry
from .sample_queue import SampleQueue
from .sampler_routes import LOCAL_SAMPLER, SamplerRoutes
from .signing import UrlSigner
from .store import Store
from .trainer_routes import LOCAL_TRAINER, TrainerRoutes
from .views import Views

__all__ = ["DEFAULT_MODELS", "LocalService", "serve_in_thread"]

logger = logging.getLogger(__name__)

DEFAULT_MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny")
"""What the torch engine offers unless told otherwise; the first is the default."""

_ECHO_MODEL = "echo"
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - a table of names, not a bind
_CLOSE_SECONDS = 2.0
_NOT_RUNNING = "the service is not running; enter it first"


class LocalService:
    """The whole service on this machine: control plane, trainers, samplers, checkpoints.

    Args:
        engine: ``"torch"`` trains and samples for real; ``"echo"`` does neither and needs no torch; or a function
            from a model's name to an engine.
        model: the only base model on offer (with ``"echo"``: the default one).
        models: the base models on offer, instead of `model`; the first is the default of local mode.
        data_dir: where state is kept. None is a temporary directory that is removed at the end.
        cache_dir: where downloaded and converted models are kept; None is the user's cache directory.
        host: the address to listen on. Local mode, which needs no key, answers callers on this machine only.
        port: the port; 0 takes a free one.
        api_key: the key that callers need; None makes one up, and keeps it in `data_dir` where one is given.
        serverless: show the control plane's runs and samplers in their serverless form: without deployments, and
            with samplers that take samples into a queue. What runs them is the same.
        provisioning_seconds: how long a trainer or sampler takes to come up, beside the loading of its model.
        poll_hold_seconds: how long a poll of an operation is held before it answers 408.
        version_wait_seconds: how long a sampler waits for a version before it answers 408.
        result_retention_seconds: how long the answer of an operation is kept.
        file_url_seconds: how long a URL of a checkpoint file is good.

    Raises, on entry:
        StoreLockedError: another service uses `data_dir`.
        OSError: the port is taken, or `data_dir` cannot be written.

    Example:
        >>> import asyncio, loops_local
        >>> async def main():
        ...     async with loops_local.LocalService(engine="echo") as local:
        ...         return local.base_url.startswith("http://127.0.0.1:")
        >>> asyncio.run(main())
        True
    """

    def __init__(
        self,
        *,
        engine: str | EngineFactory = "torch",
        model: str | None = None,
        models: Sequence[str] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        serverless: bool = False,
        provisioning_seconds: float = 0.5,
        poll_hold_seconds: float = 30.0,
        version_wait_seconds: float = 10.0,
        result_retention_seconds: float = 3600.0,
        file_url_seconds: float = 900.0,
    ) -> None:
        self.faults = Faults()
        self._engine = engine
        self._cache_dir = _default_cache_dir() if cache_dir is None else Path(cache_dir)
        self._names, self._default_model = _models_on_offer(engine, model, models)
        self._given_dir = None if data_dir is None else Path(data_dir)
        self._host = host
        self._port = port
        self._api_key = api_key
        self._serverless = serverless
        self._provisioning_seconds = provisioning_seconds
        self._poll_hold_seconds = poll_hold_seconds
        self._version_wait_seconds = version_wait_seconds
        self._result_retention_seconds = result_retention_seconds
        self._file_url_seconds = file_url_seconds
        self._url: URL | None = None
        self._data_dir: Path | None = None
        self._models: Models | None = None
        self._stack = AsyncExitStack()

    def __repr__(self) -> str:
        where = "not running" if self._url is None else f"at {self._url}"
        return f"<LocalService {where}, engine {self.engine!r}>"

    @property
    def engine(self) -> str:
        """The kind of engine."""
        return self._engine if isinstance(self._engine, str) else "custom"

    @property
    def models(self) -> Sequence[str]:
        """The base models on offer; the echo engine takes any other name, too."""
        return self._names or (self._default_model,)

    @property
    def base_url(self) -> str:
        """The URL of the control plane."""
        return str(self._running_url).rstrip("/")

    @property
    def trainer_url(self) -> str:
        """The trainer of local mode, for `ServiceClient.local`."""
        return self.base_url + LOCAL_TRAINER

    @property
    def sampler_url(self) -> str:
        """The sampler of local mode, for `ServiceClient.local`."""
        return self.base_url + LOCAL_SAMPLER

    @property
    def api_key(self) -> str:
        """The key that callers need."""
        if self._api_key is None:
            raise RuntimeError(_NOT_RUNNING)
        return self._api_key

    @property
    def data_dir(self) -> Path:
        """Where state is kept."""
        if self._data_dir is None:
            raise RuntimeError(_NOT_RUNNING)
        return self._data_dir

    async def load(self) -> None:
        """Load the default model now, rather than with the first run that uses it.

        Raises:
            RefusedError: it cannot be loaded.
            ImportError: the engine's packages are missing.
        """
        if self._models is None:
            raise RuntimeError(_NOT_RUNNING)
        await self._models.host(self._default_model).engine()

    @property
    def _running_url(self) -> URL:
        if self._url is None:
            raise RuntimeError(_NOT_RUNNING)
        return self._url

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._url = None
        await self._stack.aclose()

    async def _open(self) -> None:
        """Start each part; the stack closes them in the opposite order."""
        close = self._stack.push_async_callback
        data_dir = self._data_dir = await asyncio.to_thread(self._prepare_data_dir)
        if self._given_dir is None:
            close(asyncio.to_thread, shutil.rmtree, data_dir, ignore_errors=True)
        store = Store(data_dir / "store.sqlite3")
        await store.open()
        close(store.close)
        self._api_key = self._api_key or await asyncio.to_thread(_kept_key, data_dir / "api_key")
        models = self._models = Models(self._load_engine, self._names, self._default_model, data_dir / "tokenizers")
        close(models.close)
        journal = Journal(store)
        await journal.open()
        checkpoints = Checkpoints(store, data_dir / "checkpoints")
        registry = Registry(
            store,
            models,
            checkpoints,
            journal,
            data_dir=data_dir,
            provisioning_seconds=self._provisioning_seconds,
        )
        await registry.open()
        if self._given_dir is not None:
            close(registry.close)
        operations = Operations(store, retention_seconds=self._result_retention_seconds)
        await operations.open()
        account = Account(store)
        await account.open()
        maker = Maker(registry, store)
        views = Views(registry, serverless=self._serverless)
        machine = Machine()
        signer = UrlSigner(await store.secret("file_urls"), valid_seconds=self._file_url_seconds)
        files = Files(checkpoints, signer, data_dir / "archives")
        samplers = SamplerRoutes(registry, version_wait_seconds=self._version_wait_seconds)
        queue = SampleQueue(retention_seconds=self._result_retention_seconds)
        routes = [
            *ControlPlane(registry, maker, views, account).routes(),
            *CheckpointRoutes(registry, maker, files).routes(),
            *DeploymentRoutes(registry, maker, views, journal, machine, files).routes(),
            *account.routes(),
            *files.routes(),
            *TrainerRoutes(
                registry, maker, operations, hold_seconds=self._poll_hold_seconds, serverless=self._serverless
            ).routes(),
            *samplers.routes(),
            *QueueRoutes(registry, samplers, queue, hold_seconds=self._poll_hold_seconds).routes(),
        ]
        app = build_app(routes, registry=registry, api_key=self.api_key, faults=self.faults, machine=machine)
        views.base_url = self._url = await self._listen(app)
        # First of all, while the server still runs, so that those who poll hear how it ends.
        close(operations.close)
        close(queue.close)

    async def _listen(self, app: web.Application) -> URL:
        # Handlers are cancelled when their caller goes away, which gives an abandoned sample's place to others.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=_CLOSE_SECONDS)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, self._host, self._port, backlog=4096).start()
        port = runner.addresses[0][1]
        return URL.build(scheme="http", host=_ANY_ADDRESS.get(self._host, self._host), port=port)

    def _prepare_data_dir(self) -> Path:
        if self._given_dir is None:
            return Path(tempfile.mkdtemp(prefix="loops-local-"))
        self._given_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._given_dir.resolve()

    def _load_engine(self, model: str) -> Any:
        if isinstance(self._engine, str):
            return load_engine(self._engine, model, cache_dir=self._cache_dir)
        return self._engine(model)


def _models_on_offer(
    engine: str | EngineFactory, model: str | None, models: Sequence[str] | None
) -> tuple[Sequence[str] | None, str]:
    """Return the names on offer (None for any) and the default one."""
    if model is not None and models is not None:
        raise ValueError("give model or models, not both")
    names = [model] if model is not None else list(models or ())
    if models is not None and not names:
        raise ValueError("models must name at least one model")
    if engine == "torch":
        names = names or list(DEFAULT_MODELS)
        return names, names[0]
    if engine == "echo":
        return (names if models is not None else None), (names[0] if names else _ECHO_MODEL)
    if isinstance(engine, str):
        raise ValueError(f"engine must be 'torch', 'echo' or a function; got {engine!r}")
    return (names or None), (names[0] if names else "custom")


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loops-async"


def _kept_key(path: Path) -> str:
    """Return the key that the data directory keeps, made up at the first start; only the owner can read it."""
    path.touch(mode=0o600)
    key = path.read_text().strip()
    if not key:
        key = secrets.token_urlsafe(24)
        path.write_text(key)
    return key


@contextmanager
def serve_in_thread(**options: Any) -> Iterator[LocalService]:
    """Run a `LocalService` in a thread of its own, for blocking scripts and tests; `options` are its arguments."""
    started: Future[LocalService] = Future()
    stop: Future[Callable[[], object]] = Future()

    async def serve() -> None:
        stopping = asyncio.Event()
        stop.set_result(partial(asyncio.get_running_loop().call_soon_threadsafe, stopping.set))
        async with LocalService(**options) as local:
            started.set_result(local)
            await stopping.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, name="loops-local")
    thread.start()
    try:
        yield started.result()
    finally:
        if thread.is_alive():
            # Its loop may be closed already, as after a failed start.
            with suppress(RuntimeError):
                stop.result()()
        thread.join()

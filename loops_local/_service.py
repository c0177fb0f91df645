"""The service as one object that is opened and closed."""

from __future__ import annotations

import asyncio
import inspect
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast

from aiohttp import web
from yarl import URL

from loops_async._tasks import TaskOwner
from loops_async._version import __version__

from ._dashboard.data import Gatherer, ServiceFacts
from ._dashboard.routes import DashboardRoutes
from ._execution.models import Models
from ._execution.operations import Operations
from ._execution.sample_queue import SampleQueue
from ._http.app import build_app
from ._http.authorization import DashboardAccess
from ._http.connections import Connections
from ._http.openapi import document_route
from ._http.paths import DASHBOARD, LOCAL_SAMPLER, LOCAL_TRAINER
from ._http.signing import UrlSigner
from ._resources.activity import Activity
from ._resources.lifecycle import Lifecycle
from ._resources.metrics import ProcessMetrics
from ._resources.registry import Registry
from ._routes.account import AccountRoutes
from ._routes.checkpoints import CheckpointRoutes
from ._routes.control_plane import ControlPlaneRoutes
from ._routes.deployments import DeploymentRoutes
from ._routes.figures import FigureRoutes
from ._routes.files import FileRoutes
from ._routes.representations import Representations
from ._routes.sample_queue import SampleQueueRoutes
from ._routes.sampler import SamplerRoutes
from ._routes.trainer import TrainerRoutes
from ._storage.checkpoints import Checkpoints
from ._storage.logs import Logs
from ._storage.private import make_private_directory, make_private_file
from ._storage.store import Store
from ._threads import entered_in_thread
from .engine import DTYPES, Engine, EngineFactory, load_engine
from .engine.echo import MAX_SEQ_LEN as ECHO_MAX_SEQ_LEN
from .faults import Faults

__all__ = ["DEFAULT_MODELS", "LocalService", "serve_in_thread"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

DEFAULT_MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny")
"""The models that the torch engine offers by default; the first is the default of local mode."""

OPENS_DASHBOARD = "dashboard_token"
"""The file of the data directory that holds the token of the dashboard."""

_ECHO_MODEL = "echo"
_REACHABLE_AS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - a table of names, not a bind
_CLOSE_SECONDS = 2.0
_FIRST_REQUEST_SECONDS = 10.0
_IDLE_SECONDS = 75.0
"""How long a connection without a request stays open: longer than clients keep it for their next one."""

_DIRECTORIES = ("archives", "checkpoints", "tokenizers", "trainers")


class LocalService:
    """The whole service on this machine: control plane, trainers, samplers, checkpoints.

    Args:
        engine: ``"torch"`` trains and samples for real; ``"echo"`` does neither and needs no torch; or a function
            from a model's name to an engine.
        model: the only base model on offer (with ``"echo"``: the default one).
        models: the base models on offer, instead of `model`; the first is the default of local mode.
        dtype: the precision of ``"torch"``'s base models: ``"float32"``, or ``"bfloat16"``: half the memory, faster
            where the processor supports it, and less exact logprobs. Adapters are float32 in both.
        device: where ``"torch"`` keeps its base models, e.g. ``"cpu"`` or ``"cuda"``; ``"auto"`` is a GPU if there is
            one.
        data_dir: the directory of the service's state. None is a temporary directory, removed at the end.
        cache_dir: the directory of downloaded and converted models; None is the user's cache directory.
        host: the address to listen on. Local mode, which needs no key, accepts requests from this machine only.
        port: the port; 0 takes a free one.
        api_key: the key that callers need; None generates one, which a given `data_dir` keeps.
        serverless: offer runs and samplers in their serverless form: without deployments, and with samplers that
            queue samples. They are executed in the same way.
        provisioning_seconds: how long a trainer or sampler takes to start, besides the loading of its model.
        poll_hold_seconds: how long a poll of an operation waits before the response 408.
        version_wait_seconds: how long a sampler waits for a version before the response 408.
        result_retention_seconds: how long the outcome of an operation is kept.
        file_url_seconds: how long the URL of a checkpoint file is valid.

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
        dtype: str = "float32",
        device: str = "auto",
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
        self.faults: Faults = Faults()
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        self._engine = engine
        self._dtype, self._device = dtype, device
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
        self._dashboard_token: str | None = None
        self._data_dir: Path | None = None
        self._models: Models | None = None
        self._stack = AsyncExitStack()

    def __repr__(self) -> str:
        where = "not running" if self._url is None else f"at {self._url}"
        return f"<LocalService {where}, engine {self.engine!r}>"

    @property
    def engine(self) -> str:
        """The kind of engine: ``"torch"``, ``"echo"`` or ``"custom"``."""
        return self._engine if isinstance(self._engine, str) else "custom"

    @property
    def models(self) -> Sequence[str]:
        """The base models on offer; the echo engine accepts any other name too."""
        return self._names or (self._default_model,)

    @property
    def base_url(self) -> str:
        """The URL of the control plane."""
        return str(_while_running(self._url)).rstrip("/")

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
        return _while_running(self._api_key)

    @property
    def dashboard_url(self) -> str:
        """The address of the dashboard, with the token that opens its data and nothing else."""
        return dashboard_url(self.base_url, _while_running(self._dashboard_token))

    @property
    def data_dir(self) -> Path:
        """The directory of the service's state."""
        return _while_running(self._data_dir)

    async def load(self) -> None:
        """Load the default model now, instead of with the first run that uses it.

        Raises:
            RefusedError: it cannot be loaded.
            ImportError: the engine's packages are missing.
        """
        await _while_running(self._models).host(self._default_model).engine()

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
        """Open each part; the stack closes them in the opposite order."""
        close = self._stack.push_async_callback
        data_dir = self._data_dir = await asyncio.to_thread(self._prepare_data_dir)
        if self._given_dir is None:
            close(asyncio.to_thread, shutil.rmtree, data_dir, ignore_errors=True)
        store = Store(data_dir / "store.sqlite3")
        await store.open()
        close(store.close)
        self._api_key = self._api_key or await asyncio.to_thread(_stored_key, data_dir / "api_key")
        token = self._dashboard_token = await asyncio.to_thread(_stored_key, data_dir / OPENS_DASHBOARD)
        registry = await self._open_registry(store, data_dir)
        operations = Operations(store, retention_seconds=self._result_retention_seconds)
        await operations.open()
        queue = SampleQueue(retention_seconds=self._result_retention_seconds)
        representations = Representations(registry, serverless=self._serverless)
        process = ProcessMetrics()
        account = AccountRoutes(store)
        await account.open()
        signer = UrlSigner(await store.secret("file_urls"), valid_seconds=self._file_url_seconds)
        files = FileRoutes(registry.checkpoints, signer, data_dir / "archives")
        lifecycle = Lifecycle(registry, store)
        hold_seconds = self._poll_hold_seconds
        activity = Activity()
        facts = ServiceFacts(engine=self.engine, version=__version__, started_at=time.time())
        gatherer = Gatherer(facts, registry, operations, activity, self.faults, secrets=(self.api_key, token))
        dashboard = DashboardRoutes(gatherer)
        samplers = SamplerRoutes(registry, activity, version_wait_seconds=self._version_wait_seconds)
        routes = [
            *ControlPlaneRoutes(registry, lifecycle, representations, account).routes(),
            *CheckpointRoutes(registry, lifecycle, files).routes(),
            *DeploymentRoutes(registry, lifecycle, representations, process, files).routes(),
            *account.routes(),
            *files.routes(),
            *FigureRoutes(registry).routes(),
            *dashboard.routes(),
            *TrainerRoutes(
                registry, lifecycle, operations, hold_seconds=hold_seconds, serverless=self._serverless
            ).routes(),
            *samplers.routes(),
            *SampleQueueRoutes(registry, samplers, queue, hold_seconds=hold_seconds).routes(),
        ]
        connections = Connections(seconds=_FIRST_REQUEST_SECONDS)
        app = build_app(
            [*routes, document_route(routes)],
            registry=registry,
            api_key=self.api_key,
            dashboard=DashboardAccess(token, self._host),
            faults=self.faults,
            process=process,
            connections=connections,
        )
        representations.base_url = self._url = await self._listen(app, connections)
        watching = TaskOwner()
        watching.start_unattended(dashboard.watch(), name="measure for the dashboard")
        close(watching.close)
        # Closed first, while the server still runs, so that waiting polls get their response.
        close(operations.close)
        close(queue.close)

    async def _open_registry(self, store: Store, data_dir: Path) -> Registry:
        close = self._stack.push_async_callback
        loads = TaskOwner()
        known_length = ECHO_MAX_SEQ_LEN if self._engine == "echo" else None
        self._models = Models(
            self._load_engine, self._names, self._default_model, data_dir / "tokenizers", loads, known_length
        )
        close(self._models.close)
        close(loads.close)
        logs = Logs(store)
        await logs.open()
        registry = Registry(
            store,
            self._models,
            Checkpoints(store, data_dir / "checkpoints", loads),
            logs,
            data_dir=data_dir,
            provisioning_seconds=self._provisioning_seconds,
        )
        await registry.open()
        if self._given_dir is not None:
            close(registry.close)
        return registry

    async def _listen(self, app: web.Application, connections: Connections) -> URL:
        runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,  # a caller that disconnects cancels its sample
            shutdown_timeout=_CLOSE_SECONDS,
            keepalive_timeout=_IDLE_SECONDS,
            auto_decompress=False,
        )
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        make_protocol = connections.protocol_factory(_while_running(runner.server))
        loop = asyncio.get_running_loop()
        server = await loop.create_server(make_protocol, self._host, self._port, backlog=4096)
        self._stack.callback(server.close)
        port = server.sockets[0].getsockname()[1]
        return URL.build(scheme="http", host=_REACHABLE_AS.get(self._host, self._host), port=port)

    def _prepare_data_dir(self) -> Path:
        if self._given_dir is None:
            return Path(tempfile.mkdtemp(prefix="loops-local-"))
        # A directory that exists may be shared on purpose; what the service makes in it is private.
        self._given_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in _DIRECTORIES:
            make_private_directory(self._given_dir / name)
        return self._given_dir.resolve()

    def _load_engine(self, model: str) -> Engine:
        if isinstance(self._engine, str):
            return load_engine(self._engine, model, cache_dir=self._cache_dir, dtype=self._dtype, device=self._device)
        return self._engine(model)


def dashboard_url(base_url: str, token: str) -> str:
    """Return the address of a service's dashboard; a browser does not send what is behind the ``#``."""
    return f"{base_url}{DASHBOARD}#token={token}"


def _while_running(value: T | None) -> T:
    if value is None:
        raise RuntimeError("the service is not running; enter it first")
    return value


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


def home() -> Path:
    """Return the home directory of the user; a ValueError says that there is none."""
    try:
        return Path.home()
    except RuntimeError:  # e.g. in a container whose user is only a number
        raise ValueError("this user has no home directory: set HOME") from None


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "loops-async"


def _stored_key(path: Path) -> str:
    """Return the key of the data directory; the first start generates it, and only the owner can read it."""
    make_private_file(path)
    key = path.read_text().strip()
    if not key:
        key = secrets.token_urlsafe(24)
        path.write_text(key)
    return key


def _with_arguments_of(make: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Declare that a function has the arguments of `make`, for editors, type checkers and `help`."""

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        signature = inspect.signature(make).replace(return_annotation=inspect.Signature.empty)
        vars(function)["__signature__"] = signature
        return cast("Callable[P, R]", function)

    return decorate


@_with_arguments_of(LocalService)
@contextmanager
def serve_in_thread(**options: Any) -> Iterator[LocalService]:
    """Run a `LocalService`, which has the same arguments, in its own thread: for blocking scripts and tests."""
    with entered_in_thread(partial(LocalService, **options), name="loops-local") as local:
        yield local

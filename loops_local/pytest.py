"""A pytest plugin for tests of programs that use Loops: ``pytest -p loops_local.pytest``.

It is not loaded by itself: name it on the command line, in ``addopts``, or in `pytest_plugins` of a ``conftest``.

Fixtures:

- `loops_service`: the whole service on this machine, one for the session, in a thread of its own.
- `loops_client`: a client of it. In an ``async def`` test it is that of `loops_async`, open in the test's event loop
  (with pytest-asyncio, or with anyio's plugin); in a plain test that of `loops_sync`. `loops_async_client` and
  `loops_sync_client` are one of the two, whatever the test is.
- `loops_faults`: what goes wrong next at that service, as `loops_local.faults.Faults`; forgotten after the test.
- `loops_cassette`: the requests of the test are answered from a file beside it, and recorded to it with
  ``--loops-record``; see `loops_async.testing`.

Runs and samplers that a test makes with these clients are deactivated after it. The ini option ``loops_engine`` names
the engine, ``echo`` (the default) or ``tiny``, which really trains a tiny model and needs the ``local`` extra. A test
that is marked ``@pytest.mark.loops_engine("tiny")`` has another one; with several names it runs once with each.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import pytest

import loops_async
import loops_sync
from loops_async import testing

from ._service import LocalService, serve_in_thread
from .faults import Faults

__all__: list[str] = []  # pytest finds the fixtures; nothing is imported from here

_asyncio_fixture: Callable[..., Any] = pytest.fixture
with suppress(ImportError):  # without it, anyio runs the tests, or all are blocking
    from pytest_asyncio import fixture as _asyncio_fixture

ENGINES: Final[dict[str, dict[str, Any]]] = {"echo": {"engine": "echo"}, "tiny": {"engine": "torch", "model": "tiny"}}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--loops-record`` and ``loops_engine``."""
    help_text = "record the cassettes of tests that use loops_cassette, instead of replaying them"
    parser.getgroup("loops").addoption("--loops-record", action="store_true", help=help_text)
    parser.addini("loops_engine", f"engine of the fixture loops_service: {' or '.join(ENGINES)}", default="echo")


def pytest_configure(config: pytest.Config) -> None:
    """Add the marker ``loops_engine``."""
    config.addinivalue_line("markers", "loops_engine(*names): engines that loops_service has in this test")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a marked test the services of its engines."""
    marker = metafunc.definition.get_closest_marker("loops_engine")
    if marker is not None and "loops_service" in metafunc.fixturenames:
        metafunc.parametrize("loops_service", marker.args, indirect=True, scope="session")


class _Services:
    """The services of one session, by engine."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._running: dict[str, LocalService] = {}

    def get(self, engine: str) -> LocalService:
        if engine not in ENGINES:
            raise pytest.UsageError(f"loops_engine must be {' or '.join(ENGINES)}; got {engine!r}")
        if engine not in self._running:
            service = serve_in_thread(**ENGINES[engine], provisioning_seconds=0.0)
            self._running[engine] = self._stack.enter_context(service)
        return self._running[engine]


@pytest.fixture(scope="session")
def _loops_services() -> Iterator[_Services]:
    with ExitStack() as stack:
        yield _Services(stack)


@pytest.fixture(scope="session")
def loops_service(request: pytest.FixtureRequest, _loops_services: _Services) -> LocalService:
    """The service on this machine."""
    return _loops_services.get(getattr(request, "param", None) or request.config.getini("loops_engine"))


@pytest.fixture
def loops_faults(loops_service: LocalService) -> Iterator[Faults]:
    """What goes wrong next at `loops_service`."""
    yield loops_service.faults
    loops_service.faults.clear()


@pytest.fixture
def loops_client(request: pytest.FixtureRequest, loops_service: LocalService) -> Any:
    """A client of `loops_service` in the colour of the test."""
    return request.getfixturevalue("loops_async_client" if _is_async(request.function) else "loops_sync_client")


@pytest.fixture
def loops_sync_client(loops_service: LocalService) -> Iterator[loops_sync.ServiceClient]:
    """A blocking client of `loops_service`."""
    with loops_sync.ServiceClient(**_options(loops_service)) as client:
        yield client


@pytest.fixture
def loops_async_client(request: pytest.FixtureRequest, loops_service: LocalService) -> Any:
    """A client of `loops_service` that is open in the event loop of the test."""
    is_anyio = "anyio_backend" in request.fixturenames
    return request.getfixturevalue("_loops_anyio_client" if is_anyio else "_loops_asyncio_client")


@pytest.fixture
async def _loops_anyio_client(loops_service: LocalService) -> AsyncIterator[loops_async.ServiceClient]:
    async with loops_async.ServiceClient(**_options(loops_service)) as client:
        yield client


@_asyncio_fixture
async def _loops_asyncio_client(loops_service: LocalService) -> AsyncIterator[loops_async.ServiceClient]:
    async with loops_async.ServiceClient(**_options(loops_service)) as client:
        yield client


@pytest.fixture
def loops_cassette(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The file that answers the requests of the test, ``cassettes/MODULE/TEST.jsonl`` beside its module."""
    names = [request.cls.__name__] if request.cls else []
    name = re.sub(r"[^\w.\-]+", "_", ".".join([*names, request.node.name])).strip("_")
    path = request.path.parent / "cassettes" / request.path.stem / f"{name}.jsonl"
    if request.config.getoption("--loops-record"):
        with testing.record(path):
            yield path
    elif path.is_file():
        with testing.replay(path):
            yield path
    else:
        pytest.fail(f"{path} does not exist; run this test once with --loops-record", pytrace=False)


def _options(service: LocalService) -> dict[str, Any]:
    return {"base_url": service.base_url, "api_key": service.api_key, "on_exit": "deactivate"}


def _is_async(function: Any) -> bool:
    inner = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    return inspect.iscoroutinefunction(inner)

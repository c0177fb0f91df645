"""What all tests share."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
from hypothesis import strategies

import loops_local
from loops_async._logs import LOGGERS
from tests.support import torch_engine
from tests.support.clock import Clock
from tests.support.colours import Async, Blocking, Colour
from tests.support.warnings import TOLERATED

MOST_CALLS_AT_ONCE = 128
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
SETTINGS = ("BASETEN_", "BT_LOOPS_", "LOOPS_", "OTEL_", "TINKER_", "WANDB_", "FORCE_COLOR", "TTY_")
"""How variables begin that set up programs; the last ones have rich take a file for a terminal."""
SETTINGS_OF_TESTS = ("LOOPS_COMPAT_PYTHON", "LOOPS_SITE", "LOOPS_TOLERATE_DEPRECATIONS")


def settings_of_programs() -> list[str]:
    """Return the variables that would set up what is tested; the person who runs the tests may have an account."""
    return [name for name in os.environ if name.startswith(SETTINGS) and name not in SETTINGS_OF_TESTS]


# Here, before what other conftest files set, and before they import what reads these: no fixture is early enough.
for variable in settings_of_programs():
    del os.environ[variable]

# A shell that runs the tests in the background has SIGINT ignored, which the programs that they start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_configure(config: pytest.Config) -> None:
    for name in TOLERATED:
        config.addinivalue_line("filterwarnings", f"default::{name}")


def pytest_collection_finish() -> None:
    """Many tests collect garbage; they need not look at what is imported by now, of which torch alone is most."""
    # Hypothesis checks, at the first test that it runs, that somebody refers to its generator of random numbers; from a
    # frozen module nobody is seen to. So its first test is here.
    hypothesis.given(strategies.none())(lambda _: None)()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def echo_service() -> Iterator[loops_local.LocalService]:
    """One service on the echo engine for the whole session; nothing in it is shared between runs."""
    with loops_local.serve_in_thread(engine="echo", provisioning_seconds=0.02) as local:
        yield local


@pytest.fixture(scope="session")
def imported_engine() -> None:
    """Import the engine before what is only for one test, as `pytester`, which removes what is imported after it."""
    torch_engine.import_it_here()


@pytest.fixture(scope="session")
def tiny(imported_engine: None) -> Iterator[loops_local.LocalService]:
    """One service that really trains, for the tests of numbers; importing torch takes seconds."""
    with loops_local.serve_in_thread(engine="torch", model="tiny", provisioning_seconds=0.0) as local:
        yield local


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Make sleeping take no time, and tell how long it would have been."""
    clock = Clock()
    clock.install(monkeypatch)
    return clock


@pytest.fixture(params=["async", "sync"])
def colour(request: pytest.FixtureRequest) -> Iterator[Colour]:
    """Run the test with `loops_async`, and with `loops_sync` behind the same interface."""
    if request.param == "async":
        yield Async()
    else:
        with ThreadPoolExecutor(MOST_CALLS_AT_ONCE, "blocking") as threads:
            yield Blocking(threads)


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """A page or program that a test runs may turn the log on; the next test must not hear it."""
    loggers = [logging.getLogger(), *map(logging.getLogger, LOGGERS)]
    before = [(one, one.level, one.handlers[:]) for one in loggers]
    yield
    for one, level, handlers in before:
        one.setLevel(level)
        one.handlers[:] = handlers


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test before may have left some; and proxies are for what fixtures install."""
    for name in (*settings_of_programs(), *PROXY_VARIABLES, *map(str.upper, PROXY_VARIABLES)):
        monkeypatch.delenv(name, raising=False)

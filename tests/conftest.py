"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import loops_local
from tests.clock import Clock


@pytest.fixture(scope="session")
def echo_service() -> Iterator[loops_local.LocalService]:
    """One service on the echo engine for the whole session; nothing in it is shared between runs."""
    with loops_local.serve_in_thread(engine="echo", provisioning_seconds=0.02) as local:
        yield local


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Make sleeping take no time, and tell how long it would have been."""
    clock = Clock()
    clock.install(monkeypatch)
    return clock


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have an account."""
    for name in ("BASETEN_API_KEY", "LOOPS_BASE_URL", "LOOPS_REUSE_FROM_SESSION_ID", "BT_LOOPS_MAX_CONNECTIONS"):
        monkeypatch.delenv(name, raising=False)

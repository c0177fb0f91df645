"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import loops_local


@pytest.fixture(scope="session")
def echo_service() -> Iterator[loops_local.LocalService]:
    """One service on the echo engine for the whole session; nothing in it is shared between runs."""
    with loops_local.serve_in_thread(engine="echo", provisioning_seconds=0.02) as local:
        yield local

"""A stubbed service, and a client of each colour."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.control_plane.stub import Blocking, Colour, Stub, serving


@pytest.fixture
async def stub() -> AsyncIterator[Stub]:
    async with serving() as stub:
        yield stub


@pytest.fixture(params=[Colour, Blocking], ids=["async", "sync"])
def colour(request: pytest.FixtureRequest) -> Colour:
    return request.param()

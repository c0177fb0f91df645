"""What is said, once, of an event loop that is held, with the place in the program that holds it."""

from __future__ import annotations

import asyncio
import time

import pytest

import loops_async as loops
from loops_async import ServiceClient, _waiting
from loops_async._work import registry, watchdog
from loops_sync._bridge import current
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import FEW_TOKENS, PROMPT, eventually


@pytest.fixture
def soon_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that is held for 0.05 s is told, and none has been before."""
    warning = _waiting.HoldWarning()
    for module in (_waiting, registry, watchdog):
        monkeypatch.setattr(module, "hold_warning", warning)
    for module in (_waiting, watchdog):
        monkeypatch.setattr(module, "HELD_SECONDS", 0.05)


def grade(caplog: pytest.LogCaptureFixture) -> None:
    """Hold the event loop until that is said."""
    began = time.monotonic()
    while "holds the event loop" not in caplog.text and time.monotonic() < began + PATIENCE_SECONDS:
        time.sleep(0.01)


async def test_what_holds_the_loop_is_said_while_it_does(
    soon_said: None,
    colour: Colour,
    service: ServiceClient,
    engine: WatchedEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    engine.hold_samples()
    sample = asyncio.ensure_future(sampler.sample(PROMPT, 1, FEW_TOKENS))
    await eventually(lambda: engine.waiting_samples == 1)
    if colour.module is loops:
        grade(caplog)
    else:
        current().call(grade, caplog)
    engine.release_samples()
    await sample
    said = [one.getMessage() for one in caplog.records if "the event loop" in one.getMessage()]
    assert len(said) == 1
    assert f"in grade ({__file__}:" in said[0]


def test_the_watchdog_sleeps_while_nothing_is_under_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checked = 0

    def check_all() -> bool:
        nonlocal checked
        checked += 1
        return checked < 3

    monkeypatch.setattr(watchdog, "_check_all", check_all)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.0)
    dog = watchdog.Watchdog()
    for most in (3, 4):
        dog.watch()
        began = time.monotonic()
        while checked < most and time.monotonic() < began + PATIENCE_SECONDS:
            time.sleep(0.001)
        assert checked == most

"""What is said, once, of an event loop that is held, with the place in the program that holds it."""

from __future__ import annotations

import asyncio
import threading
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
    monkeypatch.setattr(watchdog, "is_shown", lambda: True)


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


async def test_a_dump_names_what_holds_the_loop(
    monkeypatch: pytest.MonkeyPatch, colour: Colour, service: ServiceClient, engine: WatchedEngine
) -> None:
    monkeypatch.setattr(registry, "BEAT_SECONDS", 0.05)
    sampler = await service.create_sampling_client(engine.name)
    engine.hold_samples()
    sample = asyncio.ensure_future(sampler.sample(PROMPT, 1, FEW_TOKENS))
    await eventually(lambda: engine.waiting_samples == 1)
    is_dumped, dumps = threading.Event(), [""]

    def hold() -> None:
        is_dumped.wait(PATIENCE_SECONDS)

    def dump_until_held() -> None:
        while "event loop: held for" not in dumps[-1] and not is_dumped.wait(0.01):
            dumps.append(loops.dump_all())
        is_dumped.set()

    dumping = threading.Thread(target=dump_until_held)
    dumping.start()
    if colour.module is loops:
        hold()
    else:
        current().call(hold)
    dumping.join()
    engine.release_samples()
    await sample
    assert f" s, in hold ({__file__}:" in dumps[-1]


async def test_a_client_has_no_thread_for_this_unless_the_log_is_shown(service: ServiceClient) -> None:
    await service.get_server_capabilities()
    await eventually(lambda: not _dogs())  # that of an earlier test may still see that nothing is under way
    await service.get_server_capabilities()
    assert not _dogs()


def test_the_thread_ends_when_nothing_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [True, True, False, False]  # the last look is that after its end
    answers: list[bool] = []

    def look() -> bool:
        return answers.pop(0)

    _wait_for_the_last_one()  # of the test before: it would take the answers of this one
    monkeypatch.setattr(watchdog, "is_shown", lambda: True)
    monkeypatch.setattr(watchdog, "look", look)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.0)
    dog = watchdog.Watchdog()
    for _ in range(2):
        answers[:] = rounds
        dog.watch()
        _wait_for_the_last_one()
        assert (answers, _dogs()) == ([], [])


def _wait_for_the_last_one() -> None:
    for thread in _dogs():
        thread.join(PATIENCE_SECONDS)


def _dogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loops_async: watchdog"]

"""A pool of processes in which a call can be ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import pytest

from loops_async import ClosedError, InputError, ProcessPool
from tests.support.graders import double, end_badly, fail, fail_unreadably, hang, is_alive
from tests.support.work import eventually


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    """One pool of one process: to start one takes a while."""
    with ProcessPool(1) as pool:
        yield pool


async def result(pool: ProcessPool, function: Any, *args: Any) -> Any:
    return await asyncio.wrap_future(pool.submit(function, *args))


async def test_results_and_errors_are_those_of_the_function(pool: ProcessPool) -> None:
    assert await asyncio.gather(*(result(pool, double, number) for number in range(5))) == [0, 2, 4, 6, 8]
    with pytest.raises(KeyError, match="no such key") as caught:
        await result(pool, fail, "no such key")
    assert "in fail" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="UnreadableError"):
        await result(pool, fail_unreadably)
    with pytest.raises(Exception, match="lambda"):
        await result(pool, lambda: 1)
    assert await result(pool, double, 4) == 8


async def test_a_process_that_ends_is_replaced(pool: ProcessPool) -> None:
    with pytest.raises(BrokenExecutor, match="end_badly has ended with exit code 3"):
        await result(pool, end_badly)
    assert await result(pool, double, 4) == 8


async def test_a_call_that_hangs_can_be_ended(pool: ProcessPool, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    hanging = asyncio.ensure_future(result(pool, hang, file))
    waiting = asyncio.ensure_future(result(pool, double, 1))
    following = asyncio.ensure_future(result(pool, double, 4))
    await eventually(lambda: file.exists() and file.read_text())
    waiting.cancel()
    hanging.cancel()
    assert await following == 8
    assert waiting.cancelled()
    assert hanging.cancelled()
    assert not is_alive(int(file.read_text()))


async def test_closing_ends_everything(tmp_path: Path) -> None:
    threads = threading.active_count()
    file = tmp_path / "pid"
    with ProcessPool(1) as pool:
        running, waiting = pool.submit(hang, file), pool.submit(double, 1)
        await eventually(lambda: file.exists() and file.read_text())
    assert waiting.cancelled()
    assert isinstance(running.exception(), BrokenExecutor)
    assert threading.active_count() == threads
    with pytest.raises(ClosedError):
        pool.submit(double, 1)
    with pytest.raises(InputError, match="processes"):
        ProcessPool(-1)

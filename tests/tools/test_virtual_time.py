"""The event loop of simulations, whose clock jumps."""

from __future__ import annotations

import asyncio
import threading

import pytest

from benchmarks import virtual_time


def test_hours_pass_in_order_and_at_once() -> None:
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str, *hours: float) -> None:
        for each in hours:
            await asyncio.sleep(each * 3600)
            seen.append((name, asyncio.get_running_loop().time() / 3600))

    async def main() -> float:
        await asyncio.gather(sleeper("a", 1, 2), sleeper("b", 2, 100))
        return asyncio.get_running_loop().time()

    assert virtual_time.run(main()) == pytest.approx(102 * 3600)
    assert [name for name, _ in seen] == ["a", "b", "a", "b"]
    assert [hours for _, hours in seen] == pytest.approx([1, 2, 3, 102])


def test_work_takes_no_time() -> None:
    async def main() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    assert virtual_time.run(main()) == 0


def test_a_thread_is_waited_for_when_nothing_else_can_happen() -> None:
    async def main() -> int:
        return await asyncio.to_thread(sum, [1, 2])

    assert virtual_time.run(main()) == 3


def test_a_thread_that_is_still_busy_at_the_end_is_waited_for() -> None:
    """Since Python 3.12 a runner limits this wait by the clock of its loop, which would jump over it."""
    release = threading.Event()
    ended: list[str] = []

    def work() -> None:
        release.wait()
        ended.append("work")

    async def main() -> None:
        asyncio.get_running_loop().run_in_executor(None, work)
        threading.Timer(0.05, release.set).start()

    virtual_time.run(main())
    assert ended == ["work"]


def test_a_simulation_that_is_stuck_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_time, "THREAD_SECONDS", 0.0)

    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="stuck"):
        virtual_time.run(main())

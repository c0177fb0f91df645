"""Functions of the user that stand for coroutines, each in a thread of its own."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from itertools import pairwise

import pytest
from workshop import BlockingBelt, BlockingTool, BlockingWorkshop, Stuck, eventually

import loops_sync
from loops_async import ClosedError, InputError
from loops_sync import _bridge, _workers
from loops_sync._bridge import Bridge, current, stepped_in_worker_threads
from tests.support.patience import PATIENCE_SECONDS


def worker_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if isinstance(thread, _workers.Worker)]


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Each of these tests must end the threads that it has started."""
    yield
    assert eventually(lambda: not worker_threads()), worker_threads()


@pytest.fixture
def threads_stay_idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For a test that counts threads, on a bridge of its own."""
    bridge = Bridge()
    monkeypatch.setattr(_bridge, "_current", bridge)
    monkeypatch.setattr(_workers, "IDLE_SECONDS", 3600)
    yield
    bridge.stop()


class TestCalls:
    def test_each_runs_in_a_thread_named_after_its_task_with_a_blocking_handle(self, shop: BlockingWorkshop) -> None:
        def work(tool: BlockingTool, number: int) -> tuple[int, str, str]:
            return number, tool.use(), threading.current_thread().name

        with shop.belt(work, range(5)) as belt:
            assert sorted(belt) == [(number, f"tool {number}", f"loops_sync: item {number}") for number in range(5)]
            assert list(belt) == []

    def test_as_many_as_the_core_wants_run_at_once(self, shop: BlockingWorkshop) -> None:
        together = threading.Barrier(200)

        def work(tool: BlockingTool, number: int) -> int:
            together.wait(PATIENCE_SECONDS)
            return number

        with shop.belt(work, range(400), at_once=200) as belt:
            assert sorted(belt) == list(range(400))

    def test_idle_threads_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also while another function runs, and without a context that is left."""
        monkeypatch.setattr(_workers, "IDLE_SECONDS", 0.01)
        release, together = threading.Event(), threading.Barrier(3)

        async def run_some() -> asyncio.Task[bool]:
            long = asyncio.create_task(current().workers.run(release.wait, PATIENCE_SECONDS))
            await asyncio.gather(*(current().workers.run(together.wait, PATIENCE_SECONDS) for _ in range(3)))
            return long

        long = current().run(run_some)
        assert eventually(lambda: len(worker_threads()) == 1)
        release.set()
        assert eventually(lambda: not worker_threads())
        assert long.result()

    def test_no_more_than_one_thread_starts_in_a_turn_of_the_loop(self) -> None:
        release = threading.Event()

        async def counts() -> list[int]:
            runs = [asyncio.create_task(current().workers.run(release.wait)) for _ in range(50)]
            seen = [0]
            while seen[-1] < 50:
                await asyncio.sleep(0)
                seen.append(len(worker_threads()))
            release.set()
            await asyncio.wait(runs)
            return seen

        seen = current().run(counts)
        assert max(after - before for before, after in pairwise(seen)) == 1

    @pytest.mark.usefixtures("threads_stay_idle")
    def test_threads_are_used_again(self, shop: BlockingWorkshop) -> None:
        release, idents = threading.Event(), []

        def work(tool: BlockingTool, number: int) -> int:
            if number == 0:
                release.wait(PATIENCE_SECONDS)
            else:
                idents.append(threading.get_ident())
            return number

        with shop.belt(work, range(50), at_once=2) as belt:
            assert [next(belt) for _ in range(49)] == list(range(1, 50))
            assert len(set(idents)) == 1
            release.set()
            assert list(belt) == [0]

    def test_context_variables_are_those_of_who_enters(self, shop: BlockingWorkshop) -> None:
        trace: ContextVar[str] = ContextVar("trace", default="none")

        def work(tool: BlockingTool, number: int) -> str:
            seen = trace.get()
            trace.set("changed by a function")
            return seen

        trace.set("mine")
        with shop.belt(work, range(6)) as belt:
            assert list(belt) == ["mine"] * 6

    def test_it_may_use_everything_else(self, shop: BlockingWorkshop) -> None:
        """Other calls, callbacks in its own thread, and contexts like the one that runs it."""

        def inner(tool: BlockingTool, number: int) -> int:
            return shop.add(number)

        def work(tool: BlockingTool, number: int) -> tuple[int, set[str]]:
            names: set[str] = set()
            shop.count(3, lambda _: names.add(threading.current_thread().name))
            with shop.belt(inner, range(4)) as belt:
                return sum(belt), names

        with shop.belt(work, range(3)) as belt:
            assert sorted(belt, key=str) == [(14, {f"loops_sync: item {number}"}) for number in range(3)]

    def test_body_runs_in_the_callers_thread_and_other_calls_go_on(self, shop: BlockingWorkshop) -> None:
        with shop.belt(lambda tool, number: tool.use(), range(20)) as belt:
            for number, _ in enumerate(belt):
                assert shop.add(number) == number + 2

    def test_a_coroutine_function_is_refused(self, shop: BlockingWorkshop) -> None:
        async def work(tool: BlockingTool, number: int) -> int:
            return number

        with pytest.raises(InputError, match="work: must be a plain function"):
            shop.belt(work, range(3))
        with pytest.raises(InputError, match="work: must be a plain function"):
            shop.belt(None, range(3))  # type: ignore[arg-type, misc] - that is the point

    def test_no_thread_left_to_start_says_how_many_run(
        self, shop: BlockingWorkshop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def start(worker: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(_workers.Worker, "start", start)
        with shop.belt(lambda tool, number: number, range(1)) as belt, pytest.raises(RuntimeError) as caught:
            next(belt)
        assert caught.value.__notes__ == ["1 functions, e.g. rollouts, are to run in a thread of their own each"]


class TestIterables:
    @pytest.mark.usefixtures("threads_stay_idle")
    def test_all_steps_are_made_in_one_thread(self, shop: BlockingWorkshop) -> None:
        def idents() -> Iterator[int]:
            for number in range(20):
                assert shop.add(number) == number + 2
                yield threading.get_ident()

        assert len(set(current().iterate(stepped_in_worker_threads, idents()))) == 1

    def test_a_step_that_waits_in_a_call_is_cancelled(self, shop: BlockingWorkshop) -> None:
        stuck = Stuck()

        def numbers() -> Iterator[int]:
            yield 0
            stuck(shop.tool, 1)

        items = current().iterate(stepped_in_worker_threads, numbers())
        assert next(items) == 0
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(list, items)
            assert stuck.has_begun.wait(PATIENCE_SECONDS)
            items.close()
            with pytest.raises(ClosedError, match="was cancelled"):
                waiting.result(PATIENCE_SECONDS)
        assert stuck.seen == ["cancelled 1", "own"]


class TestErrors:
    @pytest.mark.parametrize(
        "error", [ValueError("a"), TimeoutError("b"), GeneratorExit(), BaseException("c")], ids=repr
    )
    def test_they_arrive_as_they_are(self, shop: BlockingWorkshop, error: BaseException) -> None:
        def work(tool: BlockingTool, number: int) -> None:
            raise error

        with shop.belt(work, range(1)) as belt, pytest.raises(type(error)) as caught:
            next(belt)
        assert caught.value is error

    def test_stop_iteration_does_not_end_the_loop_silently(self, shop: BlockingWorkshop) -> None:
        def work(tool: BlockingTool, number: int) -> None:
            raise StopIteration

        with shop.belt(work, range(1)) as belt, pytest.raises(RuntimeError, match="raised StopIteration"):
            next(belt)

    def test_a_cancellation_that_nobody_asked_for_is_one(self, shop: BlockingWorkshop) -> None:
        """As in the core, where a stream of rollouts repeats it."""
        seen: list[BaseException] = []

        def work(tool: BlockingTool, number: int) -> None:
            try:
                tool.jam()
            except asyncio.CancelledError as cancelled:
                seen.append(cancelled)
                raise

        with shop.belt(work, range(1)) as belt, pytest.raises(Exception, match="was cancelled"):
            next(belt)
        assert len(seen) == 1

    def test_they_and_arguments_and_results_are_let_go(self, shop: BlockingWorkshop) -> None:
        class Kept(Exception):  # noqa: N818 - also a result
            pass

        kept: list[weakref.ref[Kept]] = []

        def work(tool: BlockingTool, number: int) -> Kept | None:
            one = Kept(number)
            kept.append(weakref.ref(one))
            try:
                if number == 1:
                    raise one
                return one if number == 2 else None
            finally:
                del one  # its traceback refers to this frame

        gc.disable()
        try:
            with shop.belt(Stuck(), range(1)), shop.belt(work, range(3), at_once=1) as belt:
                next(belt)
                with suppress(Kept):
                    next(belt)
                next(belt)
                assert eventually(lambda: [one() for one in kept] == [None] * 3)
        finally:
            gc.enable()


class TestCancelling:
    def test_leaving_cancels_the_call_that_the_function_waits_for(self, shop: BlockingWorkshop) -> None:
        """And the function can use the client for its clean-up."""
        stuck = Stuck()
        with shop.belt(stuck, range(1)):
            assert stuck.has_begun.wait(PATIENCE_SECONDS)
        assert stuck.seen == ["cancelled 0", "tool 0"]

    def test_leaving_cancels_the_wait_for_a_call_that_was_started(self, shop: BlockingWorkshop) -> None:
        """And not that call, which the function may cancel itself."""
        has_begun, seen = threading.Event(), []

        def work(tool: BlockingTool, number: int) -> None:
            napping = loops_sync.start(tool.nap)
            has_begun.set()
            try:
                napping.result()
            except asyncio.CancelledError:
                seen.append(f"cancelled {napping.done()}")
                raise
            finally:
                seen.append(f"{tool.use()} {napping.cancel()}")

        with shop.belt(work, range(1)):
            assert has_begun.wait(PATIENCE_SECONDS)
        assert seen == ["cancelled False", "tool 0 True"]

    def test_an_error_of_the_body_leaves_too(self, shop: BlockingWorkshop) -> None:
        stuck = Stuck()
        with pytest.raises(ZeroDivisionError), shop.belt(stuck, range(1)):
            _ = stuck.has_begun.wait(PATIENCE_SECONDS) / 0
        assert stuck.seen == ["cancelled 0", "tool 0"]

    def test_a_function_that_computes_is_waited_for_and_its_next_call_cancelled(
        self, shop: BlockingWorkshop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_workers, "WARNING_SECONDS", 0.01)
        has_begun, seen = threading.Event(), []

        def work(tool: BlockingTool, number: int) -> None:
            has_begun.set()
            eventually(lambda: "still runs" in caplog.text)
            try:
                tool.use()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        with caplog.at_level(logging.WARNING, "loops_async"), shop.belt(work, range(1)):
            assert has_begun.wait(PATIENCE_SECONDS)
        assert seen == ["cancelled"]
        wanted = r"item 0 was cancelled 0.01 s ago and still runs, at .+\.py:\d+; only its calls"
        assert re.match(wanted, caplog.messages[0])

    def test_one_that_ends_without_another_call_is_cancelled_nevertheless(self, shop: BlockingWorkshop) -> None:
        has_begun, release = threading.Event(), threading.Event()

        def work(tool: BlockingTool, number: int) -> int:
            has_begun.set()
            release.wait(PATIENCE_SECONDS)
            return number

        async def cancelled() -> bool:
            task = asyncio.create_task(current().workers.run(work, BlockingTool._of(None), 1))  # type: ignore[arg-type]
            await asyncio.to_thread(has_begun.wait)
            task.cancel()
            asyncio.get_running_loop().call_later(0.01, release.set)
            await asyncio.wait([task])
            return task.cancelled()

        assert current().run(cancelled)

    def test_each_cancellation_is_told_once(self, shop: BlockingWorkshop) -> None:
        """As with a coroutine: one that goes on after the first, e.g. a time limit, is cancelled by the next."""
        seen: list[str] = []
        waits = [threading.Event() for _ in range(3)]

        def work() -> None:
            for wait in waits:
                try:
                    wait.set()
                    current().run(asyncio.sleep, 3600)
                except asyncio.CancelledError:
                    seen.append("cancelled")
            raise ValueError("an error of the clean-up")

        async def cancel() -> BaseException | None:
            task = asyncio.create_task(current().workers.run(work))
            for wait in waits:
                await asyncio.to_thread(wait.wait)
                task.cancel()
            await asyncio.wait([task])
            return None if task.cancelled() else task.exception()

        assert current().run(cancel) is None
        assert seen == ["cancelled"] * 3

    def test_closing_the_shop_meanwhile_ends_all(self, shop: BlockingWorkshop) -> None:
        stuck = Stuck()
        with shop.belt(stuck, range(1)):
            stuck.has_begun.wait(PATIENCE_SECONDS)
            shop.close()
        assert stuck.seen[0] == "cancelled 0"

    def test_letting_go_leaves(self, shop: BlockingWorkshop) -> None:
        stuck = Stuck()
        belt: BlockingBelt[None] = shop.belt(stuck, range(1))
        belt.__enter__()
        assert stuck.has_begun.wait(PATIENCE_SECONDS)
        del belt
        gc.collect()
        assert eventually(lambda: stuck.seen == ["cancelled 0", "tool 0"])

    def test_breaking_and_leaving_ends_those_that_run(
        self, shop: BlockingWorkshop, capsys: pytest.CaptureFixture[str]
    ) -> None:
        begun: list[int] = []
        ended: list[int] = []

        def work(tool: BlockingTool, number: int) -> int:
            if number < 5:
                return number
            begun.append(number)
            try:
                tool.nap()
            finally:
                ended.append(number)
            return number

        with shop.belt(work, range(100), at_once=8) as belt:
            for number in belt:
                if number == 2:
                    break
            assert eventually(lambda: begun)
        assert sorted(begun) == sorted(ended)
        assert capsys.readouterr().out.splitlines()[-1] == "belt: left in one task"

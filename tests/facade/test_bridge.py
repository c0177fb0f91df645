"""What the bridge and the base classes of the handles promise."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import ContextVar
from pathlib import Path

import pytest
from workshop import BlockingTool, BlockingWorkshop

import loops_async
from loops_sync._bridge import Bridge, current, stepped_in_worker_threads
from loops_sync._outcome import Outcome
from tests.support.patience import PATIENCE_SECONDS


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def soon(capsys: pytest.CaptureFixture[str], expected: str) -> bool:
    """Whether `expected` is printed in time by something that nobody waits for."""
    seen = ""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while expected not in seen and time.monotonic() < deadline:
        time.sleep(0.01)
        seen += capsys.readouterr().out
    return expected in seen


class TestHandles:
    def test_constructor_opens_and_with_closes(self, capsys: pytest.CaptureFixture[str]) -> None:
        with BlockingWorkshop("one"):
            assert lines(capsys) == ["one: open"]
        assert lines(capsys) == ["one: closed"]

    def test_closing_twice_does_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        shop = BlockingWorkshop.elsewhere("one")
        shop.close()
        shop.close()
        assert lines(capsys) == ["one: open", "one: closed"]

    def test_closing_leaves_nothing_behind(self) -> None:
        async def names_of_tasks() -> set[str]:
            return {str(task.get_coro()) for task in asyncio.all_tasks() - {asyncio.current_task()}}

        before = current().run(names_of_tasks)
        shop = BlockingWorkshop("one")
        job = shop.start("dig", until=bool)
        assert current().run(names_of_tasks) > before
        shop.close()
        assert current().run(names_of_tasks) == before
        assert job.done()

    def test_letting_go_closes(self, capsys: pytest.CaptureFixture[str]) -> None:
        shop = BlockingWorkshop("one")
        assert shop.tool.use() == "own"
        del shop
        assert soon(capsys, "one: closed")

    def test_what_a_handle_made_keeps_it_open(self, capsys: pytest.CaptureFixture[str]) -> None:
        tool = BlockingWorkshop("one").make_tool("saw")
        gc.collect()
        assert tool.use() == "saw"
        assert lines(capsys) == ["one: open"]
        del tool
        assert soon(capsys, "one: closed")

    def test_a_part_is_the_same_each_time(self, shop: BlockingWorkshop) -> None:
        assert shop.tool is shop.tool
        assert shop.make_tool("saw") is not shop.make_tool("saw")

    def test_only_other_handles_make_a_handle(self) -> None:
        with pytest.raises(TypeError, match="BlockingTool is not created directly"):
            BlockingTool()

    def test_looks_like_what_is_behind_it(self, shop: BlockingWorkshop) -> None:
        assert repr(shop.make_tool("saw")) == "<Tool saw>"

    def test_a_light_handle_pickles_and_an_opened_one_does_not(self, shop: BlockingWorkshop) -> None:
        copy = pickle.loads(pickle.dumps(shop.make_tool("saw")))
        assert isinstance(copy, BlockingTool)
        assert copy.use() == "saw"
        with pytest.raises(TypeError, match="a BlockingWorkshop belongs to its process"):
            pickle.dumps(shop)


class TestCalls:
    def test_plain_functions_run_on_the_loops_thread(self) -> None:
        assert current().call(threading.current_thread).name == "loops_sync"

    def test_context_variables_are_seen(self) -> None:
        trace: ContextVar[str] = ContextVar("trace", default="none")
        trace.set("mine")
        assert current().call(trace.get) == "mine"

    @pytest.mark.parametrize(
        "error",
        [ValueError("a"), TimeoutError("the core's own"), SystemExit(3), KeyboardInterrupt(), StopAsyncIteration()],
        ids=lambda error: type(error).__name__,
    )
    def test_errors_arrive_as_they_are_and_end_nothing(self, shop: BlockingWorkshop, error: BaseException) -> None:
        with pytest.raises(type(error)) as caught:
            shop.fail(error)
        assert caught.value is error
        assert shop.add(1) == 3

    def test_a_cancellation_in_the_core_is_no_cancellation_here(self, shop: BlockingWorkshop) -> None:
        with pytest.raises(loops_async.ClosedError, match="was cancelled"):
            shop.fail(asyncio.CancelledError())

    def test_system_exit_behind_a_call_ends_nothing(
        self, shop: BlockingWorkshop, caplog: pytest.LogCaptureFixture
    ) -> None:
        release = threading.Event()
        waiting = shop.start("long", until=release.is_set)
        shop.fail_behind(SystemExit(3))
        release.set()
        assert "tried to end the thread" in caplog.text
        assert waiting.result() == "long"

    def test_traceback_is_short(self, shop: BlockingWorkshop) -> None:
        try:
            shop.fail(ValueError("a"))
        except ValueError as error:
            frames = [(Path(frame.filename).name, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
        # Ours, the method, those of the bridge, and the core's.
        assert frames[:2] == [("test_bridge.py", "test_traceback_is_short"), ("workshop.py", "fail")]
        assert [name for name, _ in frames[2:-1]] == ["_bridge.py", "_bridge.py", "_outcome.py"]
        assert frames[-1] == ("workshop.py", "fail")

    @pytest.mark.parametrize("is_callbacks", [False, True], ids=["a call's", "a callback's"])
    def test_raising_leaves_no_cycle(self, shop: BlockingWorkshop, is_callbacks: bool) -> None:
        """A cycle would keep whatever the frames hold alive until the collector comes."""

        class BrokenError(Exception):
            pass

        def fail(_: int = 0) -> None:
            raise BrokenError

        gc.disable()
        try:
            try:
                shop.count(1, fail) if is_callbacks else current().call(fail)
            except BrokenError as error:
                kept = weakref.ref(error)
            assert kept() is None
        finally:
            gc.enable()

    def test_many_threads_at_once(self, shop: BlockingWorkshop) -> None:
        together = threading.Barrier(64)

        def call(number: int) -> int:
            together.wait()
            return shop.add(number)

        with ThreadPoolExecutor(64) as threads:
            assert list(threads.map(call, range(64))) == list(range(2, 66))

    def test_closing_ends_a_wait(self, shop: BlockingWorkshop) -> None:
        job = shop.start("dig", until=bool)
        shop.close()
        with pytest.raises(loops_async.ClosedError, match="closed before"):
            job.result()

    def test_one_cancelled_before_its_first_step_ends(self) -> None:
        outcome: Outcome[None] = Outcome()
        current().call(lambda: (outcome.start(asyncio.sleep, 60), outcome.cancel()))
        assert outcome.wait(60)
        with pytest.raises(asyncio.CancelledError):
            outcome.get()


class TestCallbacks:
    def test_every_event_comes_in_order_before_the_call_returns(self, shop: BlockingWorkshop) -> None:
        seen: list[tuple[int, str]] = []

        def slow(number: int) -> None:
            time.sleep(0.002)
            seen.append((number, threading.current_thread().name))

        assert shop.count(50, slow) == 50
        assert seen == [(number, threading.current_thread().name) for number in range(50)]

    def test_none_is_none(self, shop: BlockingWorkshop) -> None:
        assert shop.count(3) == 3

    def test_it_may_call_back(self, shop: BlockingWorkshop) -> None:
        seen: list[int] = []
        shop.count(3, lambda number: seen.append(shop.count(2, lambda inner: seen.append(shop.add(number + inner)))))
        assert seen == [2, 3, 2, 3, 4, 2, 4, 5, 2]

    def test_one_that_blocks_holds_up_no_other_call(self, shop: BlockingWorkshop) -> None:
        release, blocked = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as threads:
            counting = threads.submit(shop.count, 1, lambda _: blocked.set() or release.wait(PATIENCE_SECONDS))
            assert blocked.wait(PATIENCE_SECONDS)
            assert shop.add(1) == 3
            assert not counting.done()
            release.set()
            assert counting.result() == 1

    def test_what_it_raises_cancels_the_call_and_hears_how_that_ended(self, shop: BlockingWorkshop) -> None:
        seen: list[int] = []

        def fail(number: int) -> None:
            seen.append(number)
            raise ZeroDivisionError(number)

        with pytest.raises(ZeroDivisionError, match="0") as caught:
            shop.count(3, fail, pause=PATIENCE_SECONDS)
        assert seen == [0, -1]
        assert caught.value.__notes__ == ["something was left behind"]

    def test_one_that_fails_after_the_call_is_done_says_so(self, shop: BlockingWorkshop) -> None:
        def fail_late(_: int) -> None:
            for _ in range(3):
                shop.add(1)  # the call's own task goes on before this one
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError) as caught:
            shop.count(1, fail_late)
        assert caught.value.__notes__ == ["its call had already succeeded: the objects that it created still exist"]

    def test_an_iterable_is_stepped_where_it_may_call_back(self, shop: BlockingWorkshop) -> None:
        def numbers() -> Iterator[int]:
            for number in range(3):
                yield shop.add(number)

        assert list(current().iterate(stepped_in_worker_threads, numbers())) == [2, 3, 4]


class TestIterators:
    def test_all_items_in_one_task(self, shop: BlockingWorkshop, capsys: pytest.CaptureFixture[str]) -> None:
        assert list(shop.steps(3)) == [0, 1, 2]
        assert lines(capsys)[-1] == "steps: cleaned up in one task"

    def test_is_lazy(self, shop: BlockingWorkshop, capsys: pytest.CaptureFixture[str]) -> None:
        lines(capsys)
        shop.steps(3)
        gc.collect()
        assert shop.add(1) == 3
        assert lines(capsys) == []

    def test_an_error_ends_it(self, shop: BlockingWorkshop) -> None:
        steps = shop.steps(3, fail_at=1)
        assert next(steps) == 0
        with pytest.raises(ValueError, match="step 1"):
            next(steps)
        assert list(steps) == []

    def test_close_waits_for_the_cleanup(self, shop: BlockingWorkshop, capsys: pytest.CaptureFixture[str]) -> None:
        with closing(shop.steps(3)) as steps:
            assert next(steps) == 0
        assert lines(capsys)[-1] == "steps: cleaned up in one task"
        assert list(steps) == []

    def test_a_cleanup_that_fails_is_told_by_close(self) -> None:
        async def broken() -> AsyncIterator[int]:
            try:
                yield 1
            finally:
                raise ValueError("broken cleanup")

        items = current().iterate(broken)
        assert next(items) == 1
        with pytest.raises(ValueError, match="broken cleanup"):
            items.close()

    def test_letting_go_cleans_up(self, shop: BlockingWorkshop, capsys: pytest.CaptureFixture[str]) -> None:
        for number in shop.steps(3):
            if number == 1:
                break
        gc.collect()
        assert soon(capsys, "steps: cleaned up in one task")

    def test_letting_go_on_the_loops_own_thread(
        self, shop: BlockingWorkshop, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The collector may run anywhere; waiting there would wait for itself."""
        steps = shop.steps(3)
        next(steps)
        held = [steps]
        del steps
        current().call(held.clear)
        gc.collect()
        assert soon(capsys, "steps: cleaned up in one task")

    def test_several_threads_share_one(self, shop: BlockingWorkshop) -> None:
        steps = shop.steps(200)
        with ThreadPoolExecutor(8) as threads:
            parts = list(threads.map(lambda _: list(steps), range(8)))
        assert sorted(number for part in parts for number in part) == list(range(200))

    def test_one_cancelled_before_its_first_step_ends(self, shop: BlockingWorkshop) -> None:
        items, outcome = shop.steps(3), Outcome[int]()
        current().call(lambda: (items._steps._request(outcome, None), items._steps.cancel()))
        assert outcome.wait(60)
        with pytest.raises(asyncio.CancelledError):
            outcome.get()


class TestContexts:
    def test_an_error_goes_in_and_comes_out(self, shop: BlockingWorkshop) -> None:
        error = ValueError("broken")
        with pytest.raises(ValueError, match="broken") as caught, shop.borrow():
            raise error
        assert caught.value is error

    def test_an_error_may_be_forgiven(self, shop: BlockingWorkshop) -> None:
        with shop.borrow(forgives=True):
            raise ValueError("broken")

    @pytest.mark.parametrize("error", [StopIteration(), SystemExit(3), GeneratorExit()], ids=repr)
    def test_errors_that_mean_something_to_generators(
        self, shop: BlockingWorkshop, capsys: pytest.CaptureFixture[str], error: BaseException
    ) -> None:
        with pytest.raises(type(error)), shop.borrow():
            raise error
        assert lines(capsys)[-1] == "borrow: given back in one task"


class TestStop:
    """What a bridge does when the interpreter exits, on one of our own."""

    def test_async_generators_that_nobody_drives_clean_up(self) -> None:
        seen: list[str] = []

        async def held() -> AsyncIterator[int]:
            try:
                yield 1
            finally:
                await asyncio.sleep(0)
                seen.append("cleaned up")

        bridge, generator = Bridge(), held()

        async def begin() -> int:
            return await anext(generator)

        assert bridge.run(begin) == 1
        bridge.stop()
        assert seen == ["cleaned up"]

    def test_what_a_cleanup_leaves_for_the_next_turn_is_done(self) -> None:
        """So do transports that are closed: they let go of their sockets one turn later."""
        seen: list[str] = []

        async def nap() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                asyncio.get_running_loop().call_soon(seen.append, "a turn later")

        async def begin() -> asyncio.Task[None]:
            task = asyncio.create_task(nap())
            await asyncio.sleep(0)
            return task

        bridge = Bridge()
        bridge.run(begin)
        bridge.stop()
        assert seen == ["a turn later"]

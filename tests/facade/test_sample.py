"""What the generated sample package does, through its public names only."""

from __future__ import annotations

import asyncio
import gc
import inspect
import pickle
import sys
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sample_core
import sample_sync

import loops_async
from loops_sync._bridge import Bridge, current


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def soon(capsys: pytest.CaptureFixture[str], expected: str) -> bool:
    """Whether `expected` is printed in time by something that nobody waits for."""
    seen = ""
    deadline = time.monotonic() + 10
    while expected not in seen and time.monotonic() < deadline:
        time.sleep(0.01)
        seen += capsys.readouterr().out
    return expected in seen


class TestService:
    def test_constructor_opens_and_with_closes(self, capsys: pytest.CaptureFixture[str]) -> None:
        with sample_sync.Service("one") as service:
            assert lines(capsys) == ["one: open"]
            assert service.is_open
        assert lines(capsys) == ["one: closed"]
        assert not service.is_open

    def test_closing_twice_does_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        service = sample_sync.Service("one")
        service.close()
        service.close()
        assert lines(capsys) == ["one: open", "one: closed"]

    def test_closing_leaves_nothing_behind(self, capsys: pytest.CaptureFixture[str]) -> None:
        async def names_of_tasks() -> set[str]:
            return {str(task.get_coro()) for task in asyncio.all_tasks() - {asyncio.current_task()}}

        before = current().run(names_of_tasks)
        service = sample_sync.Service("one")
        job = service.hire("anna").start("dig", until=bool)
        assert current().run(names_of_tasks) > before
        service.close()
        assert current().run(names_of_tasks) == before
        assert job.done()

    def test_other_constructors_open_too(self) -> None:
        with sample_sync.Service.local(name="here") as service:
            assert isinstance(service, sample_sync.Service)
            assert service.is_open

    def test_a_failure_to_open_is_raised_by_the_constructor(self) -> None:
        with pytest.raises(TypeError, match="is_broken"):
            sample_sync.Service(is_broken=True)  # type: ignore[call-arg]

    def test_letting_go_closes(self, capsys: pytest.CaptureFixture[str]) -> None:
        service = sample_sync.Service("one")
        del service
        gc.collect()
        assert soon(capsys, "one: closed")

    def test_what_a_service_made_keeps_it_open(self, capsys: pytest.CaptureFixture[str]) -> None:
        tool = sample_sync.Service("one").hire("anna").make_tool("saw")
        gc.collect()
        assert tool.use() == "saw"
        assert lines(capsys) == ["one: open"]
        del tool
        gc.collect()
        assert soon(capsys, "one: closed")

    def test_does_not_pickle(self, service: sample_sync.Service) -> None:
        with pytest.raises(TypeError, match="a Service belongs to its process"):
            pickle.dumps(service)


class TestCalls:
    def test_arguments_and_results(self, worker: sample_sync.Worker) -> None:
        assert worker.add(1) == 3
        assert worker.add(1, 4, level="high") == 5
        assert worker.add(1, right=5) == 6
        assert sample_sync.greet("a", "b", c=1) == "a b 1"
        assert sample_sync.Service.count() == 1

    def test_a_property_that_asks(self, worker: sample_sync.Worker) -> None:
        assert worker.skill == 7

    def test_plain_methods_run_where_the_core_lives(self, worker: sample_sync.Worker) -> None:
        assert worker.is_on_its_thread()

    def test_context_variables_are_seen(self, worker: sample_sync.Worker) -> None:
        from sample_core.workers import trace

        token = trace.set("mine")
        try:
            assert worker.traced() == "mine"
        finally:
            trace.reset(token)

    def test_handles_go_in_and_come_out(self, worker: sample_sync.Worker) -> None:
        hammer, saw = worker.all_tools()
        found = worker.find_tool("file")
        assert found is not None
        assert worker.find_tool() is None
        assert worker.join(hammer, [saw, worker.favourite], found) == ["hammer", "saw", "anna's own", "file"]

    def test_looks_like_what_is_behind_it(self, worker: sample_sync.Worker) -> None:
        assert repr(worker.make_tool("saw")) == "<Tool saw>"

    def test_a_light_handle_pickles(self, worker: sample_sync.Worker) -> None:
        copy = pickle.loads(pickle.dumps(worker.make_tool("saw")))
        assert isinstance(copy, sample_sync.Tool)
        assert copy.use() == "saw"

    def test_close_by_with(self, worker: sample_sync.Worker, capsys: pytest.CaptureFixture[str]) -> None:
        with worker as same:
            assert same is worker
        assert lines(capsys)[-1] == "anna: closed"


class TestErrors:
    @pytest.mark.parametrize(
        "error",
        [ValueError("a"), TimeoutError("the core's own"), SystemExit(3), KeyboardInterrupt(), StopAsyncIteration()],
        ids=lambda error: type(error).__name__,
    )
    def test_arrive_as_they_are_and_end_nothing(self, worker: sample_sync.Worker, error: BaseException) -> None:
        with pytest.raises(type(error)) as caught:
            worker.fail(error)
        assert caught.value is error
        assert worker.add(1) == 3

    def test_a_cancellation_in_the_core_is_no_cancellation_here(self, worker: sample_sync.Worker) -> None:
        with pytest.raises(loops_async.ClosedError, match="was cancelled"):
            worker.fail(asyncio.CancelledError())

    def test_system_exit_behind_a_call_ends_nothing(
        self, worker: sample_sync.Worker, caplog: pytest.LogCaptureFixture
    ) -> None:
        release = threading.Event()
        waiting = worker.start("long", until=release.is_set)
        worker.fail_behind(SystemExit(3))
        release.set()
        assert "tried to end the thread" in caplog.text
        assert waiting.result().text == "long"

    def test_traceback_is_short(self, worker: sample_sync.Worker) -> None:
        try:
            worker.fail(ValueError("a"))
        except ValueError as error:
            frames = [(Path(frame.filename).name, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
        # Ours, the generated method, three of the bridge, and the core's.
        assert frames[:2] == [("test_sample.py", "test_traceback_is_short"), ("workers.py", "fail")]
        assert [name for name, _ in frames[2:-1]] == ["_bridge.py"] * 3
        assert frames[-1] == ("workers.py", "fail")

    def test_raising_leaves_no_cycle(self, worker: sample_sync.Worker) -> None:
        """A cycle would keep whatever the frames hold alive until the collector comes."""

        class BrokenError(Exception):
            pass

        def fail(_: int) -> None:
            raise BrokenError

        gc.disable()
        try:
            try:
                worker.tell(fail)
            except BrokenError as error:
                kept = weakref.ref(error)
            assert kept() is None
        finally:
            gc.enable()


class TestFutures:
    def test_waiting_is_separate(self, worker: sample_sync.Worker) -> None:
        job = worker.start("dig")
        assert isinstance(job, sample_sync.Job.__origin__)
        assert job.operation_id == "dig"
        assert job.result() == sample_sync.Report("dig")
        assert job.result() == sample_sync.Report("dig")
        assert job.done()

    def test_a_wait_that_times_out_harms_nobody(self, worker: sample_sync.Worker) -> None:
        release = threading.Event()
        job = worker.start("dig", until=release.is_set)
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(job.result)
            with pytest.raises(loops_async.OperationTimeoutError):
                job.result(timeout=0.01)
            assert not job.done()
            release.set()
            assert other.result().text == "dig"
        assert job.done()

    def test_closing_ends_the_wait(self, service: sample_sync.Service) -> None:
        job = service.hire("anna").start("dig", until=bool)
        service.close()
        with pytest.raises(loops_async.ClosedError, match="closed before"):
            job.result()


class TestIterators:
    def test_all_items_in_one_task(self, worker: sample_sync.Worker, capsys: pytest.CaptureFixture[str]) -> None:
        assert list(worker.steps(3)) == [0, 1, 2]
        assert lines(capsys)[-1] == "steps: cleaned up in one task"

    def test_is_lazy(self, worker: sample_sync.Worker, capsys: pytest.CaptureFixture[str]) -> None:
        lines(capsys)
        worker.steps(3)
        gc.collect()
        assert worker.add(1) == 3
        assert lines(capsys) == []

    def test_an_error_ends_it(self, worker: sample_sync.Worker) -> None:
        steps = worker.steps(3, fail_at=1)
        assert next(steps) == 0
        with pytest.raises(ValueError, match="step 1"):
            next(steps)
        assert list(steps) == []

    def test_close_waits_for_the_cleanup(self, worker: sample_sync.Worker, capsys: pytest.CaptureFixture[str]) -> None:
        with closing(worker.steps(3)) as steps:
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

    def test_letting_go_cleans_up(self, worker: sample_sync.Worker, capsys: pytest.CaptureFixture[str]) -> None:
        for number in worker.steps(3):
            if number == 1:
                break
        gc.collect()
        assert soon(capsys, "steps: cleaned up in one task")

    def test_letting_go_on_the_loops_own_thread(
        self, worker: sample_sync.Worker, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The collector may run anywhere; waiting there would wait for itself."""
        steps = worker.steps(3)
        next(steps)
        held = [steps]
        del steps
        worker.tell(lambda _: held.clear())
        gc.collect()
        assert soon(capsys, "steps: cleaned up in one task")

    def test_several_threads_share_one(self, worker: sample_sync.Worker) -> None:
        steps = worker.steps(200)
        with ThreadPoolExecutor(8) as threads:
            parts = list(threads.map(lambda _: list(steps), range(8)))
        assert sorted(number for part in parts for number in part) == list(range(200))


class TestContexts:
    def test_one_task(self, worker: sample_sync.Worker, capsys: pytest.CaptureFixture[str]) -> None:
        with worker.borrow("saw") as tool:
            assert isinstance(tool, sample_sync.Tool)
            assert tool.use() == "saw"
        assert lines(capsys)[-1] == "borrow: given back in one task"

    def test_an_error_goes_in_and_comes_out(self, worker: sample_sync.Worker) -> None:
        error = ValueError("broken")
        with pytest.raises(ValueError, match="broken") as caught, worker.borrow("saw"):
            raise error
        assert caught.value is error

    def test_an_error_may_be_forgiven(self, worker: sample_sync.Worker) -> None:
        with worker.borrow("saw", forgives=True):
            raise ValueError("broken")

    @pytest.mark.parametrize("error", [StopIteration(), SystemExit(3), GeneratorExit()], ids=repr)
    def test_errors_that_mean_something_to_generators(
        self, worker: sample_sync.Worker, capsys: pytest.CaptureFixture[str], error: BaseException
    ) -> None:
        with pytest.raises(type(error)), worker.borrow("saw"):
            raise error
        assert lines(capsys)[-1] == "borrow: given back in one task"


class TestCallbacks:
    def test_awaitable_callback_may_block_and_call_back(self, worker: sample_sync.Worker) -> None:
        assert worker.told(lambda number: f"{worker.add(number)} on {threading.get_ident() != 0}") == "3 on True"
        assert worker.told() is None

    def test_a_failing_callback_fails_the_call(self, worker: sample_sync.Worker) -> None:
        with pytest.raises(ZeroDivisionError):
            worker.told(lambda number: str(1 // (number - 1)))

    def test_plain_callback_may_not_call_back(self, worker: sample_sync.Worker) -> None:
        with pytest.raises(loops_async.ClosedError, match="use loops_async"):
            worker.tell(lambda number: print(worker.add(number)))
        assert worker.add(1) == 3

    def test_iterable_may_call_back(self, worker: sample_sync.Worker) -> None:
        assert worker.collect(worker.add(number) for number in range(3)) == [2, 3, 4]


class TestThreads:
    def test_many_at_once(self, worker: sample_sync.Worker) -> None:
        together = threading.Barrier(64)

        def call(number: int) -> int:
            together.wait()
            return worker.add(number, 1)

        with ThreadPoolExecutor(64) as threads:
            assert list(threads.map(call, range(64))) == list(range(1, 65))

    def test_from_within_a_running_loop(self, worker: sample_sync.Worker) -> None:
        async def in_a_notebook() -> int:
            return worker.add(1)

        assert asyncio.run(in_a_notebook()) == 3


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


def test_same_names() -> None:
    assert sorted(sample_sync.__all__) == sorted(sample_core.__all__)
    assert sample_sync.Report is sample_core.Report


def test_documentation_is_blocking() -> None:
    assert "with worker:" in (inspect.getdoc(sample_sync.Worker) or "")
    assert "Prose with await in it" in (sys.modules["sample_sync.workers"].__doc__ or "")

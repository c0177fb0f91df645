"""What a loop in the background can do to a process: scripts, and the order of what they print."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from tests.support.patience import PATIENCE_SECONDS

HERE = Path(__file__).parent

BEGIN = """
import asyncio, os, signal, sys, threading, time
from loops_sync import _bridge
from workshop import BlockingWorkshop, Stuck, interrupt
_bridge.EXIT_SECONDS = 3600
"""


class Finished(NamedTuple):
    """What became of a script."""

    lines: list[str]
    errors: str
    code: int


def run(script: str) -> Finished:
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}"}
    # Python 3.12 and later warn of any fork in a process with threads; here that is the point.
    command = [sys.executable, "-u", "-W", "ignore:This process:DeprecationWarning", "-c"]
    done = subprocess.run(
        [*command, BEGIN + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=environment,
    )
    return Finished(done.stdout.splitlines(), done.stderr, done.returncode)


def printed(script: str) -> list[str]:
    """Return what a script prints; it must end well, and say nothing on stderr."""
    done = run(script)
    assert done.errors == ""
    assert done.code == 0
    return done.lines


class TestInterrupts:
    def test_a_call_is_cancelled_and_cleans_up_first(self) -> None:
        assert printed("""
            with BlockingWorkshop() as shop:
                try:
                    shop.nap_interrupted(cleanup_seconds=0.2)
                except KeyboardInterrupt:
                    print("interrupted")
                print(shop.add(1))
        """) == ["workshop: open", "nap: cleaned up", "interrupted", "3", "workshop: closed"]

    def test_the_wait_for_the_cleanup_is_bounded(self) -> None:
        assert printed("""
            _bridge.CLEANUP_SECONDS = 0.1
            with BlockingWorkshop() as shop:
                try:
                    shop.nap_interrupted(cleanup_seconds=3600)
                except KeyboardInterrupt:
                    print("interrupted")
        """)[:2] == ["workshop: open", "interrupted"]

    def test_a_second_one_ends_the_wait_for_the_cleanup(self) -> None:
        done = run("""
            shop = BlockingWorkshop()
            try:
                shop.nap_interrupted(cleanup_seconds=3600, is_interrupted_twice=True)
            except KeyboardInterrupt:
                print("interrupted")
        """)
        assert done.lines[:2] == ["workshop: open", "interrupted"]

    def test_it_carries_notes_of_what_is_left(self) -> None:
        assert printed("""
            with BlockingWorkshop() as shop:
                try:
                    shop.count(1000, pause=0.01, is_interrupted=True)
                except KeyboardInterrupt as interruption:
                    print(*interruption.__notes__)
        """) == ["workshop: open", "something was left behind", "workshop: closed"]

    def test_in_a_callback_the_call_cleans_up_first(self) -> None:
        assert printed("""
            def wait(number):
                print(number)
                interrupt()
                time.sleep(5)

            with BlockingWorkshop() as shop:
                try:
                    shop.count(1000, wait, pause=3600)
                except KeyboardInterrupt as interruption:
                    print(*interruption.__notes__)
        """) == ["workshop: open", "0", "-1", "something was left behind", "workshop: closed"]

    def test_uncaught_it_ends_the_program_as_usual(self) -> None:
        done = run("""
            with BlockingWorkshop() as shop:
                shop.nap_interrupted()
        """)
        assert done.lines == ["workshop: open", "nap: cleaned up", "workshop: closed"]
        assert done.errors.splitlines()[-1] == "KeyboardInterrupt"
        assert done.code == -2

    def test_while_entering_a_context(self) -> None:
        assert printed("""
            with BlockingWorkshop() as shop:
                try:
                    with shop.borrow(is_interrupted=True):
                        print("NEVER")
                except KeyboardInterrupt:
                    print("interrupted")
        """) == ["workshop: open", "borrow: given back in one task", "interrupted", "workshop: closed"]

    def test_while_a_constructor_opens(self) -> None:
        assert printed("""
            try:
                BlockingWorkshop(is_interrupted=True)
            except KeyboardInterrupt:
                print("interrupted")
        """) == ["workshop: not opened", "interrupted"]

    def test_between_the_items_of_an_iterator(self) -> None:
        assert printed("""
            with BlockingWorkshop() as shop:
                steps = shop.steps(3)
                try:
                    for number in steps:
                        shop.nap_interrupted()
                except KeyboardInterrupt:
                    print("interrupted")
                steps.close()
                print(shop.add(1))
        """) == [
            "workshop: open",
            "nap: cleaned up",
            "interrupted",
            "steps: cleaned up in one task",
            "3",
            "workshop: closed",
        ]

    def test_an_operation_goes_on_when_its_waiter_is_interrupted(self) -> None:
        assert printed("""
            with BlockingWorkshop() as shop:
                release = threading.Event()
                job = shop.start("dig", until=release.is_set)
                main = threading.main_thread().ident
                try:
                    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
                    job.result()
                except KeyboardInterrupt:
                    print("interrupted")
                release.set()
                print(job.result())
        """) == ["workshop: open", "interrupted", "dig", "workshop: closed"]


class TestFork:
    def test_old_objects_say_so_and_new_ones_work(self) -> None:
        assert printed("""
            with BlockingWorkshop("parent's") as shop:
                steps = shop.steps(3)
                next(steps)
                child = os.fork()
                if child == 0:
                    for use in (lambda: shop.add(1), lambda: next(steps), steps.close):
                        try:
                            use()
                        except Exception as error:
                            print(type(error).__name__, "forked child" in str(error))
                    del steps
                    with BlockingWorkshop("child's") as fresh:
                        print(fresh.process_id() == os.getpid())
                    os._exit(0)
                os.waitpid(child, 0)
                print(shop.add(1), next(steps))
                steps.close()
        """) == [
            "parent's: open",
            "ClosedError True",
            "ClosedError True",
            "ClosedError True",
            "child's: open",
            "True",
            "child's: closed",
            "3 1",
            "steps: cleaned up in one task",
            "parent's: closed",
        ]

    def test_a_child_that_exits_leaves_the_parents_shop_alone(self) -> None:
        assert printed("""
            with BlockingWorkshop() as shop:
                with shop.borrow():
                    child = os.fork()
                    if child == 0:
                        sys.exit()
                print("child exited with", os.waitpid(child, 0)[1])
                print(shop.add(1))
        """) == [
            "workshop: open",
            "borrow: given back in one task",
            "child exited with 0",
            "3",
            "workshop: closed",
        ]

    def test_while_another_thread_starts_the_loop(self) -> None:
        """The child inherits every lock as it was, and nobody who would release it."""
        assert printed("""
            with _bridge.current()._starting:
                child = os.fork()
                if child == 0:
                    with BlockingWorkshop("child's"):
                        os._exit(0)
            print("child exited with", os.waitpid(child, 0)[1])
        """) == ["child's: open", "child exited with 0"]

    def test_worker_processes_of_multiprocessing(self) -> None:
        assert printed("""
            import multiprocessing, pickle

            def use(tool):
                with BlockingWorkshop("child's") as shop:
                    return tool.use(), shop.add(1)

            with BlockingWorkshop() as shop:
                tool = shop.make_tool("saw")
                with multiprocessing.get_context("fork").Pool(1) as pool:
                    print(pool.apply(use, [tool]))
                print(tool.use())
        """) == ["workshop: open", "child's: open", "child's: closed", "('saw', 3)", "saw", "workshop: closed"]


class TestExit:
    def test_without_close(self) -> None:
        done = run("""
            shop = BlockingWorkshop()
            steps = shop.steps(3)
            next(steps)
            tool = shop.borrow()
            tool.__enter__()
            print("end of the script")
        """)
        assert done.lines[:2] == ["workshop: open", "end of the script"]
        assert sorted(done.lines[2:]) == [
            "borrow: given back in one task",
            "steps: cleaned up in one task",
            "workshop: closed",
        ]
        assert (done.code, done.errors) == (0, "")

    def test_with_an_operation_under_way(self) -> None:
        done = run("""
            shop = BlockingWorkshop()
            job = shop.start("dig", until=bool)
            sys.exit(3)
        """)
        assert (done.lines, done.errors, done.code) == (["workshop: open", "workshop: closed"], "", 3)

    def test_with_a_daemon_thread_in_a_call(self) -> None:
        done = run("""
            shop = BlockingWorkshop()
            started = threading.Event()

            async def nap():
                started.set()
                try:
                    await asyncio.sleep(3600)
                finally:
                    print("nap: cleaned up")

            threading.Thread(target=_bridge.current().run, args=[nap], daemon=True).start()
            started.wait()
        """)
        assert (done.errors, done.code) == ("", 0)
        assert sorted(done.lines) == ["nap: cleaned up", "workshop: closed", "workshop: open"]

    def test_with_a_cleanup_that_never_ends(self) -> None:
        done = run("""
            _bridge.EXIT_SECONDS = 0.2
            shop = BlockingWorkshop()
            started = threading.Event()

            async def stubborn():
                started.set()
                while True:
                    try:
                        await asyncio.sleep(3600)
                    except asyncio.CancelledError:
                        pass

            threading.Thread(target=_bridge.current().run, args=[stubborn], daemon=True).start()
            started.wait()
        """)
        assert done.code == 0
        assert done.lines[0] == "workshop: open"

    def test_with_worker_threads_that_are_idle(self) -> None:
        done = run("""
            import anyio.to_thread

            async def steps():
                yield await anyio.to_thread.run_sync(lambda: "in a worker")
                yield await asyncio.to_thread(lambda: "in another")

            items = _bridge.current().iterate(steps)
            print(next(items), next(items))
        """)
        assert (done.lines, done.errors, done.code) == (["in a worker in another"], "", 0)

    def test_with_a_function_that_blocks_the_loop(self) -> None:
        done = run("""
            _bridge.EXIT_SECONDS = 0.2
            shop = BlockingWorkshop()
            started = threading.Event()
            block = lambda: started.set() or time.sleep(3600)
            threading.Thread(target=_bridge.current().call, args=[block], daemon=True).start()
            started.wait()
        """)
        assert (done.lines, done.errors, done.code) == (["workshop: open"], "", 0)

    def test_calls_at_exit_work_until_the_loop_is_gone(self) -> None:
        assert printed("""
            import atexit
            shop = BlockingWorkshop()

            @atexit.register
            def leave():
                print(shop.add(1))
                shop.close()
        """) == ["workshop: open", "3", "workshop: closed"]

    def test_calls_after_the_loop_is_gone_say_so(self) -> None:
        assert printed("""
            import atexit

            @atexit.register  # before the import that registers the end of the loop, so it runs after it
            def leave():
                try:
                    shop.add(1)
                except Exception as error:
                    print(type(error).__name__, error)

            for name in [name for name in sys.modules if name.startswith(("loops_sync", "workshop"))]:
                del sys.modules[name]
            from workshop import BlockingWorkshop
            shop = BlockingWorkshop()
        """) == [
            "workshop: open",
            "workshop: closed",
            "ClosedError the interpreter is exiting, and the event loop of loops_sync has ended",
        ]


class TestThreads:
    def test_one_loop_however_many_begin_at_once(self) -> None:
        assert printed("""
            together = threading.Barrier(64)
            results = []

            async def greet():
                return "hello"

            def use():
                together.wait()
                results.append(_bridge.current().run(greet))

            threads = [threading.Thread(target=use) for _ in range(64)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print(len(results), [thread.name for thread in threading.enumerate()])
        """) == ["64 ['MainThread', 'loops_sync']"]

    def test_importing_starts_no_thread(self) -> None:
        assert printed("print(threading.active_count())") == ["1"]

    def test_from_within_a_running_loop(self) -> None:
        assert printed("""
            async def main():
                with BlockingWorkshop() as shop:
                    print(shop.add(1))

            asyncio.run(main())
        """) == ["workshop: open", "3", "workshop: closed"]


class TestWorkers:
    """What the threads of rollouts do to a process, and it to them."""

    LEFT = ("belt: left in one task", "interrupted", "['cancelled 0', 'tool 0'] ['MainThread', 'loops_sync']")

    def test_an_interrupt_in_the_body_leaves(self) -> None:
        assert printed("""
            stuck = Stuck()
            with BlockingWorkshop() as shop:
                try:
                    with shop.belt(stuck, range(1)):
                        stuck.has_begun.wait()
                        interrupt()
                        time.sleep(3600)
                except KeyboardInterrupt:
                    print("interrupted")
                print(stuck.seen, [thread.name for thread in threading.enumerate()])
        """) == ["workshop: open", *self.LEFT, "workshop: closed"]

    def test_an_interrupt_while_waiting_for_the_next_leaves(self) -> None:
        assert printed("""
            stuck, is_waiting = Stuck(), threading.Event()

            def work(tool, number):
                is_waiting.wait()
                interrupt()
                stuck(tool, number)

            with BlockingWorkshop() as shop:
                try:
                    with shop.belt(work, range(1)) as belt:
                        is_waiting.set()
                        next(belt)
                except KeyboardInterrupt:
                    print("interrupted")
                while "tool 0" not in stuck.seen:
                    time.sleep(0.01)
                print(stuck.seen, [thread.name for thread in threading.enumerate()])
        """) == ["workshop: open", *self.LEFT, "workshop: closed"]

    def test_exiting_in_the_body_leaves(self) -> None:
        done = run("""
            stuck = Stuck()
            with BlockingWorkshop() as shop, shop.belt(stuck, range(1)):
                stuck.has_begun.wait()
                sys.exit(3)
        """)
        lines = ["workshop: open", "belt: left in one task", "workshop: closed"]
        assert (done.lines, done.errors, done.code) == (lines, "", 3)

    def test_the_end_of_the_program_cancels_what_was_never_left(self) -> None:
        lines = printed("""
            has_begun = threading.Event()

            def work(tool, number):
                has_begun.set()
                try:
                    tool.nap()
                except asyncio.CancelledError:
                    print("cancelled")
                    raise

            belt = BlockingWorkshop().belt(work, range(1))
            belt.__enter__()
            has_begun.wait()
            print("end of the script")
        """)
        assert lines[:2] == ["workshop: open", "end of the script"]
        ended = "".join(lines[2:])  # two threads print, and may come between a line and its end
        for line in ("belt: left in one task", "cancelled", "workshop: closed"):
            assert ended.count(line) == 1

    def test_the_end_of_the_program_does_not_wait_for_what_computes(self) -> None:
        assert (
            printed("""
            _bridge.EXIT_SECONDS = 0.2
            has_begun = threading.Event()

            def work(tool, number):
                has_begun.set()
                while True:
                    time.sleep(0.01)

            belt = BlockingWorkshop().belt(work, range(1))
            belt.__enter__()
            has_begun.wait()
        """)[0]
            == "workshop: open"
        )

    def test_a_fork_while_they_run(self) -> None:
        assert printed("""
            stuck = Stuck()
            with BlockingWorkshop() as shop:
                with shop.belt(stuck, range(1)) as belt:
                    stuck.has_begun.wait()
                    child = os.fork()
                    if child == 0:
                        try:
                            next(belt)
                        except Exception as error:
                            print(type(error).__name__, "forked child" in str(error))
                        with BlockingWorkshop("child's") as other:
                            with other.belt(lambda tool, number: tool.use(), range(2)) as inner:
                                print(sorted(inner))
                        sys.exit()
                    print("child exited with", os.waitpid(child, 0)[1])
                print(stuck.seen)
        """) == [
            "workshop: open",
            "ClosedError True",
            "child's: open",
            "['tool 0', 'tool 1']",
            "belt: left in one task",
            "child's: closed",
            "child exited with 0",
            "belt: left in one task",
            "['cancelled 0', 'tool 0']",
            "workshop: closed",
        ]

    def test_a_fork_in_one_of_them(self) -> None:
        assert printed("""
            def work(tool, number):
                child = os.fork()
                if child == 0:
                    with BlockingWorkshop("child's") as other:
                        print(other.add(1))
                    os._exit(0)
                return os.waitpid(child, 0)[1], tool.use()

            with BlockingWorkshop() as shop, shop.belt(work, range(1)) as belt:
                print(next(belt))
        """) == [
            "workshop: open",
            "child's: open",
            "3",
            "child's: closed",
            "(0, 'tool 0')",
            "belt: left in one task",
            "workshop: closed",
        ]

    def test_a_thousand_run_at_once(self) -> None:
        assert printed("""
            together = threading.Barrier(1000)

            def work(tool, number):
                together.wait()
                return tool.use()

            with BlockingWorkshop() as shop:
                with shop.belt(work, range(1000), at_once=1000) as belt:
                    print(len(set(belt)))
                print([thread.name for thread in threading.enumerate()])
        """) == [
            "workshop: open",
            "1000",
            "belt: left in one task",
            "['MainThread', 'loops_sync']",
            "workshop: closed",
        ]


class TestStartedCalls:
    def test_none_keeps_the_process_from_ending(self) -> None:
        assert printed("""
            import loops_sync
            shop = BlockingWorkshop()
            job = loops_sync.start(shop.start, "dig", bool)
            print("end")
        """) == ["workshop: open", "end", "workshop: closed"]

    def test_an_interrupted_wait_leaves_the_call_alone(self) -> None:
        assert printed("""
            import loops_sync
            with BlockingWorkshop() as shop:
                ends = threading.Event()
                job = loops_sync.start(shop.start, "dig", ends.is_set)
                threading.Timer(0.05, interrupt).start()
                try:
                    job.result()
                except KeyboardInterrupt:
                    print("interrupted", job.done())
                ends.set()
                print(job.result())
        """) == ["workshop: open", "interrupted False", "dig", "workshop: closed"]

    def test_the_loops_own_thread_is_refused(self) -> None:
        assert printed("""
            import loops_sync
            with BlockingWorkshop() as shop:
                job = loops_sync.start(shop.start, "dig", bool)

                async def use(function):
                    try:
                        function()
                    except loops_sync.ClosedError as error:
                        return str(error)[:24]

                print(_bridge.current().run(use, lambda: loops_sync.start(shop.add, 1)))
                print(_bridge.current().run(use, job.result))
        """) == ["workshop: open", "a blocking call on the e", "waiting for start on the", "workshop: closed"]

    def test_a_forked_child_is_refused(self) -> None:
        assert printed("""
            import loops_sync
            shop = BlockingWorkshop()
            job = loops_sync.start(shop.start, "dig", bool)
            done = loops_sync.start(shop.add, 1)
            done.result()
            pid = os.fork()
            if pid == 0:
                for use in (lambda: loops_sync.start(shop.add, 1), job.result, lambda: asyncio.run(job.result_async())):
                    try:
                        use()
                    except loops_sync.ClosedError as error:
                        print("forked child" in str(error))
                print(done.result(), flush=True)
                os._exit(0)
            os.waitpid(pid, 0)
            shop.close()
        """) == ["workshop: open", "True", "True", "True", "3", "workshop: closed"]

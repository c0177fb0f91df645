"""What a loop in the background can do to a process: scripts, and the order of what they print."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent

BEGIN = """
import asyncio, os, signal, sys, threading, time
import sample_sync
"""


class Finished(NamedTuple):
    """What became of a script."""

    lines: list[str]
    errors: str
    code: int
    seconds: float


def run(script: str) -> Finished:
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}"}
    # Python 3.12 and later warn of any fork in a process with threads; here that is the point.
    command = [sys.executable, "-u", "-W", "ignore:This process:DeprecationWarning", "-c"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, BEGIN + textwrap.dedent(script)], capture_output=True, text=True, timeout=60, env=environment
    )
    return Finished(done.stdout.splitlines(), done.stderr, done.returncode, time.monotonic() - started)


def printed(script: str) -> list[str]:
    """Return what a script prints; it must end well, and say nothing on stderr."""
    done = run(script)
    assert done.errors == ""
    assert done.code == 0
    return done.lines


class TestInterrupts:
    def test_a_call_is_cancelled_and_cleans_up_first(self) -> None:
        assert printed("""
            with sample_sync.Service() as service:
                worker = service.hire("anna")
                try:
                    worker.nap_interrupted(cleanup_seconds=0.2)
                except KeyboardInterrupt:
                    print("interrupted")
                print(worker.add(1))
        """) == ["service: open", "nap: cleaned up", "interrupted", "3", "service: closed"]

    def test_the_wait_for_the_cleanup_is_bounded(self) -> None:
        assert printed("""
            from loops_sync import _bridge
            _bridge.CLEANUP_SECONDS = 0.1
            with sample_sync.Service() as service:
                worker = service.hire("anna")
                try:
                    worker.nap_interrupted(cleanup_seconds=1)
                except KeyboardInterrupt:
                    print("interrupted")
        """)[:2] == ["service: open", "interrupted"]

    def test_uncaught_it_ends_the_program_as_usual(self) -> None:
        done = run("""
            with sample_sync.Service() as service:
                service.hire("anna").nap_interrupted()
        """)
        assert done.lines == ["service: open", "nap: cleaned up", "service: closed"]
        assert done.errors.splitlines()[-1] == "KeyboardInterrupt"
        assert done.code == -2
        assert done.seconds < 10

    def test_while_entering_a_context(self) -> None:
        assert printed("""
            with sample_sync.Service() as service:
                try:
                    with service.hire("anna").borrow("saw", is_interrupted=True):
                        print("NEVER")
                except KeyboardInterrupt:
                    print("interrupted")
        """) == ["service: open", "borrow: given back in one task", "interrupted", "service: closed"]

    def test_while_a_constructor_opens(self) -> None:
        assert printed("""
            try:
                sample_sync.Service(is_interrupted=True)
            except KeyboardInterrupt:
                print("interrupted")
        """) == ["service: not opened", "interrupted"]

    def test_between_the_items_of_an_iterator(self) -> None:
        assert printed("""
            with sample_sync.Service() as service:
                worker = service.hire("anna")
                steps = worker.steps(3)
                try:
                    for number in steps:
                        worker.nap_interrupted()
                except KeyboardInterrupt:
                    print("interrupted")
                steps.close()
                print(worker.add(1))
        """) == [
            "service: open",
            "nap: cleaned up",
            "interrupted",
            "steps: cleaned up in one task",
            "3",
            "service: closed",
        ]

    def test_an_operation_goes_on_when_its_waiter_is_interrupted(self) -> None:
        assert printed("""
            with sample_sync.Service() as service:
                release = threading.Event()
                job = service.hire("anna").start("dig", until=release.is_set)
                main = threading.main_thread().ident
                try:
                    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
                    job.result()
                except KeyboardInterrupt:
                    print("interrupted")
                release.set()
                print(job.result().text)
        """) == ["service: open", "interrupted", "dig", "service: closed"]


class TestFork:
    def test_old_objects_say_so_and_new_ones_work(self) -> None:
        assert printed("""
            with sample_sync.Service("parent's") as service:
                worker = service.hire("anna")
                steps = worker.steps(3)
                next(steps)
                child = os.fork()
                if child == 0:
                    for use in (lambda: worker.add(1), lambda: next(steps), steps.close):
                        try:
                            use()
                        except Exception as error:
                            print(type(error).__name__, "forked child" in str(error))
                    del steps
                    with sample_sync.Service("child's") as fresh:
                        print(fresh.hire("bert").process_id() == os.getpid())
                    os._exit(0)
                os.waitpid(child, 0)
                print(worker.add(1), next(steps))
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

    def test_a_child_that_exits_leaves_the_parents_service_alone(self) -> None:
        assert printed("""
            with sample_sync.Service() as service:
                worker = service.hire("anna")
                with worker, worker.borrow("saw"):
                    child = os.fork()
                    if child == 0:
                        sys.exit()
                print("child exited with", os.waitpid(child, 0)[1])
                print(worker.add(1))
        """) == [
            "service: open",
            "borrow: given back in one task",
            "anna: closed",
            "child exited with 0",
            "3",
            "service: closed",
        ]

    def test_while_another_thread_starts_the_loop(self) -> None:
        """The child inherits every lock as it was, and nobody who would release it."""
        assert printed("""
            from loops_sync import _bridge
            with _bridge.current()._starting:
                child = os.fork()
                if child == 0:
                    with sample_sync.Service("child's"):
                        os._exit(0)
            print("child exited with", os.waitpid(child, 0)[1])
        """) == ["child's: open", "child exited with 0"]

    def test_worker_processes_of_multiprocessing(self) -> None:
        assert printed("""
            import multiprocessing, pickle

            def use(tool):
                with sample_sync.Service("child's") as service:
                    return tool.use(), service.hire("bert").add(1)

            with sample_sync.Service() as service:
                tool = service.hire("anna").make_tool("saw")
                with multiprocessing.get_context("fork").Pool(1) as pool:
                    print(pool.apply(use, [tool]))
                print(tool.use())
        """) == ["service: open", "child's: open", "child's: closed", "('saw', 3)", "saw", "service: closed"]


class TestExit:
    def test_without_close(self) -> None:
        done = run("""
            service = sample_sync.Service()
            worker = service.hire("anna")
            steps = worker.steps(3)
            next(steps)
            tool = worker.borrow("saw")
            tool.__enter__()
            print("end of the script")
        """)
        assert done.lines[:2] == ["service: open", "end of the script"]
        assert sorted(done.lines[2:]) == [
            "borrow: given back in one task",
            "service: closed",
            "steps: cleaned up in one task",
        ]
        assert (done.code, done.errors) == (0, "")
        assert done.seconds < 10

    def test_with_an_operation_under_way(self) -> None:
        done = run("""
            service = sample_sync.Service()
            job = service.hire("anna").start("dig", until=bool)
            sys.exit(3)
        """)
        assert (done.lines, done.errors, done.code) == (["service: open", "service: closed"], "", 3)
        assert done.seconds < 10

    def test_with_a_daemon_thread_in_a_call(self) -> None:
        done = run("""
            from loops_sync._bridge import current
            service = sample_sync.Service()
            started = threading.Event()

            async def nap():
                started.set()
                try:
                    await asyncio.sleep(3600)
                finally:
                    print("nap: cleaned up")

            threading.Thread(target=current().run, args=[nap], daemon=True).start()
            started.wait()
        """)
        assert (done.errors, done.code) == ("", 0)
        assert sorted(done.lines) == ["nap: cleaned up", "service: closed", "service: open"]

    def test_with_a_cleanup_that_never_ends(self) -> None:
        done = run("""
            from loops_sync import _bridge
            _bridge.EXIT_SECONDS = 0.2
            service = sample_sync.Service()
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
        assert done.lines == ["service: open", "service: closed"]
        assert done.seconds < 10

    def test_with_worker_threads_that_are_idle(self) -> None:
        done = run("""
            import anyio.to_thread
            from loops_sync._bridge import current

            async def steps():
                yield await anyio.to_thread.run_sync(lambda: "in a worker")
                yield await asyncio.to_thread(lambda: "in another")

            items = current().iterate(steps)
            print(next(items), next(items))
        """)
        assert (done.lines, done.errors, done.code) == (["in a worker in another"], "", 0)
        assert done.seconds < 10

    def test_with_a_callback_that_blocks_the_loop(self) -> None:
        done = run("""
            from loops_sync import _bridge
            _bridge.EXIT_SECONDS = 0.2
            service = sample_sync.Service()
            worker = service.hire("anna")
            started = threading.Event()
            block = lambda _: started.set() or time.sleep(3600)
            threading.Thread(target=worker.tell, args=[block], daemon=True).start()
            started.wait()
        """)
        assert (done.lines, done.errors, done.code) == (["service: open"], "", 0)
        assert done.seconds < 10

    def test_calls_at_exit_work_until_the_loop_is_gone(self) -> None:
        assert printed("""
            import atexit
            service = sample_sync.Service()

            @atexit.register
            def leave():
                print(service.hire("anna").add(1))
                service.close()
        """) == ["service: open", "3", "service: closed"]

    def test_calls_after_the_loop_is_gone_say_so(self) -> None:
        assert printed("""
            import atexit

            @atexit.register  # before the import that registers the end of the loop, so it runs after it
            def leave():
                try:
                    service.hire("anna")
                except Exception as error:
                    print(type(error).__name__, error)

            for name in [name for name in sys.modules if name.startswith(("loops_sync", "sample_sync"))]:
                del sys.modules[name]
            import sample_sync
            service = sample_sync.Service()
        """) == [
            "service: open",
            "service: closed",
            "ClosedError the interpreter is exiting, and the event loop of loops_sync is gone",
        ]


class TestThreads:
    def test_one_loop_however_many_begin_at_once(self) -> None:
        assert printed("""
            together = threading.Barrier(64)
            results = []

            def use():
                together.wait()
                results.append(sample_sync.greet("a"))

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
                with sample_sync.Service() as service:
                    print(service.hire("anna").add(1))

            asyncio.run(main())
        """) == ["service: open", "3", "service: closed"]

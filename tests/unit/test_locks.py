"""Locks of files: one holder, in whichever process, until it releases the lock or is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from loops_async._batch.lock import only_run
from loops_async._locks import FileLock, LockedError
from loops_async.errors import InputError
from tests.support.patience import PATIENCE_SECONDS

HOLD_AND_FORK: Final = """
import os, pathlib, sys
from loops_async._locks import FileLock
lock = FileLock(pathlib.Path(sys.argv[1]), mode=0o600)
child = os.fork()
if child:
    print(child, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_a_lock_has_one_holder(path: Path) -> None:
    lock = FileLock(path, mode=0o600)
    with pytest.raises(LockedError) as refused:
        FileLock(path, mode=0o600)
    assert refused.value.is_here
    lock.release()
    FileLock(path, mode=0o600).release(removes_file=True)
    assert not path.exists()


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_process(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_FORK, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(LockedError) as refused:
                FileLock(path, mode=0o600)
            assert not refused.value.is_here
            holder.kill()
            holder.wait(PATIENCE_SECONDS)
            FileLock(path, mode=0o600).release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_another_run_of_the_same_program_is_refused(path: Path) -> None:
    with only_run(path, "out.jsonl"):
        for _ in range(2):  # the refusal does not release the lock
            with (
                pytest.raises(InputError, match=f"another run, process {os.getpid()} on "),
                only_run(path, "out.jsonl"),
            ):
                pass
    assert not path.exists()

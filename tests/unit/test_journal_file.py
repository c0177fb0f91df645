"""The file of a journal: what it refuses, what it finds again, and what it shows of a difference."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops_async import ConfigError, JournalError, JournalMismatchError
from loops_async._journal import file as journal_file
from loops_async._journal.content import Content, digest, first_difference
from loops_async._journal.file import JournalFile
from loops_async._journal.journal import Journal, JournalSettings, journal_settings
from loops_async._journal.records import Completed
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import eventually

URL = "https://service.test"
STEP = Content("optim_step", b'{"adam_params":{"learning_rate":0.1,"beta1":0.9},"seq_id":0}')


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "SYNCHRONOUS", "OFF")  # no machine loses its power here


def pass_of(*datums: bytes) -> Content:
    return Content("forward_backward", b'{"loss_fn":"cross_entropy"}', b"".join(map(digest, datums)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.journal"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[[], JournalFile]]:
    """Open the journal, as a program does that was started again; the one before is closed."""
    files: list[JournalFile] = []

    def again() -> JournalFile:
        while files:
            files.pop().close()
        files.append(JournalFile(path, URL))
        return files[-1]

    yield again
    while files:
        files.pop().close()


# --- what is refused ---


def test_it_is_readable_for_its_owner_alone(path: Path, opened: Callable[[], JournalFile]) -> None:
    path.touch(mode=0o644)
    file = opened()
    with file.transaction():
        file.creation("session", b"{}")
    made = list(path.parent.iterdir())
    assert len(made) == 4  # also what SQLite has beside it, and the lock
    assert [stat.S_IMODE(one.stat().st_mode) for one in made] == [0o600] * 4


def test_a_second_client_of_the_program_is_refused(path: Path, opened: Callable[[], JournalFile]) -> None:
    opened()
    with pytest.raises(JournalError, match="in use by another client of this program"):
        JournalFile(path, URL)
    opened()  # which closes the first, so that the next one may


def test_a_second_program_is_refused_until_the_first_is_killed(path: Path) -> None:
    code = "import sys; from pathlib import Path; from loops_async._journal.file import JournalFile\n"
    code += "file = JournalFile(Path(sys.argv[1]), sys.argv[2]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path), URL], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(JournalError, match="in use by another program"):
            JournalFile(path, URL)
        other.kill()
        other.wait(PATIENCE_SECONDS)
    JournalFile(path, URL).close()


def test_a_journal_of_another_service_is_refused(path: Path) -> None:
    JournalFile(path, URL).close()
    with pytest.raises(JournalError, match=r"of the service at https://service\.test.*this client is for http://other"):
        JournalFile(path, "http://other")


def test_a_journal_of_another_version_is_refused(path: Path) -> None:
    JournalFile(path, URL).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalError, match="has the format 99"):
        JournalFile(path, URL)


def test_other_files_are_refused_and_left_as_they_are(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE notes (text)")
    with pytest.raises(JournalError, match="another program's database"):
        JournalFile(path, URL)
    path.write_text("my notes\n" * 100)
    with pytest.raises(JournalError, match="cannot be read or written"):
        JournalFile(path, URL)
    assert path.read_text() == "my notes\n" * 100


def test_a_damaged_file_is_said(path: Path) -> None:
    JournalFile(path, URL).close()
    with path.open("r+b") as file:
        file.seek(4096)  # behind the page that says what the file is
        file.write(b"\xff" * 40_000)
    with pytest.raises(JournalError, match="cannot be read or written"):
        JournalFile(path, URL)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"nowhere.*No such file"):
        JournalFile(tmp_path / "nowhere" / "train.journal", URL)


@pytest.mark.parametrize(("path", "samples"), [("", False), (3, False), (None, True), ("x", "yes")])
def test_arguments_are_checked(path: Any, samples: object) -> None:
    with pytest.raises(ConfigError, match="journal"):
        journal_settings(path, samples)


# --- operations ---


def test_an_operation_is_found_by_its_place(opened: Callable[[], JournalFile]) -> None:
    file = opened()
    with file.transaction():
        first = file.begin("r", 0, pass_of(b"a"), ["k0"], repeats=False)
        file.begin("r", 1, STEP, ["k1"], repeats=False)
        file.accepted("r", "k0", "op0")
        file.done("r", "k0", b'{"loss":1}')
        file.accepted("r", "k1", "op1")
    assert not first.is_earlier

    file = opened()
    found = [file.begin("r", 0, pass_of(b"a"), ["n0"], repeats=False), file.begin("r", 1, STEP, ["n1"], repeats=False)]
    assert [(each.is_earlier, each.parts[0].key, each.parts[0].operation_id) for each in found] == [
        (True, "k0", "op0"),
        (True, "k1", "op1"),
    ]
    assert [each.parts[0].outcome for each in found] == [b'{"loss":1}', None]
    assert not file.begin("r", 2, STEP, ["n2"], repeats=False).is_earlier
    assert not file.begin("other", 0, STEP, ["n3"], repeats=False).is_earlier


def test_the_first_difference_is_shown(opened: Callable[[], JournalFile]) -> None:
    file = opened()
    file.begin("r", 0, STEP, ["k"], repeats=False)
    other = Content("optim_step", STEP.body.replace(b"0.1", b"0.2"))
    with pytest.raises(JournalMismatchError, match=r"operation 0 of run r differs in adam_params\.learning_rate") as e:
        file.begin("r", 0, other, ["n"], repeats=False)
    assert (e.value.field, e.value.recorded, e.value.given) == ("adam_params.learning_rate", "0.1", "0.2")


@pytest.mark.parametrize(
    ("recorded", "given", "field"),
    [
        (STEP, pass_of(b"a"), "operation"),
        (pass_of(b"a"), pass_of(b"a", b"b"), "number of datums"),
        (pass_of(b"a", b"b", b"c"), pass_of(b"a", b"x", b"y"), "data[1]"),
        (Content("x", b'{"a":{"b":1}}'), Content("x", b'{"a":{"b":1,"c":2}}'), "a.c"),
        (Content("x", b'{"a":null}'), Content("x", b'{"a":0}'), "a"),
        (Content("x", b'{"seq_id":1,"run_id":"a","model":"m"}'), Content("x", b'{"seq_id":2}'), None),
    ],
)
def test_where_contents_differ(recorded: Content, given: Content, field: str | None) -> None:
    difference = first_difference(recorded, given)
    assert (difference and difference.field) == field


@given(st.lists(st.binary(max_size=3), max_size=6), st.lists(st.binary(max_size=3), max_size=6))
def test_contents_are_equal_if_their_datums_are(first: Sequence[bytes], second: Sequence[bytes]) -> None:
    assert (first_difference(pass_of(*first), pass_of(*second)) is None) == (first == second)


def test_a_repeated_operation_keeps_its_place(opened: Callable[[], JournalFile]) -> None:
    file = opened()
    file.begin("r", 0, STEP, ["a", "b"], repeats=False)
    file.done("r", "a", b"1")
    file.failed("r", "b", b"{}")
    file.begin("r", 1, pass_of(b"x"), ["c"], repeats=False)
    again = file.begin("r", 2, STEP, ["a", "new"], repeats=True)
    assert (again.place, [(each.key, each.outcome, each.failure) for each in again.parts]) == (
        0,
        [("a", b"1", None), ("new", None, None)],
    )


def test_a_place_that_was_given_back_is_free(opened: Callable[[], JournalFile]) -> None:
    file = opened()
    file.begin("r", 0, STEP, ["a"], repeats=False)
    file.withdrawn("r", 0)
    assert file.begin("r", 0, pass_of(b"x"), ["b"], repeats=False).parts[0].key == "b"


# --- creations ---


def test_creations_are_found_by_content_in_any_order(opened: Callable[[], JournalFile]) -> None:
    file = opened()
    for id_, request in (("r1", b'{"rank":1}'), ("r2", b'{"rank":2}'), ("r3", b'{"rank":1}')):
        file.created(file.creation("run", request).number, id_)
    file = opened()
    requests = (b'{"rank":2}', b'{"rank":1}', b'{"rank":1}')
    assert [file.creation("run", each).id for each in requests] == ["r2", "r1", "r3"]
    assert file.creation("run", b'{"rank":1}').id is None


def test_a_creation_that_differs_is_shown(opened: Callable[[], JournalFile]) -> None:
    file = opened()
    file.created(file.creation("run", b'{"rank":1}').number, "r1")
    with pytest.raises(JournalMismatchError, match="run r1 differs in rank: the journal has 1, the program asks for 2"):
        opened().creation("run", b'{"rank":2}')


def test_what_is_forgotten_is_made_again(opened: Callable[[], JournalFile]) -> None:
    file = opened()
    file.forget_creation(file.creation("run", b"{}").number)
    assert not opened().creation("run", b"{}").is_earlier


# --- samples ---


def answered(file: JournalFile, made: bytes, text: bytes, version: str = "") -> None:
    file.sampled(
        made, file.take_sample(made, floor=0, key="k", is_kept=False, oldest=0).number, Completed(text, version)
    )


def test_the_nth_request_gets_the_nth_answer(opened: Callable[[], JournalFile]) -> None:
    file = opened()
    for text in (b"1", b"2"):
        answered(file, b"d", text)
    assert file.take_sample(b"d", floor=0, key="k", is_kept=False, oldest=0).answer is None  # of this process

    file = opened()
    found = [file.take_sample(b"d", floor=0, key="k", is_kept=False, oldest=0).answer for _ in range(3)]
    assert found == [Completed(b"1"), Completed(b"2"), None]
    assert file.take_sample(b"e", floor=0, key="k", is_kept=False, oldest=0).answer is None


def test_answers_of_older_weights_are_left_out(opened: Callable[[], JournalFile]) -> None:
    file = opened()
    for text, version in ((b"old", "3"), (b"new", "12")):
        answered(file, b"d", text, version)
    found = opened().take_sample(b"d", floor=4, key="k", is_kept=False, oldest=0)
    assert found.answer == Completed(b"new", "12")


def test_a_queued_sample_is_sent_again_under_its_key(opened: Callable[[], JournalFile]) -> None:
    file = opened()
    file.take_sample(b"d", floor=0, key="sent", is_kept=True, oldest=0)
    assert opened().take_sample(b"d", floor=0, key="new", is_kept=True, oldest=0).key == "sent"
    assert opened().take_sample(b"d", floor=0, key="new", is_kept=True, oldest=1e12).key == "new"  # long ago


# --- the thread ---


async def test_the_thread_ends_with_the_journal(path: Path) -> None:
    journal = Journal(JournalSettings(path), URL)
    await journal.open()
    assert any(thread.name == "loops-journal" for thread in threading.enumerate())
    await journal.close()
    JournalFile(path, URL).close()
    await eventually(lambda: not any(thread.name == "loops-journal" for thread in threading.enumerate()))


async def test_what_waits_is_written_at_once(path: Path) -> None:
    journal = Journal(JournalSettings(path), URL)
    await journal.open()
    held, release = threading.Event(), threading.Event()
    commits: list[int] = []

    def hold(file: JournalFile) -> None:
        file._db.set_trace_callback(lambda said: commits.append(1) if said == "COMMIT" else None)
        held.set()
        release.wait(PATIENCE_SECONDS)

    journal._thread.post(hold)
    held.wait(PATIENCE_SECONDS)
    begun = [
        journal._thread.run(lambda file, n=n: file.begin("r", n, STEP, [f"{n}"], repeats=False)) for n in range(99)
    ]
    release.set()
    assert [(await each).place for each in begun] == list(range(99))
    assert len(commits) == 2  # that of the first, and one for all others
    await journal.close()


async def _never(key: str) -> Completed:
    raise AssertionError(key)


async def test_a_sample_that_cannot_be_recorded_is_returned(path: Path) -> None:
    journal = Journal(JournalSettings(path, samples=True), URL)
    await journal.open()
    answer = Completed(b"paid")

    async def ask(key: str) -> Completed:
        journal._thread.post(lambda file: file._db.execute("INSERT INTO nowhere VALUES (1)"))
        return answer

    assert await journal.sample([b"request"], "key", ask, floor=0, is_queued=False) == answer
    await journal.close()


async def test_a_file_that_cannot_be_written_fails_what_is_asked_next(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(JournalSettings(path), URL)
    await journal.open()
    journal._thread.post(lambda file: file._db.execute("INSERT INTO nowhere VALUES (1)"))
    with pytest.raises(JournalError, match="cannot be read or written: no such table"):
        await journal.begin("r", 0, lambda: STEP, ["k"], repeats=False)
    assert "the journal ends here" in caplog.text
    with pytest.raises(JournalError):  # before it is paid for
        await journal.sample([b"request"], "key", _never, floor=0, is_queued=False)
    await journal.close()


async def test_a_full_disk_is_said_with_what_to_do(path: Path) -> None:
    journal = Journal(JournalSettings(path), URL)
    await journal.open()
    journal._thread.post(lambda file: file._db.execute("PRAGMA max_page_count = 1"))  # as few as it has
    big = Content("forward_backward", b"x" * 100_000)
    with pytest.raises(JournalError, match=r"disk is full\. Make room, and start the program again"):
        await journal.begin("r", 0, lambda: big, ["k"], repeats=False)
    await journal.close()


async def test_an_entry_that_is_damaged_is_said(path: Path) -> None:
    with closing(JournalFile(path, URL)) as file, file.transaction():
        file.begin("r", 0, STEP, ["k"], repeats=False)
        file.done("r", "k", b"{}")
        file._db.execute("UPDATE parts SET outcome = x'00'")
    journal = Journal(JournalSettings(path), URL)
    await journal.open()
    with pytest.raises(JournalError, match="cannot be read or written"):
        await journal.begin("r", 0, lambda: STEP, ["k"], repeats=False)
    await journal.close()

"""The file of a journal: an SQLite database, which one thread reads and writes.

============  ==========================================================================================
table         one row for each
============  ==========================================================================================
`about`       fact about the journal: the service, when it was made
`creations`   session, run or sampler that was asked for: the request, and the id of what was made
`operations`  operation of a run, by its place in the order: what it is, and a digest of each datum
`parts`       request of an operation (one, unless it was split): its key, its id, its outcome
`samples`     sample: a digest of the request, and the answer
`batches`     batch that a stream of rollouts handed out: its episodes, and the state of the stream
============  ==========================================================================================
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
import zlib
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import msgspec

from .._locks import FileLock, LockedError
from ..errors import JournalError, JournalMismatchError
from .content import Content, Difference, first_difference, first_difference_of_json
from .records import Completed, Creation, RecordedOperation, RecordedPart, RecordedSample

APPLICATION: Final = 0x4C4A524E
"""Marks a database as a journal, "LJRN"."""

VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE creations (
    number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, request BLOB NOT NULL, begun REAL NOT NULL, id TEXT,
    ended REAL
);
CREATE TABLE operations (
    number INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT, place INTEGER, name TEXT NOT NULL, body BLOB NOT NULL,
    datums BLOB NOT NULL, begun REAL NOT NULL, refused INTEGER NOT NULL DEFAULT 0, UNIQUE (run_id, place)
);
CREATE TABLE parts (
    run_id TEXT, place INTEGER, part INTEGER, key TEXT NOT NULL, operation_id TEXT, outcome BLOB, failure BLOB,
    PRIMARY KEY (run_id, place, part)
);
CREATE INDEX parts_by_key ON parts (run_id, key);
CREATE TABLE samples (
    number INTEGER PRIMARY KEY, digest BLOB NOT NULL, begun REAL NOT NULL, key TEXT, answer BLOB,
    version TEXT NOT NULL DEFAULT '', request_id TEXT
);
CREATE INDEX samples_by_digest ON samples (digest, number);
CREATE TABLE batches (stream TEXT, place INTEGER, batch BLOB NOT NULL, PRIMARY KEY (stream, place));
"""

SYNCHRONOUS: Final = "FULL"
"""A commit is on disk when it returns, so that it also survives a machine that loses its power."""

NUMBERED: Final = ("creations", "operations", "samples")

_COMPRESSION: Final = 1
"""zlib's fastest: numbers as text become half as large."""

_LAST_STATE: Final = """
SELECT parts.outcome FROM operations JOIN parts USING (run_id, place)
WHERE run_id = ? AND name = 'save_state' AND outcome IS NOT NULL ORDER BY place DESC LIMIT 1
"""


class JournalFile:
    """An open journal. All of it runs in one thread, and whatever writes within a `transaction`.

    Args:
        path: the file, which is made if it does not exist, and is readable for its owner alone.
        base_url: the service that the journal is of.

    Raises:
        JournalError: the file is no journal, is of another service or version, or is in use.
    """

    def __init__(self, path: Path, base_url: str) -> None:
        self.path = path
        self._lock = _locked(path)
        self._claimed: set[int] = set()
        try:
            self._db = _connected(path)
            try:
                _prepare(self._db, path, base_url)
                self.id: str = str(self._fact("id"))
                self._earlier: dict[str, int] = {table: self._last(table) for table in NUMBERED}
                """The number of the last row that an earlier process has written."""
            except BaseException as error:
                self._db.close()
                raise journal_error(path, error) from None
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Close the file, which is complete."""
        try:
            self._db.close()
        finally:
            self._lock.release()

    @contextmanager
    def transaction(self) -> Generator[None]:
        """Write all that the block writes, at once and to disk, or nothing."""
        self._db.execute("BEGIN")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @property
    def has_samples(self) -> bool:
        """Whether an earlier process has recorded samples."""
        return self._earlier["samples"] > 0

    # --- creations ---

    def creation(self, kind: str, request: bytes) -> Creation:
        """Return the record of a creation that the program has not asked for yet; a new one if there is none.

        Creations are found by their content, since those of several threads have no order.

        Raises:
            JournalMismatchError: earlier processes asked for others of this kind, which this one did not ask for.
        """
        recorded = [each for each in self.creations(kind) if each.number not in self._claimed]
        found = next((each for each in recorded if each.request == request), None)
        if found is None and recorded:
            difference = first_difference_of_json(recorded[0].request, request)
            raise _mismatch(self.path, f"{kind} {recorded[0].id or '(not answered)'}", difference)
        if found is None:
            begun = time.time()
            cursor = self._db.execute(
                "INSERT INTO creations (kind, request, begun) VALUES (?, ?, ?)", (kind, request, begun)
            )
            found = Creation(int(cursor.lastrowid or 0), kind, request, begun)
        self._claimed.add(found.number)
        return found

    def creations(self, kind: str) -> list[Creation]:
        """Return all creations of a kind, in order."""
        rows = self._db.execute(
            "SELECT number, kind, request, begun, id, ended FROM creations WHERE kind = ? ORDER BY number", (kind,)
        )
        earlier = self._earlier["creations"]
        return [
            Creation(number, kind, request, begun, id_, ended, is_earlier=number <= earlier)
            for number, kind, request, begun, id_, ended in rows
        ]

    def created(self, number: int, id_: str) -> None:
        """Record the id of what was made."""
        self._db.execute("UPDATE creations SET id = ? WHERE number = ?", (id_, number))

    def forget_creation(self, number: int) -> None:
        """Forget what was not made, or what was ended since it did not become ready."""
        self._db.execute("DELETE FROM creations WHERE number = ?", (number,))

    def ended(self, id_: str) -> None:
        """Record that the program deactivated what it had made."""
        self._db.execute("UPDATE creations SET ended = ? WHERE id = ?", (time.time(), id_))

    def last_state(self, run_id: str) -> str | None:
        """Return the path of the last training state that a run saved."""
        return last_state(self._db, run_id)

    # --- operations ---

    def begin(
        self, run_id: str, place: int, content: Content, keys: Sequence[str], *, repeats: bool
    ) -> RecordedOperation:
        """Record an operation before it is sent, or return what is recorded in its place.

        An operation that `repeats` one of this process keeps the place of that; parts with new keys have no outcome.

        Raises:
            JournalMismatchError: another operation is recorded in its place.
        """
        repeated = self._place_of(run_id, keys) if repeats else None
        recorded = self._operation(run_id, place if repeated is None else repeated)
        if recorded is None:
            return self._new_operation(run_id, place, content, keys)
        found, earlier = recorded
        difference = first_difference(earlier, content)
        if difference is None and len(found.parts) != len(keys):
            difference = Difference("number of requests", f"{len(found.parts)}", f"{len(keys)}")
        if difference is not None:
            raise _mismatch(self.path, f"operation {found.place} of run {run_id}", difference)
        if repeated is not None:
            for index, (part, key) in enumerate(zip(found.parts, keys, strict=True)):
                if part.key != key:
                    found.parts[index] = RecordedPart(key)
                    self._put_part(run_id, found.place, index, key)
        return found

    def _place_of(self, run_id: str, keys: Sequence[str]) -> int | None:
        for key in keys:
            row = self._db.execute("SELECT place FROM parts WHERE run_id = ? AND key = ?", (run_id, key)).fetchone()
            if row is not None:
                return int(row[0])
        return None

    def _operation(self, run_id: str, place: int) -> tuple[RecordedOperation, Content] | None:
        where = "WHERE run_id = ? AND place = ?"
        row = self._db.execute(
            f"SELECT name, body, datums, begun, refused, number FROM operations {where}",  # noqa: S608 - a constant
            (run_id, place),
        ).fetchone()
        if row is None:
            return None
        parts = self._db.execute(
            f"SELECT key, operation_id, outcome, failure FROM parts {where} ORDER BY part",  # noqa: S608 - a constant
            (run_id, place),
        )
        found = RecordedOperation(
            place,
            [RecordedPart(key, id_, _unpacked(outcome), failure) for key, id_, outcome, failure in parts],
            begun=row[3],
            is_refused=bool(row[4]),
            is_earlier=row[5] <= self._earlier["operations"],
        )
        return found, Content(*row[:3])

    def _new_operation(self, run_id: str, place: int, content: Content, keys: Sequence[str]) -> RecordedOperation:
        begun = time.time()
        self._db.execute(
            "INSERT INTO operations (run_id, place, name, body, datums, begun) VALUES (?, ?, ?, ?, ?, ?)",
            (run_id, place, content.operation, content.body, content.datums, begun),
        )
        for index, key in enumerate(keys):
            self._put_part(run_id, place, index, key)
        return RecordedOperation(place, [RecordedPart(key) for key in keys], begun)

    def _put_part(self, run_id: str, place: int, part: int, key: str) -> None:
        row = (run_id, place, part, key)
        self._db.execute("INSERT OR REPLACE INTO parts (run_id, place, part, key) VALUES (?, ?, ?, ?)", row)

    def accepted(self, run_id: str, key: str, operation_id: str) -> None:
        """Record the id that the service gave a part."""
        self._db.execute("UPDATE parts SET operation_id = ? WHERE run_id = ? AND key = ?", (operation_id, run_id, key))

    def done(self, run_id: str, key: str, outcome: bytes) -> None:
        """Record the result of a part."""
        self._db.execute("UPDATE parts SET outcome = ? WHERE run_id = ? AND key = ?", (_packed(outcome), run_id, key))

    def failed(self, run_id: str, key: str, failure: bytes) -> None:
        """Record that the service executed a part, and that it failed."""
        self._db.execute("UPDATE parts SET failure = ? WHERE run_id = ? AND key = ?", (failure, run_id, key))

    def refused(self, run_id: str, place: int) -> None:
        """Record that the service refused an operation: it keeps its place, since it is refused again."""
        self._db.execute("UPDATE operations SET refused = 1 WHERE run_id = ? AND place = ?", (run_id, place))

    def withdrawn(self, run_id: str, place: int) -> None:
        """Forget an operation that certainly did not reach the service: its place is free again."""
        for table in ("operations", "parts"):
            self._db.execute(f"DELETE FROM {table} WHERE run_id = ? AND place = ?", (run_id, place))  # noqa: S608

    # --- samples ---

    def take_sample(self, digest: bytes, *, floor: int, key: str, is_kept: bool, oldest: float) -> RecordedSample:
        """Return the next sample of this digest that an earlier process has recorded, or a new one.

        Args:
            digest: what identifies the request; the n-th request with it gets the n-th such sample.
            floor: leave out answers of older weights.
            key: the key of a new sample.
            is_kept: whether a new one is recorded before it is sent: a queue executes what has the same key once.
            oldest: the time before which a sample without an answer is no longer known to the queue.
        """
        row = self._db.execute(
            "SELECT number, key, answer, version, request_id FROM samples WHERE digest = ? AND number <= ?"
            " AND number > coalesce((SELECT number FROM taken WHERE taken.digest = samples.digest), 0)"
            " AND (version = '' OR CAST(version AS INTEGER) >= ?) AND (answer IS NOT NULL OR begun > ?)"
            " ORDER BY number LIMIT 1",
            (digest, self._earlier["samples"], floor, oldest),
        ).fetchone()
        if row is not None:
            number, sent, answer, version, request_id = row
            self._db.execute("INSERT OR REPLACE INTO taken VALUES (?, ?)", (digest, number))
            body = _unpacked(answer)
            return RecordedSample(number, sent or key, None if body is None else Completed(body, version, request_id))
        return RecordedSample(self._new_sample(digest, key) if is_kept else 0, key)

    def _new_sample(self, digest: bytes, key: str | None) -> int:
        row = (digest, time.time(), key)
        return int(self._db.execute("INSERT INTO samples (digest, begun, key) VALUES (?, ?, ?)", row).lastrowid or 0)

    def sampled(self, digest: bytes, number: int, answer: Completed) -> None:
        """Record an answer; `number` is 0 for a sample that was not recorded before it was sent."""
        self._db.execute(
            "UPDATE samples SET answer = ?, version = ?, request_id = ? WHERE number = ?",
            (_packed(bytes(answer.body)), answer.version, answer.request_id, number or self._new_sample(digest, None)),
        )

    # --- batches of rollouts ---

    def batch(self, stream: str, place: int) -> bytes | None:
        """Return a recorded batch of a stream."""
        row = self._first("SELECT batch FROM batches WHERE stream = ? AND place = ?", stream, place)
        return None if row is None else zlib.decompress(row[0])

    def put_batch(self, stream: str, place: int, batch: bytes) -> None:
        """Record a batch before it is handed out."""
        self._db.execute("INSERT INTO batches VALUES (?, ?, ?)", (stream, place, _packed(batch)))

    # --- small things ---

    def _fact(self, name: str) -> Any:
        return self._first("SELECT value FROM about WHERE name = ?", name)[0]

    def _last(self, table: str) -> int:
        return int(self._first(f"SELECT coalesce(max(number), 0) FROM {table}")[0])  # noqa: S608 - a constant

    def _first(self, query: str, *values: object) -> Any:
        return self._db.execute(query, values).fetchone()


def _locked(path: Path) -> FileLock:
    try:
        lock = FileLock(Path(f"{os.path.realpath(path)}-lock"), mode=0o600)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise JournalError(f"the journal must be a file; {path} is none")
            finally:
                os.close(descriptor)
            path.chmod(0o600)  # also an older file; what SQLite makes beside it has the same mode
        except BaseException:
            lock.release()
            raise
    except LockedError as locked:
        holder = (
            "client of this program: close that first"
            if locked.is_here
            else "program: wait until it has ended, or give this one a journal of its own"
        )
        raise JournalError(f"the journal {path} is in use by another {holder}") from None
    except OSError as error:
        raise JournalError(f"the journal {path} cannot be used: {error.strerror}") from None
    return lock


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, cached_statements=64)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
        db.execute("CREATE TEMP TABLE taken (digest BLOB PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID")
    except sqlite3.Error as error:
        db.close()
        raise journal_error(path, error) from None
    return db


def _prepare(db: sqlite3.Connection, path: Path, base_url: str) -> None:
    """Make the tables of a new journal, or check that an older one fits.

    Raises:
        JournalError: the file is no journal, or is of another service or version.
    """
    if not db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        db.executescript(
            f"BEGIN; {_SCHEMA} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; COMMIT;"
        )
        facts = {"base_url": base_url, "created": str(time.time()), "id": uuid4().hex}
        db.executemany("INSERT INTO about VALUES (?, ?)", facts.items())
    check_format(db, path)
    recorded = dict(db.execute("SELECT name, value FROM about")).get("base_url")
    if recorded != base_url:
        raise JournalError(
            f"the journal {path} is of the service at {recorded}, and this client is for {base_url}: its runs are not "
            "there. Give each service a journal of its own"
        )


def check_format(db: sqlite3.Connection, path: Path) -> None:
    """Raise `JournalError` unless a database is a journal of this version."""
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
        raise JournalError(f"{path} is another program's database, not a journal; nothing in it was changed")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != VERSION:
        raise JournalError(
            f"the journal {path} has the format {version}, and this version of loops-async has {VERSION}: finish with "
            "the version that began it, or begin another journal"
        )


@contextmanager
def reading(path: Path) -> Generator[sqlite3.Connection]:
    """Give a connection that only reads a journal, also while a program writes it.

    Raises:
        JournalError: there is no such file, or it is no journal.
    """
    if not path.is_file():
        raise JournalError(f"there is no journal {path}")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            check_format(db, path)
            yield db
    except (sqlite3.Error, zlib.error) as error:
        raise journal_error(path, error) from None


def last_state(db: sqlite3.Connection, run_id: str) -> str | None:
    """Return the path of the last training state that a run saved."""
    found = db.execute(_LAST_STATE, (run_id,)).fetchone()
    return None if found is None else str(msgspec.json.decode(zlib.decompress(found[0])).get("path") or "") or None


def journal_error(path: Path, error: BaseException) -> BaseException:
    """Return the error for what SQLite or zlib says of the file; any other error as it is."""
    if not isinstance(error, sqlite3.Error | zlib.error):
        return error
    is_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    advice = ". Make room, and start the program again: it goes on from what is recorded" if is_full else ""
    return JournalError(f"the journal {path} cannot be read or written: {error}{advice}")


def _mismatch(path: Path, what: str, difference: Difference | None) -> JournalMismatchError:
    differing = "other content" if difference is None else str(difference)
    return JournalMismatchError(
        f"the program does not do what the journal {path} recorded. {what} differs in {differing}. Nothing was sent. "
        "Start it as it was when it began this journal, or with a new journal. If its data come from samples, they are "
        "the same again only with journal_samples=True from the first start on",
        field="" if difference is None else difference.field,
        recorded="" if difference is None else difference.recorded,
        given="" if difference is None else difference.given,
    )


def _packed(content: bytes) -> bytes:
    return zlib.compress(content, _COMPRESSION)


def _unpacked(content: bytes | None) -> bytes | None:
    return None if content is None else zlib.decompress(content)

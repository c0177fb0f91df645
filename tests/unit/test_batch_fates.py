"""What becomes of the output of a batch on Ray when it goes on, and is killed between any two changes of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loops_async._ray.fates import ITS_PLACE, STALE, Found, fates
from loops_async._ray.keys import ordered, packed


class Record(NamedTuple):
    row: int
    kind: str


ANSWER, RETRYABLE, PERMANENT = "answer", "retryable error", "permanent error"

Folder = dict[str, list[Record]]
"""Records by file."""


class Run(NamedTuple):
    """A run that prepares an output for a set of rows."""

    wanted: set[int]
    retry_errors: bool
    append: bool

    def keeps(self, record: Record) -> bool:
        if record.row not in self.wanted:
            return self.append
        return record.kind == ANSWER or (record.kind == PERMANENT and not self.retry_errors)


class Output:
    """The files of a batch. What one of them holds changes at once."""

    def __init__(self, files: Folder) -> None:
        self.files = dict(files)
        self.stale: Folder = {}
        self.done: set[int] = set()
        """The rows that are not asked again."""

    @property
    def records(self) -> list[Record]:
        return [record for records in self.files.values() for record in records]

    @property
    def answers(self) -> set[Record]:
        stale = {record for records in self.stale.values() for record in records}
        return {record for record in {*self.records, *stale} if record.kind == ANSWER}

    def prepared(self, run: Run) -> Iterator[None]:
        """Prepare it, yielding wherever a kill may be: before each change, and at the end."""
        found = {name: found_in(records) for name, records in self.files.items()}
        wanted = ordered(packed(map(key, run.wanted)))[0]
        fate_of = fates(found, wanted, retry_errors=run.retry_errors, append=run.append)
        self.done = {
            record.row
            for name, fate in fate_of.items()
            for record, is_done in zip(self.files[name], fate.is_done, strict=True)
            if is_done
        }
        for name, fate in fate_of.items():
            for folder, which in fate.steps():
                yield
                self._write(name, folder, [self.files[name][place] for place in np.flatnonzero(which)])
        yield

    def _write(self, name: str, folder: str, records: list[Record]) -> None:
        if folder == STALE:
            self.stale[repr(records)] = records
            return
        assert folder == ITS_PLACE
        self.files[name] = records


def found_in(records: Sequence[Record]) -> Found:
    return Found(
        keys=packed(key(record.row) for record in records),
        is_answer=np.array([record.kind == ANSWER for record in records], bool),
        is_retryable=np.array([record.kind == RETRYABLE for record in records], bool),
        settings={"any"},
    )


def key(row: int) -> str:
    return f"{row:032x}"


ROWS = range(8)

RUNS = st.builds(Run, st.sets(st.sampled_from(ROWS)), st.booleans(), st.booleans())

KINDS = st.fixed_dictionaries({row: st.sampled_from([ANSWER, RETRYABLE, PERMANENT]) for row in ROWS})


@st.composite
def outputs(draw: st.DrawFn) -> Folder:
    """Draw an output with one record of some rows."""
    records = [Record(*each) for each in draw(KINDS).items()]
    places = draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=len(ROWS), max_size=len(ROWS)))
    return {
        name: [record for record, place in zip(records, places, strict=True) if place == name] for name in ("a", "b")
    }


@given(files=outputs(), killed=RUNS, then=RUNS, changes=st.integers(0, 8))
def test_a_kill_at_any_point_doubles_no_record_and_loses_no_answer(
    files: Folder, killed: Run, then: Run, changes: int
) -> None:
    output = Output(files)
    before = output.answers
    for _ in islice(output.prepared(killed), changes):
        check_once(output)
        assert output.answers == before
    records = output.records

    for _ in output.prepared(then):
        check_once(output)
        assert output.answers == before

    assert sorted(output.records) == sorted(record for record in records if then.keeps(record))
    assert output.done == {record.row for record in output.records} & then.wanted


def check_once(output: Output) -> None:
    assert max(Counter(record.row for record in output.records).values(), default=1) == 1


@given(first=outputs(), second=outputs(), run=RUNS)
def test_what_several_files_have_stays_once(first: Folder, second: Folder, run: Run) -> None:
    output = Output({f"{number}-{name}": each[name] for number, each in enumerate((first, second)) for name in each})
    before, answers = output.records, output.answers

    for _ in output.prepared(run):
        pass

    check_once(output)
    assert {record.row for record in output.records} == {record.row for record in before if run.keeps(record)}
    assert output.answers == answers  # where there is an answer, no error stays instead
    assert output.done == {record.row for record in output.records} & run.wanted

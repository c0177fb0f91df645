"""Outputs of batches that are prepared and killed between any two operations on their files; nothing runs on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from loops_async import row_key
from loops_async._ray import batch as batches
from loops_async._ray.batch import _Batch
from loops_async._ray.files import Folder, file_name
from loops_async._ray.tables import records_table

from .programs import SETTINGS
from .rows import records, rows, write


class KilledError(Exception):
    """Here the process would have ended."""


class KilledFileSystem:
    """A file system whose user is killed before one of its changes."""

    def __init__(self, real: Any, changes: int) -> None:
        self._real = real
        self._left = changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_dir(self, path: str, **options: Any) -> None:
        self._change()
        self._real.create_dir(path, **options)

    def open_output_stream(self, path: str) -> Any:
        try:
            self._change()
        except KilledError:
            Path(path).write_bytes(b"half")
            raise
        return self._real.open_output_stream(path)

    def move(self, path: str, to: str) -> None:
        self._change()
        self._real.move(path, to)

    def delete_file(self, path: str) -> None:
        self._change()
        self._real.delete_file(path)

    def _change(self) -> None:
        if not self._left:
            raise KilledError
        self._left -= 1


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        batches, "_in_parallel", lambda function, parts, *args: [function(part, *args) for part in parts]
    )


def record(row: dict[str, Any], index: int, *, retryable: bool | None) -> Any:
    error = {"type": "RequestError", "message": "no", "retryable": retryable, "status": 400, "request_id": "r"}
    outcome = {"completions": [{"text": None, "tokens": [1], "logprobs": [-0.5], "stop_reason": "stop"}]}
    return {
        **row,
        "index": index,
        "key": row_key(row, SETTINGS.digest),
        "settings": SETTINGS.digest,
        **(outcome if retryable is None else {"error": error}),
    }


def write_output(target: Path, kind: str) -> None:
    """Write 12 records in two files: of three rows each, one has an answer, the next two have errors."""
    folder = Folder(target, "target")
    for first in (0, 6):
        given = rows(6, first)
        table = (
            pa.Table.from_pylist(given) if kind == "parquet" else pa.table({"line": pa.array([], pa.large_binary())})
        )
        found = [record(row, index, retryable=[None, False, True][index % 3]) for index, row in enumerate(given)]
        table = records_table(table, SETTINGS, found)
        folder.write(file_name(table), table)


def prepared(source: Path, target: Path, *, changes: int, retry_errors: bool) -> _Batch:
    folder = Folder(target, "target")
    folder.fs = KilledFileSystem(folder.fs, changes)
    batch = _Batch(Folder(source, "source"), folder, SETTINGS, retry_errors, drop_stale=True, append=False)
    batch.prepare()
    return batch


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("retry_errors", [False, True])
def test_no_kill_doubles_a_record_or_loses_an_answer(kind: str, retry_errors: bool, tmp_path: Path) -> None:
    source = write(tmp_path / "in", rows(9, first=3), kind, files=1)  # 0 to 2 are gone
    kills = 0
    while True:
        target = tmp_path / f"out{kills}"
        write_output(target, kind)
        try:
            prepared(source, target, changes=kills, retry_errors=retry_errors)
            break
        except KilledError:
            kills += 1
        found = [each["id"] for each in records(target)]
        assert len(found) == len(set(found))
        assert {0, 3, 6, 9} <= {*found, *(each["id"] for each in records(target / "_stale"))}

        report = prepared(source, target, changes=1000, retry_errors=False).with_new(batches._Counts())

        errors = {4, 7, 10} & set(found)
        assert sorted(each["id"] for each in records(target)) == sorted({3, 6, 9, *errors})
        assert (report.already, report.answered, report.failed) == (3, 3, len(errors))
        assert [each["id"] for each in records(target / "_stale")] == [0]
        assert not list(target.glob("_new*"))
    assert kills > 8

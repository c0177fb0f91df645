"""Rows and records of the tests on Ray, in both kinds of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": number, "prompt": [number % 200, number // 200, 7], "label": f"l{number}"}
        for number in range(first, first + count)
    ]


def write(folder: Path, given: list[dict[str, Any]], kind: str, *, files: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(files):
        part = given[number::files]
        if kind == "jsonl":
            (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(part), folder / f"{number}.parquet", row_group_size=100)
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    """Return all records of an output, whatever file they are in."""
    found: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in file.read_text().splitlines()]
    for file in sorted(folder.glob("*.parquet")):
        import pyarrow.parquet as pq

        found += pq.ParquetFile(file).read().to_pylist()
    return found

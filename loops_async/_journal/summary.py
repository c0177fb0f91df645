"""What a journal has, for people: read without changing it, also while a program writes it."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from .content import DIGEST_BYTES
from .file import last_state, reading

_STATES: Final = """
CASE WHEN refused THEN 'refused' WHEN count(failure) THEN 'failed' WHEN count(outcome) = count(*) THEN 'done'
WHEN count(operation_id) = count(*) THEN 'accepted' ELSE 'unknown' END
"""

_OPERATIONS: Final = f"""
SELECT place, name, {_STATES}, length(datums) / {DIGEST_BYTES}, begun, min(operation_id)
FROM operations JOIN parts USING (run_id, place) WHERE run_id = ? GROUP BY place ORDER BY place
"""  # noqa: S608 - constants


class Summary(Struct, frozen=True, kw_only=True):
    """A journal: its service and session, how many samples have an answer, and what was created."""

    path: str
    base_url: str
    begun: datetime
    session: str | None
    samples: int
    batches: int
    size_bytes: int
    created: list[CreatedThing]


class CreatedThing(Struct, frozen=True, kw_only=True):
    """A run or a sampler; `id` is None if the answer to its creation is not known.

    `operations` is how many are recorded, and `states` counts them. `deactivated` is when the program itself did that,
    and `last_state` the path of the training state that it saved last.
    """

    id: str | None
    kind: str
    model: str | None
    begun: datetime
    deactivated: datetime | None = None
    operations: int = 0
    states: dict[str, int] = {}
    last_state: str | None = None


class ShownOperation(Struct, frozen=True, kw_only=True):
    """An operation. It is ``done``, ``failed``, ``accepted``, ``refused``, or ``unknown``: recorded, no answer seen."""

    place: int
    operation: str
    state: str
    datums: int
    begun: datetime
    operation_id: str | None


def summary(path: Path) -> Summary:
    """Return what a journal has.

    Raises:
        JournalError: there is no such file, or it is no journal.
    """
    with reading(path) as db:
        about = dict(db.execute("SELECT name, value FROM about"))
        rows = db.execute("SELECT kind, request, begun, id, ended FROM creations ORDER BY number").fetchall()
        return Summary(
            path=str(path),
            base_url=about["base_url"],
            begun=_time(float(about["created"])),
            session=next((id_ for kind, _, _, id_, _ in rows if kind == "session"), None),
            samples=_count(db, "samples WHERE answer IS NOT NULL"),
            batches=_count(db, "batches"),
            size_bytes=sum(each.stat().st_size for each in (path, Path(f"{path}-wal")) if each.exists()),
            created=[
                *(_created(db, *row) for row in rows if row[0] != "session"),
                *_attached(db, {row[3] for row in rows}),
            ],
        )


def operations(path: Path, run_id: str) -> list[ShownOperation]:
    """Return the operations of a run, in order.

    Raises:
        JournalError: there is no such file, or it is no journal.
    """
    with reading(path) as db:
        return [
            ShownOperation(
                place=place,
                operation=name,
                state=state,
                datums=datums,
                begun=_time(begun),
                operation_id=operation_id,
            )
            for place, name, state, datums, begun, operation_id in db.execute(_OPERATIONS, (run_id,))
        ]


def _created(
    db: sqlite3.Connection, kind: str, request: bytes, begun: float, id_: str | None, ended: float | None
) -> CreatedThing:
    states = {} if id_ is None else _states(db, id_)
    return CreatedThing(
        id=id_,
        kind=kind,
        model=msgspec.json.decode(request).get("base_model"),
        begun=_time(begun),
        deactivated=None if ended is None else _time(ended),
        operations=sum(states.values()),
        states=states,
        last_state=None if id_ is None else last_state(db, id_),
    )


def _attached(db: sqlite3.Connection, created: set[str]) -> list[CreatedThing]:
    """Return the runs that the program attached to."""
    rows = db.execute("SELECT run_id, min(begun) FROM operations GROUP BY run_id ORDER BY 2")
    return [_created(db, "run", b"{}", begun, run_id, None) for run_id, begun in rows if run_id not in created]


def _states(db: sqlite3.Connection, run_id: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in db.execute(_OPERATIONS, (run_id,)):
        counts[row[2]] = counts.get(row[2], 0) + 1
    return counts


def _count(db: sqlite3.Connection, rows: str) -> int:
    return int(db.execute(f"SELECT count(*) FROM {rows}").fetchone()[0])  # noqa: S608 - a constant


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)

"""The keys of a batch in a temporary file, so that memory stays flat for any number of rows."""

from __future__ import annotations

from typing import Final

_TABLES: Final = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA locking_mode = EXCLUSIVE;
    PRAGMA cache_size = -16384;
    CREATE TABLE rows (key BLOB PRIMARY KEY, copies INTEGER, read INTEGER) WITHOUT ROWID;
    CREATE TABLE kept (key BLOB, copy INTEGER, PRIMARY KEY (key, copy)) WITHOUT ROWID;
"""
# Not RETURNING, which needs SQLite 3.35.
_ADD: Final = "INSERT INTO rows VALUES (?, 1, 0) ON CONFLICT (key) DO UPDATE SET copies = copies + 1"


class Index:
    """Which rows the input has, how many of them are equal, and which have a record or are asked for.

    Its calls block, and must not overlap; they may come from different threads.
    """

    def __init__(self) -> None:
        import sqlite3  # only batches from file to file need it

        # A database without a name is a temporary file, which SQLite removes by itself.
        self._sqlite = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._sqlite.executescript(_TABLES)
        self._sqlite.execute("BEGIN")

    def close(self) -> None:
        """Remove the file."""
        self._sqlite.close()

    def add(self, key: str) -> None:
        """Note a row of the input."""
        self._sqlite.execute(_ADD, (_packed(key),))

    def has(self, key: str) -> bool:
        """Whether the input has the row of a record: for ``key#2``, three rows with the key."""
        key, copy = _parts(key)
        found = self._sqlite.execute("SELECT copies FROM rows WHERE key = ?", (_packed(key),)).fetchone()
        return found is not None and copy < found[0]

    def keep(self, key: str) -> bool:
        """Note that a row has a record, or is asked for; False if that was noted before."""
        key, copy = _parts(key)
        added = self._sqlite.execute("INSERT OR IGNORE INTO kept VALUES (?, ?)", (_packed(key), copy))
        return added.rowcount == 1

    def next_copy(self, key: str) -> int | None:
        """Return how many rows with this key were read before in the second reading; None if there is no other."""
        packed = _packed(key)
        found = self._sqlite.execute("SELECT copies, read FROM rows WHERE key = ?", (packed,)).fetchone()
        if found is None or found[1] >= found[0]:
            return None
        if found[0] == 1:  # usual, and needs no writing
            return 0
        self._sqlite.execute("UPDATE rows SET read = read + 1 WHERE key = ?", (packed,))
        return int(found[1])


def _packed(key: str) -> bytes:
    return bytes.fromhex(key)


def _parts(key: str) -> tuple[str, int]:
    key, _, copy = key.partition("#")
    return key, int(copy or 0)

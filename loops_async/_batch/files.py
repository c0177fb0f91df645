"""The files of a batch: JSON lines in, JSON lines out. All calls block."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import msgspec
from msgspec import Meta, Struct

from .._files import flush, write_whole
from .._http.decoding import UnreadableError, decode_json
from ..errors import InputError
from .records import Record
from .rows import Row, row_of_line
from .settings import BatchSettings

STANDARD: Final = "-"
"""Standard input or output instead of a file."""

BEGINNING: Final = b'{"index":'
"""How each line of an output begins."""


class Source:
    """The input, which is read twice; standard input is therefore copied to a temporary file first."""

    def __init__(self, path: str) -> None:
        self.name: Final = "<stdin>" if path == STANDARD else path
        self._file = _copy_of_standard_input() if path == STANDARD else _opened(path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, settings: BatchSettings) -> Iterator[Row]:
        """Yield what is on each line that is not empty.

        Raises:
            InputError: a row has a field with the name of a record's.
        """
        self._file.seek(0)
        for number, line in enumerate(self._file):
            if line.strip():
                yield row_of_line(line, settings, index=number, where=f"{self.name}:{number + 1}")


def check_input(path: str) -> None:
    """Raise `InputError` unless the input is standard input or a file."""
    if path != STANDARD and not Path(path).is_file():
        raise InputError(path, "there is no such file")


def _opened(path: str) -> BinaryIO:
    check_input(path)
    return Path(path).open("rb")


def _copy_of_standard_input() -> BinaryIO:
    copy: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - the source closes it
    shutil.copyfileobj(sys.stdin.buffer, copy)
    return copy


class Fate(IntEnum):
    """What happens to a line of the output when a batch goes on."""

    KEPT = 0
    DROPPED = 1
    """An error whose row is asked again or is gone."""
    STALE = 2
    """An answer whose row is gone."""


class FoundError(Struct):
    """The error of a record, as far as resuming needs it."""

    retryable: bool = False


class Found(Struct):
    """A record, as far as resuming needs it."""

    key: Annotated[str, Meta(pattern="^[0-9a-f]{32}(#[1-9][0-9]*)?$")]
    settings: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    error: FoundError | None = None


class Target:
    """The output file, which is also the state of the batch."""

    def __init__(self, path: str, source: str) -> None:
        self.path: Final = Path(path).resolve()  # a link stays one when the file is replaced
        self.settings_path: Final = self._beside(".settings.json")
        self.stale_path: Final = self._beside(".stale")
        self.lock_path: Final = self._beside(".lock")
        if not self.path.parent.is_dir():
            raise InputError(path, f"there is no folder {self.path.parent}")
        if self.path.exists() and not self.path.is_file():
            raise InputError(path, "must be a file")
        if source != STANDARD and self.path == Path(source).resolve():
            raise InputError(path, "must not be the input")

    def records(self) -> Iterator[Found]:
        """Yield the records of whole lines.

        Raises:
            InputError: a line is no record of a batch.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines):
                if line.endswith(b"\n"):
                    yield self._record(line, number)
                elif not line.startswith(BEGINNING) and not BEGINNING.startswith(line):
                    raise self._refusal(number, "its end is not one of such a line either")

    def _record(self, line: bytes, number: int) -> Found:
        try:
            return decode_json(line, Found)
        except UnreadableError as problem:
            refusal = self._refusal(number, str(problem))
        raise refusal

    def _refusal(self, number: int, problem: str) -> InputError:
        return InputError(
            f"{self.path}:{number + 1}",
            f"is not a line that `loops sample` wrote: {problem}. Choose another output; nothing was sent or changed",
        )

    def described_settings(self) -> bytes | None:
        """Return the content of the file beside the output."""
        return self.settings_path.read_bytes() if self.settings_path.exists() else None

    def describe_settings(self, content: bytes) -> None:
        """Replace the file beside the output."""
        self._replace(self.settings_path, [content])

    def keep(self, fates: Sequence[int]) -> None:
        """Remove lines by their fates, stale ones to the file for them, and half a line at the end."""
        if not self.path.exists():
            return
        if Fate.STALE in fates:  # first, so that a kill may double a stale answer, but not lose one
            with self.stale_path.open("ab") as stale:
                stale.writelines(self._lines(fates, Fate.STALE))
                flush(stale)
        if any(fates):
            self._replace(self.path, self._lines(fates, Fate.KEPT))
        else:
            os.truncate(self.path, sum(map(len, self._lines(fates, Fate.KEPT))))

    def _lines(self, fates: Sequence[int], wanted: Fate) -> Iterator[bytes]:
        """Yield the whole lines that have a fate."""
        with self.path.open("rb") as lines:
            for fate, line in zip(fates, lines, strict=False):  # without half a line at the end
                if fate == wanted:
                    yield line

    def open(self) -> BinaryIO:
        """Open the output to append to it."""
        return self.path.open("ab")

    def _replace(self, path: Path, lines: Iterable[bytes]) -> None:
        # Always the same draft: what a killed run leaves may be large, and the next run removes it.
        write_whole(path, lines, draft=path.with_name(f"{path.name}.new"))

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(self.path.name + ending)


def write_records(file: BinaryIO, records: Iterable[Record]) -> None:
    """Write whole lines at once, so that a killed process loses at most what it just received."""
    file.write(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    file.flush()

"""The files of a batch on any pyarrow file system: JSON lines or Parquet, read in parts, and written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from msgspec import Struct

from .._batch.lock import only_run
from ..errors import InputError
from .tables import LINE, is_of_lines, keys_and_errors, of_lines

PART_BYTES: Final = 8 << 20
"""How much of a file of JSON lines one task reads."""

TAIL_BYTES: Final = 1 << 16

UNREADABLE: Final = (pa.ArrowInvalid, ValueError, KeyError)
"""What reading half a file raises."""

LOCK: Final = "_loops_batch.lock"

DRAFT: Final = "_new-"

Kind = Literal["jsonl", "parquet"]

KINDS: Final[dict[str, Kind]] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


class Part(Struct, frozen=True):
    """A part of a file: the lines that begin in a range of bytes, or one row group."""

    path: str
    kind: Kind
    start: int
    end: int


class Folder:
    """A file, or a folder of files, on a file system. It can be pickled.

    Args:
        uri: a path on this machine, or a URI that pyarrow knows, such as ``s3://bucket/folder``.
        name: the argument, for errors.
    """

    def __init__(self, uri: str | os.PathLike[str], name: str) -> None:
        text = os.fspath(uri)
        try:
            self.fs, self.path = pafs.FileSystem.from_uri(text if "://" in text else str(Path(text).absolute()))
        except (pa.ArrowInvalid, OSError) as problem:
            raise InputError(name, f"is no path that pyarrow can use: {problem}") from None
        self.name = name

    def files(self) -> list[str]:
        """Return the paths of the files, in order; names that begin with ``_`` or a dot are not among them."""
        [here] = self.fs.get_file_info([self.path])
        if here.type == pafs.FileType.File:
            return [self.path]
        found = self.fs.get_file_info(pafs.FileSelector(self.path, recursive=True, allow_not_found=True))
        return sorted(each.path for each in found if each.type == pafs.FileType.File and not self._is_hidden(each.path))

    def kind(self, files: Sequence[str]) -> Kind:
        """Return what all files are.

        Raises:
            InputError: there is no file, or they are of other kinds, or of several.
        """
        kinds = {KINDS.get(Path(path).suffix) for path in files}
        if len(kinds) == 1 and (kind := kinds.pop()) is not None:
            return kind
        raise InputError(
            self.name, f"must be files of JSON lines (.jsonl), or Parquet (.parquet); found {len(files)} in {self.path}"
        )

    def parts(self, files: Sequence[str], kind: Kind) -> list[Part]:
        """Return the parts of files."""
        if kind == "parquet":
            groups = [(path, self._parquet(path).num_row_groups) for path in files]
            return [Part(path, kind, number, number + 1) for path, count in groups for number in range(count)]
        sizes = [(path, self.fs.get_file_info([path])[0].size) for path in files]
        return [
            Part(path, kind, start, min(start + PART_BYTES, size))
            for path, size in sizes
            for start in range(0, size, PART_BYTES)
        ]

    def read(self, part: Part) -> pa.Table:
        """Read a part."""
        if part.kind == "parquet":
            return self._parquet(part.path).read_row_group(part.start)
        return of_lines([line for line in self._bytes(part).split(b"\n") if line.strip()])

    def read_file(self, path: str, kind: Kind) -> pa.Table:
        """Read a whole file.

        Raises:
            ArrowInvalid, ValueError: it is not whole.
        """
        if kind == "parquet":
            return self._parquet(path).read()
        with self.fs.open_input_stream(path) as file:
            content = file.read()
        if content and not content.endswith(b"\n"):
            raise ValueError("its last line is not whole")
        return of_lines(content.splitlines())

    def schema(self, path: str) -> Any:
        """Return the columns of a Parquet file."""
        return self._parquet(path).schema_arrow

    def write(self, name: str, table: pa.Table, *, folder: str = "") -> None:
        """Write a file of this folder, or of one in it, whole: until then, it is not there."""
        self.fs.create_dir(f"{self.path}/{folder}", recursive=True)
        self._write(f"{self.path}/{folder}{name}", table)

    def replace(self, path: str, table: pa.Table) -> None:
        """Replace a file at once; one without rows is deleted."""
        if table.num_rows:
            self._write(path, table)
        else:
            self.fs.delete_file(path)

    def write_small(self, name: str, content: bytes) -> None:
        """Write a small file."""
        new = self._draft(name)
        with self.fs.open_output_stream(new) as file:
            file.write(content)
        self.fs.move(new, f"{self.path}/{name}")

    def read_small(self, name: str) -> bytes | None:
        """Return the content of a small file; None if it is not there."""
        if self.fs.get_file_info([f"{self.path}/{name}"])[0].type != pafs.FileType.File:
            return None
        with self.fs.open_input_stream(f"{self.path}/{name}") as file:
            return file.read()

    def make(self) -> None:
        """Make the folder, and remove what a killed process was writing."""
        self.fs.create_dir(self.path, recursive=True)
        for each in self.fs.get_file_info(pafs.FileSelector(self.path)):
            if each.base_name.startswith(DRAFT):
                self.fs.delete_file(each.path)

    @contextmanager
    def only_run(self) -> Generator[None]:
        """Be the only run that writes here, as long as this lasts; only a file system of this machine can tell.

        Raises:
            InputError: another run writes here, or this is a file.
        """
        if not isinstance(self.fs, pafs.LocalFileSystem):
            yield
            return
        folder = Path(self.path)
        is_new = not folder.exists()
        if not is_new and not folder.is_dir():
            raise InputError(self.name, f"must be a folder; {folder} is none")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with only_run(folder / LOCK, self.name):
                yield
        finally:
            if is_new:
                with suppress(OSError):  # something was written there
                    folder.rmdir()

    def set_aside(self, path: str, folder: str) -> None:
        """Move a file to a folder of this one."""
        self.fs.create_dir(f"{self.path}/{folder}", recursive=True)
        self.fs.move(path, f"{self.path}/{folder}/{Path(path).name}")

    def _write(self, path: str, table: pa.Table) -> None:
        new = self._draft(path)
        with self.fs.open_output_stream(new) as file:
            if is_of_lines(table):
                file.writelines(line + b"\n" for line in table.column(LINE).to_pylist())
            else:
                pq.write_table(table, file)
        self.fs.move(new, path)

    def _draft(self, path: str) -> str:
        """Return where a file is first written: without its ending, so that ``*.jsonl`` means only whole files."""
        return f"{self.path}/{DRAFT}{Path(path).stem}"

    def _parquet(self, path: str) -> pq.ParquetFile:
        return pq.ParquetFile(self.fs.open_input_file(path), pre_buffer=False)

    def _bytes(self, part: Part) -> bytes:
        """Return the lines that begin in the range: one that began before is the part's before."""
        with self.fs.open_input_file(part.path) as file:
            file.seek(max(0, part.start - 1))
            content = file.read(part.end - max(0, part.start - 1))
            while not content.endswith(b"\n") and (more := file.read(TAIL_BYTES)):
                line_end = more.find(b"\n") + 1
                content += more[:line_end] if line_end else more
        return content.partition(b"\n")[2] if part.start else content

    def _is_hidden(self, path: str) -> bool:
        return any(each[:1] in "_." for each in path[len(self.path) :].strip("/").split("/"))


def file_name(table: pa.Table) -> str:
    """Return the name for the file of some records: the same ones, written again, replace themselves."""
    keys = sorted(key for key, _, _ in keys_and_errors(table))
    ending = "jsonl" if is_of_lines(table) else "parquet"
    return f"part-{blake2b(json.dumps(keys).encode(), digest_size=16).hexdigest()}.{ending}"

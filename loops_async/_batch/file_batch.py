"""`sample_file`: a batch from one file into another."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, closing, nullcontext
from itertools import islice
from os import PathLike
from typing import BinaryIO, Final, TypeVar

from anyio import CancelScope, to_thread
from msgspec import Struct
from msgspec.structs import replace

from .._arguments import check_at_least
from .._files import flush
from .._sampling.adaptive import Adaptive
from .._sampling.limiter import Limiter
from ..errors import InputError, LoopsError
from ..sampling import SamplingClient
from .files import STANDARD, Fate, Found, Source, Target
from .index import Index
from .lock import only_run
from .progress import has_terminal, told_each_minute
from .records import INVALID_LINE, Record
from .report import BatchReport
from .rows import Row, numbered
from .sampling import RowSampler
from .settings import BatchSettings, check_settings, settings_file
from .writer import Writer

T = TypeVar("T")

LINES_AT_ONCE: Final = 256
"""How many lines a worker thread reads before the event loop goes on."""

log: logging.Logger = logging.getLogger("loops_async.sampling")


async def sample_file(
    client: SamplingClient,
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    settings: BatchSettings,
    limit: int | Adaptive | Limiter = 256,
    retry_errors: bool = False,
    drop_stale: bool = False,
    append: bool = False,
    max_failures: int | None = None,
    on_progress: Callable[[BatchReport], object] | None = None,
) -> BatchReport:
    """Sample a file of prompts into a file of answers; calling it again continues where it was stopped.

    Both files have a JSON object on each line: a row in `source`, a record in `target`, in the order of completion.
    Records are found again by content and settings, never by position. In the end, each row has one record. A run that
    is killed leaves half a line at worst, which the next run removes. That run asks for the rows without a record, and
    for those whose error is retryable. Memory does not grow with the files. Beside the output, ``TARGET.settings.json``
    names the settings, and ``TARGET.lock`` is there while a run writes to it: another one is refused.

    A row that cannot be answered, or a line that is no row, becomes a record with an ``error``. An error that all other
    rows would have, too (a refused key, a sampler that has ended), becomes none: nothing more is asked for, what is
    under way is written, and `BatchReport.stopped` is that error. After Ctrl-C, or another cancellation, what is under
    way is written, too; a second one gives it up.

    A WARNING says so if the process cannot have as many connections as `limit` asks for. Without a terminal and
    without `on_progress`, an INFO line of the log says each minute how far the batch is, how fast, and how long it
    still takes.

    Args:
        client: what samples.
        source: the input; ``"-"`` is standard input.
        target: the output; ``"-"`` is standard output, which cannot be continued.
        settings: `BatchSettings.of` the client.
        limit: the most completions in flight; `Adaptive` finds the number at which the sampler is fastest.
        retry_errors: also ask again for rows whose error is not retryable.
        drop_stale: move answers to rows that are gone to ``TARGET.stale``; otherwise they are refused.
        append: keep records of other settings in the output, and add to them; otherwise they are refused.
        max_failures: stop when this many rows have failed in this run; None never stops.
        on_progress: called with the state after each write.

    Returns:
        The state after the run.

    Raises:
        InputError: a file is missing or cannot be used, a row has a field with the name of a record's, the output has
            records of other settings, of other rows or of something else, or another run writes to it. Nothing was
            sent or changed.
        OSError: the output cannot be written.

    Example:
        ::

            settings = loops.BatchSettings.of(sampler, num_samples=4, sampling_params=params)
            report = await loops.sample_file(sampler, "prompts.jsonl", "answers.jsonl", settings=settings)
            print(report.answered, "of", report.rows)
    """
    if max_failures is not None:
        max_failures = check_at_least(max_failures, 1, "max_failures")
    batch = FileBatch(
        RowSampler(client, settings, limit),
        retry_errors=retry_errors,
        drop_stale=drop_stale,
        append=append,
        max_failures=max_failures,
        on_progress=on_progress,
    )
    return await _drained(batch, os.fspath(source), os.fspath(target))


async def _drained(batch: FileBatch, source: str, target: str) -> BatchReport:
    """Run a batch; when the caller is cancelled, write what is under way, unless it is cancelled once more."""
    running = asyncio.create_task(batch.run(source, target), name="loops_async: sample a file")
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        try:
            if batch.is_sampling:
                batch.interrupt()
                await asyncio.wait([running])
        finally:  # an anyio cancel scope cancels again at once
            running.cancel()
            with CancelScope(shield=True):
                await asyncio.wait([running])
            if not running.cancelled() and running.exception() is not None:
                log.error("an interrupted batch failed", exc_info=running.exception())
        raise


class _Output(Struct, frozen=True):
    """What is in the output before anything is sent."""

    fates: bytearray
    """What is to become of each record."""
    settings: bytes | None
    """The content of the file beside it."""


class FileBatch:
    """One run of a batch from one file into another."""

    def __init__(
        self,
        sampler: RowSampler,
        *,
        retry_errors: bool,
        drop_stale: bool,
        append: bool,
        max_failures: int | None,
        on_progress: Callable[[BatchReport], object] | None,
    ) -> None:
        self.report: BatchReport = BatchReport()
        self._sampler = sampler
        self._retries_all = retry_errors
        self._drops_stale = drop_stale
        self._appends = append
        self._max_failures = max_failures
        self._on_progress = on_progress
        self._failures = 0
        self.is_sampling: bool = False

    def interrupt(self) -> None:
        """Ask for no more."""
        self._sampler.stop(LoopsError("the batch was interrupted"))
        log.warning("interrupted: waiting for what is under way, to write it; interrupt again to give it up")

    async def run(self, source: str, target: str) -> BatchReport:
        """Sample what is in the source and not in the target, and return the state."""
        with ExitStack() as opened:
            index = opened.enter_context(closing(Index()))
            rows = opened.enter_context(closing(await to_thread.run_sync(Source, source)))
            output = None if target == STANDARD else await to_thread.run_sync(Target, target, source)
            if output is not None:
                await to_thread.run_sync(opened.enter_context, only_run(output.lock_path, str(output.path)))
            needs_tokenizer = await self._read_input(rows, index)
            found = None if output is None else await self._read_output(output, index)
            if needs_tokenizer and self._missing:
                await self._sampler.load_tokenizer()
            if output is not None and found is not None:
                await to_thread.run_sync(self._prepare, output, found)
            file = sys.stdout.buffer if output is None else opened.enter_context(output.open())
            self._tell()
            self._sampler.warn_of_connections()
            await self._sample(rows, index, file)
            if output is not None:
                await to_thread.run_sync(flush, file)
        return self.report

    # --- before anything is sent ---

    async def _read_input(self, source: Source, index: Index) -> bool:
        """Count the rows and note their keys; return whether any needs the tokenizer."""

        def note(row: Row) -> bool:
            index.add(row.key)
            return row.needs_tokenizer

        count, needs_tokenizer = 0, False
        async for some in _in_threads(map(note, source.rows(self._sampler.settings))):
            count += len(some)
            needs_tokenizer = needs_tokenizer or any(some)
        self.report = replace(self.report, rows=count)
        return needs_tokenizer

    async def _read_output(self, output: Target, index: Index) -> _Output:
        """Return what is in the output, and what is to become of it.

        Raises:
            InputError: the output cannot be continued with these settings or rows.
        """
        fates, digests = bytearray(), set[str]()

        def fate_of(found: Found) -> Fate:
            digests.add(found.settings)
            return self._fate(found, index)

        async for some in _in_threads(map(fate_of, output.records())):
            fates.extend(some)
        before = await to_thread.run_sync(output.described_settings)
        name = str(output.path)
        check_settings(self._sampler.settings, digests, before, append=self._appends, target=name)
        stale = fates.count(Fate.STALE)
        if stale and not self._drops_stale:
            raise InputError(
                name,
                f"has {stale} answers to rows that the input does not have. Choose another output, or move them to "
                f"{output.stale_path.name}: drop_stale=True. Nothing was sent or changed",
            )
        self.report = replace(self.report, already=self.report.answered, stale=stale)
        return _Output(fates, before)

    def _fate(self, found: Found, index: Index) -> Fate:
        """Return what is to become of a record, and count it if it is kept."""
        if found.settings != self._sampler.settings.digest:
            return Fate.KEPT
        error = found.error
        if error is not None and (error.retryable or self._retries_all or not index.has(found.key)):
            return Fate.DROPPED
        if not index.has(found.key) or not index.keep(found.key):
            return Fate.STALE
        self._count(is_answer=error is None, is_retryable=False)
        return Fate.KEPT

    def _prepare(self, output: Target, found: _Output) -> None:
        output.describe_settings(settings_file(self._sampler.settings, found.settings))
        output.keep(found.fates)

    # --- sampling ---

    @property
    def _missing(self) -> int:
        return self.report.rows - self.report.answered - self.report.failed

    async def _sample(self, source: Source, index: Index, file: BinaryIO) -> None:
        writer = Writer(file, self._tell)

        async def rows() -> AsyncGenerator[Row]:
            try:
                async with aclosing(_in_threads(self._missing_rows(source, index))) as missing:
                    async for some in missing:
                        for row in some:
                            yield row
            except InputError as error:
                self._sampler.stop(error)

        async def emit(record: Record) -> None:
            self._count_new(record)
            await writer.put(record)

        self.is_sampling = True
        try:
            async with self._lines_of_progress(source.name):
                if self._missing:
                    await self._sampler.run(rows(), emit)
        finally:
            self.is_sampling = False
            with CancelScope(shield=True):
                await writer.close()
            self.report = replace(self.report, stopped=self._sampler.stopped)

    def _missing_rows(self, source: Source, index: Index) -> Iterator[Row]:
        """Yield the rows that have no record, with their own keys."""
        for row in source.rows(self._sampler.settings):
            copy = index.next_copy(row.key)
            if copy is None:
                raise InputError(f"{source.name}:{(row.index or 0) + 1}", "was changed while it was read; run it again")
            key = numbered(row.key, copy)
            if index.keep(key):
                yield replace(row, key=key)

    def _count_new(self, record: Record) -> None:
        error = record.get("error")
        self._count(is_answer=error is None, is_retryable=error is not None and error["retryable"])
        if error is None or error["type"] == INVALID_LINE:
            return
        self._failures += 1
        if self._failures == self._max_failures:
            self._sampler.stop(
                LoopsError(f"{self._failures} rows have failed, as many as max_failures allows; {error['message']}")
            )

    def _count(self, *, is_answer: bool, is_retryable: bool) -> None:
        report = self.report
        self.report = replace(
            report,
            answered=report.answered + is_answer,
            failed=report.failed + (not is_answer),
            retryable=report.retryable + is_retryable,
        )

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.report)

    def _lines_of_progress(self, source: str) -> AbstractAsyncContextManager[None]:
        if self._on_progress is not None or has_terminal():
            return nullcontext()

        async def now() -> BatchReport:
            return self.report

        return told_each_minute(now, lambda line: log.info("%s: %s", source, line))


async def _in_threads(items: Iterator[T]) -> AsyncGenerator[list[T]]:
    """Yield the items of an iterator that blocks, some at once."""
    while some := await to_thread.run_sync(lambda: list(islice(items, LINES_AT_ONCE))):
        yield some

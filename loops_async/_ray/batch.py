"""A batch from files to files on Ray: exactly one record for each row, whichever process is killed."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Final

import pyarrow as pa
import ray
import ray.data
from msgspec import Struct
from msgspec.structs import replace
from ray.data import ActorPoolStrategy, Datasink, Datasource, ReadTask
from ray.data.block import BlockMetadata

from .._arguments import check_at_least
from .._batch.progress import has_terminal, told_each_minute
from .._batch.report import BatchReport
from .._batch.settings import BatchSettings, check_settings, settings_file
from .._sampling.adaptive import Adaptive
from ..errors import ClosedError, InputError, LoopsError
from ..sampling import SamplingClient
from .fates import ITS_PLACE, STALE, Fate, Found, fates
from .files import UNREADABLE, Folder, Kind, Part, file_name
from .keys import Keys, are_in, joined, ordered, packed
from .limit import SharedLimit
from .sampler import Sampler
from .shares import Shares
from .tables import check_columns, keys_and_errors, rows_of

log: logging.Logger = logging.getLogger("loops_async.sampling")

SETTINGS: Final = "_loops_batch.json"
INCOMPLETE: Final = "_incomplete"

READING_CPUS: Final = 0.25
"""What tasks that read and write are counted as: they wait for disks and networks."""


def sample(
    ds: Any,
    client: SamplingClient,
    *,
    settings: BatchSettings,
    workers: int,
    limit: int | Adaptive | SharedLimit,
    rows_per_block: int = 128,
    blocks_per_worker: int = 4,
    num_cpus: float = 1,
    raises: bool = True,
) -> Any:
    """Return a dataset of the records of a dataset of rows: one for each, whichever process dies.

    A task that Ray repeats must make the same blocks again. Answers differ in size, so each block of rows makes one
    block of records, however large that is, and no step is joined with another one that cuts blocks elsewhere.

    Args:
        ds: a dataset with the columns ``prompt`` or ``messages``, and optionally ``id``; others are carried through.
        client: what samples. It is pickled without the API key: each node needs ``BASETEN_API_KEY``.
        settings: `BatchSettings.of` the client.
        workers: the number of processes that sample, each with an event loop.
        limit: the most completions in flight of the whole job, at least `workers`.
        rows_per_block: rows of a block; with `blocks_per_worker`, at most so many are paid for again when a worker
            dies.
        blocks_per_worker: blocks that a worker has at the same time.
        num_cpus: the cores that Ray counts for a worker.
        raises: an error that all further rows would have, too, e.g. that of a refused key, fails the job. With False,
            the dataset ends without the rows that were not answered before, and `SharedLimit.stopped` says why.

    Raises:
        InputError: an argument is invalid.
    """
    workers = check_at_least(workers, 1, "workers")
    rows_per_block = check_at_least(rows_per_block, 1, "rows_per_block")
    blocks_per_worker = check_at_least(blocks_per_worker, 1, "blocks_per_worker")
    shared = limit if isinstance(limit, SharedLimit) else SharedLimit(limit, workers=workers)
    ds.context.target_max_block_size = None
    return ds.repartition(target_num_rows_per_block=rows_per_block, strict=True).map_batches(
        Sampler,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=[client],
        fn_constructor_kwargs={"settings": settings, "limit": shared, "raises": raises},
        compute=ActorPoolStrategy(
            size=workers,
            max_tasks_in_flight_per_actor=blocks_per_worker,
            max_concurrent_calls_per_actor=blocks_per_worker,
        ),
        num_cpus=num_cpus,
    )


async def sample_files(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    client: SamplingClient,
    *,
    workers: int,
    limit: int | Adaptive,
    settings: BatchSettings | None = None,
    num_samples: int = 1,
    sampling_params: Any = None,
    rows_per_block: int = 128,
    blocks_per_worker: int = 4,
    rows_per_file: int = 2048,
    num_cpus: float = 1,
    retry_errors: bool = False,
    drop_stale: bool = False,
    append: bool = False,
) -> BatchReport:
    """Sample files of rows into a folder of records on Ray; running it again continues where it stopped.

    First all keys are read and compared with those of the output: rows that are equal, other settings and answers to
    rows that are gone are refused before anything is paid for. In the end there is one record for each row.

    Progress bars are Ray's. Without a terminal, an INFO line of the log says each minute how far the batch is, how
    fast, and how long it still takes. A worker that cannot have as many connections as its part of `limit` says so in
    a WARNING when it starts.

    Args:
        source: JSON lines or Parquet, one file or a folder, on any file system that pyarrow has a URI for.
        target: a folder for files of the same kind, which is also the state of the batch.
        client: what samples. It is pickled without the API key: each node needs ``BASETEN_API_KEY``.
        workers: the number of processes that sample, each with an event loop.
        limit: the most completions in flight of the whole job, at least `workers`.
        settings: what decides the answers; None for `BatchSettings.of` the client, `num_samples` and `sampling_params`.
        num_samples: the number of completions of each row.
        sampling_params: how to sample; `SamplingParams()` when None.
        rows_per_block: rows of a block; with `blocks_per_worker`, at most so many are paid for again when a worker
            dies.
        blocks_per_worker: blocks that a worker has at the same time.
        rows_per_file: about how many records one file has. So many more are paid for again if this process dies.
        num_cpus: the cores that Ray counts for a worker.
        retry_errors: ask again for all rows that have an error, not only for those whose error is retryable.
        drop_stale: move records of rows that are gone to ``_stale/``.
        append: keep records of other settings, and add to them.

    Returns:
        The state of the batch. `BatchReport.stopped` says why no more was asked for, if that is so.

    Raises:
        InputError: an argument, a row, or what is in `target` does not fit, or, where `target` is on a file system of
            this machine, another run writes there; nothing was sent.
    """
    if settings is None:
        settings = BatchSettings.of(client, num_samples=num_samples, sampling_params=sampling_params)
    Shares(limit, check_at_least(workers, 1, "workers"))  # which refuses what is wrong
    folders = Folder(source, "source"), Folder(target, "target")
    job = _Job(
        await asyncio.to_thread(_Batch, *folders, settings, retry_errors, drop_stale, append),
        limit,
        rows_per_file=check_at_least(rows_per_file, 1, "rows_per_file"),
        client=client,
        settings=settings,
        workers=workers,
        rows_per_block=rows_per_block,
        blocks_per_worker=blocks_per_worker,
        num_cpus=num_cpus,
    )
    working = asyncio.ensure_future(asyncio.to_thread(job.run))
    try:
        async with nullcontext() if has_terminal() else told_each_minute(job.now, lambda line: log.info("%s", line)):
            report = await asyncio.shield(working)
    except asyncio.CancelledError:
        try:
            await job.stop(ClosedError("the batch was cancelled"))
        finally:
            await asyncio.wait([working])
        raise
    return replace(report, stopped=await job.stopped())


class _Job:
    """A batch on its way through Ray. `options` are arguments of `sample`."""

    def __init__(
        self, batch: _Batch, limit: int | Adaptive, *, rows_per_file: int, workers: int, **options: Any
    ) -> None:
        self._batch = batch
        self._limit = limit
        self._workers = workers
        self._rows_per_file = rows_per_file
        self._options = options
        self._shared: SharedLimit | None = None
        """There when rows are asked for."""
        self._stopped: LoopsError | None = None

    def run(self) -> BatchReport:
        """Do it, and return the report; blocks until all is written."""
        batch, sink = self._batch, _Records(self._batch.target, self._rows_per_file)
        with batch.target.only_run():
            done = batch.prepare()
            if batch.report.rows > len(done):
                self._shared = SharedLimit(self._limit, workers=self._workers)
                if self._stopped is None:
                    self._write(sink, self._shared, done)
        return batch.with_new(sink.counts)

    def _write(self, sink: _Records, shared: SharedLimit, done: Keys) -> None:
        source = _Rows(self._batch, done)
        rows = ray.data.read_datasource(source, num_cpus=READING_CPUS, override_num_blocks=len(self._batch.parts))
        records = sample(rows, workers=self._workers, limit=shared, raises=False, **self._options)
        records.write_datasink(sink, ray_remote_args={"num_cpus": READING_CPUS})

    async def now(self) -> BatchReport:
        """Return how far it is, as the workers tell; rows that a death repeats count twice."""
        answered, failed = (0, 0) if self._shared is None else await self._shared.sampled()
        return self._batch.with_new(_Counts(answered, failed))

    async def stop(self, reason: LoopsError) -> None:
        """Let it ask for no more."""
        self._stopped = reason
        if self._shared is not None:
            await self._shared.stop(reason)

    async def stopped(self) -> LoopsError | None:
        """Return why it asks for no more, if that is so."""
        return self._stopped if self._shared is None else await self._shared.stopped()


class _Counts(Struct):
    answered: int = 0
    failed: int = 0
    retryable: int = 0

    def add(self, other: _Counts) -> None:
        self.answered += other.answered
        self.failed += other.failed
        self.retryable += other.retryable


class _Batch:
    """The state of a batch, from its input and its output."""

    def __init__(
        self,
        source: Folder,
        target: Folder,
        settings: BatchSettings,
        retry_errors: bool,
        drop_stale: bool,
        append: bool,
    ) -> None:
        self.source = source
        self.target = target
        self.settings = settings
        self._retry_errors = retry_errors
        self._drop_stale = drop_stale
        self._append = append
        self.files = source.files()
        self.kind: Kind = source.kind(self.files)
        self.parts = source.parts(self.files, self.kind)
        if self.kind == "parquet":
            for path in self.files:
                check_columns(source.schema(path).names, settings)
        self._kept = _Counts()
        self.report = BatchReport()

    def prepare(self) -> Keys:
        """Compare input and output, put the output in order, and return the keys of the rows that are done, sorted."""
        wanted, repeated = ordered(joined(_in_parallel(_keys_of, self.parts, self.source, self.settings)))
        if repeated:
            raise InputError("source", f"has {repeated} rows that are equal to others: give each an id")
        outputs = self.target.files()
        found = dict(zip(outputs, _in_parallel(_found_in, outputs, self.target, self.kind), strict=True))
        whole = {path: each for path, each in found.items() if each is not None}
        before = self.target.read_small(SETTINGS)
        digests = set().union(*(each.settings for each in whole.values()))
        check_settings(self.settings, digests, before, append=self._append, target=self.target.path)
        fate_of = fates(whole, wanted, retry_errors=self._retry_errors, append=self._append)
        stale = sum(int(fate.is_stale.sum()) for fate in fate_of.values())
        if stale and not self._drop_stale:
            raise InputError(
                "target",
                f"has {stale} records of rows that are gone from the input: move them to {STALE}/ with drop_stale, or "
                "choose another folder. Nothing was sent or changed",
            )
        self.target.make()
        self.target.write_small(SETTINGS, settings_file(self.settings, before))
        for path in found.keys() - whole.keys():
            self.target.set_aside(path, INCOMPLETE)
        done, counts = [], _Counts()
        for path, fate in fate_of.items():
            self._clean(path, fate)
            done.append(whole[path].keys[fate.is_done])
            answers = int((fate.is_done & whole[path].is_answer).sum())
            counts.add(_Counts(answers, int(fate.is_done.sum()) - answers))
        self._kept = counts
        self.report = BatchReport(rows=len(wanted), already=counts.answered, stale=stale)
        return ordered(joined(done))[0]

    def with_new(self, new: _Counts) -> BatchReport:
        """Return the report, given what this run has added to what was there."""
        return replace(
            self.report,
            answered=self._kept.answered + new.answered,
            failed=self._kept.failed + new.failed,
            retryable=self._kept.retryable + new.retryable,
        )

    def _clean(self, path: str, fate: Fate) -> None:
        """Leave in a file what is kept, and move what is stale."""
        for folder, which in fate.steps():
            records = self.target.read_file(path, self.kind).filter(pa.array(which))
            if folder == ITS_PLACE:
                self.target.replace(path, records)
            else:
                self.target.write(file_name(records), records, folder=f"{folder}/")


def _in_parallel(function: Any, parts: list[Any], *args: Any) -> list[Any]:
    """Call a function for each part in a task of its own."""
    task = ray.remote(function).options(num_cpus=READING_CPUS)
    return ray.get([task.remote(part, *args) for part in parts])


def _keys_of(part: Part, source: Folder, settings: BatchSettings) -> Keys:
    return packed(row.key for row in rows_of(source.read(part), settings))


def _found_in(path: str, target: Folder, kind: Kind) -> Found | None:
    """Return what is in a file of the output; None if it is not whole."""
    import numpy as np

    try:
        records = keys_and_errors(target.read_file(path, kind))
        return Found(
            keys=packed(key for key, _, _ in records),
            is_answer=np.array([error is None for _, _, error in records], bool),
            is_retryable=np.array([bool(error and error["retryable"]) for _, _, error in records], bool),
            settings={digest for _, digest, _ in records},
        )
    except UNREADABLE:
        return None


class _Rows(Datasource):
    """Reads the rows that are not done."""

    def __init__(self, batch: _Batch, done: Keys) -> None:
        self._batch = batch
        self._done = ray.put(done)

    def get_name(self) -> str:
        return "LoopsRows"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """Return a task for each part of the input."""
        batch = self._batch
        source, settings, done = batch.source, batch.settings, self._done
        nothing = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(lambda part=part: _left(part, source, settings, done), nothing) for part in batch.parts]


def _left(part: Part, source: Folder, settings: BatchSettings, done: Any) -> Iterator[pa.Table]:
    table = source.read(part)
    keys = packed(row.key for row in rows_of(table, settings))
    yield table.filter(pa.array(~are_in(keys, ray.get(done))))


class _Records(Datasink[_Counts]):
    """Writes records to files, each whole; a task that is repeated writes the same file again."""

    def __init__(self, target: Folder, rows_per_file: int) -> None:
        self._target = target
        self._rows_per_file = rows_per_file
        self.counts = _Counts()

    @property
    def min_rows_per_write(self) -> int:
        """About how many rows a file has."""
        return self._rows_per_file

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> _Counts:
        """Write one file."""
        tables = [block for block in blocks if block.num_rows]
        if not tables:
            return _Counts()
        table = pa.concat_tables(tables)
        self._target.write(file_name(table), table)
        errors = [error for _, _, error in keys_and_errors(table) if error is not None]
        retryable = sum(bool(error["retryable"]) for error in errors)
        return _Counts(table.num_rows - len(errors), len(errors), retryable)

    def on_write_complete(self, write_result: Any) -> None:
        for counts in write_result.write_returns:
            self.counts.add(counts)

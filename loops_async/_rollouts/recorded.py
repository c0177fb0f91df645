"""Batches that the journal has: a stream of a program that is started again hands out the same ones."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from .._journal.journal import Journal
from .batch import RolloutBatch, RolloutGroup, add_examples
from .episode import Episode
from .state import RolloutState

__all__ = ["RecordedBatch", "RecordedBatches"]


class _Group(Struct, array_like=True):
    """What a `RolloutGroup` is made of; its training examples follow from the advantages."""

    index: int
    version: int
    task: Any
    episodes: list[Episode]
    advantages: list[float]


class _Batch(Struct, array_like=True):
    step: int
    is_last_of_step: bool
    groups: list[_Group]
    metrics: dict[str, float]
    state: RolloutState


class RecordedBatch(Struct, frozen=True):
    """A batch, and the state of the stream that had handed it out."""

    batch: RolloutBatch
    state: RolloutState


class RecordedBatches:
    """The batches of one stream: the n-th stream of a run that a program makes."""

    def __init__(self, journal: Journal, run_id: str) -> None:
        self._journal = journal
        self._stream = journal.numbered(f"rollouts of run {run_id}")
        self._place = 0
        self._upcoming: _Batch | None = None

    async def open(self) -> None:
        """Read the first batch; `is_over` is known from then on."""
        self._upcoming = await self._read(0)

    @property
    def is_over(self) -> bool:
        """Whether all batches that an earlier process has handed out were handed out again."""
        return self._upcoming is None

    async def next(self) -> RecordedBatch | None:
        """Return the next batch that an earlier process has handed out; None if there is none left."""
        record = self._upcoming
        if record is None:
            return None
        groups = [
            RolloutGroup(
                index=group.index,
                task=group.task,
                version=group.version,
                episodes=group.episodes,
                advantages=group.advantages,
            )
            for group in record.groups
        ]
        for each in groups:
            await add_examples(each)
        batch = RolloutBatch(
            groups=groups, step=record.step, is_last_of_step=record.is_last_of_step, metrics=record.metrics
        )
        self._upcoming = await self._read(self._place + 1)
        self._place += 1  # only now, so that a caller that is cancelled misses no batch
        return RecordedBatch(batch, record.state)

    async def put(self, batch: RolloutBatch, state: RolloutState) -> None:
        """Record a batch that is about to be handed out."""
        place, self._place = self._place, self._place + 1
        await self._journal.put_batch(self._stream, place, lambda: _encoded(batch, state))

    async def _read(self, place: int) -> _Batch | None:
        return await self._journal.batch(self._stream, place, msgspec.msgpack.Decoder(_Batch).decode)


def _encoded(batch: RolloutBatch, state: RolloutState) -> bytes:
    groups = [
        _Group(group.index, group.version, _plain(group.task), group.episodes, group.advantages)
        for group in batch.groups
    ]
    record = _Batch(batch.step, batch.is_last_of_step, groups, batch.metrics, state)
    return msgspec.msgpack.encode(record, enc_hook=_number)


def _plain(task: Any) -> Any:
    """Return a task in JSON types; None where it has no such form."""
    try:
        return msgspec.to_builtins(task, str_keys=True, enc_hook=_number)
    except (TypeError, ValueError):
        return None


def _number(value: Any) -> Any:
    """Return what numpy or torch made."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be recorded")

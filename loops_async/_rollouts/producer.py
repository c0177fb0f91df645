"""Beginning groups: a task is read, waits for a place, and is rolled out; what became of it is kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Callable, Iterable
from contextlib import aclosing
from typing import Any, TypeAlias

from .._http.body import Pacer
from .._sampling.many import each
from .._tasks import TaskOwner, is_being_cancelled
from ..errors import RolloutError
from .batch import RolloutGroup, prepare
from .context import Group, Resources
from .failures import Breaker
from .gate import StalenessGate, Ticket
from .options import Options
from .progress import Progress
from .rolling import Dropped, Failed, Roller

__all__ = ["Producer", "Tasks"]

log = logging.getLogger("loops_async")

Tasks: TypeAlias = Iterable[Any] | AsyncIterable[Any]


class Producer:
    """Begins a group for each task, as soon as the gate admits it; one task is read ahead.

    Calls `on_change` whenever a group has ended, or the tasks have.
    """

    def __init__(
        self,
        roller: Roller,
        options: Options,
        *,
        gate: StalenessGate,
        progress: Progress,
        resources: Resources,
        tasks: TaskOwner,
        affinity: str,
        on_change: Callable[[], None],
    ) -> None:
        self._roller = roller
        self._options = options
        self._gate = gate
        self._progress = progress
        self._resources = resources
        self._meter = resources.meter
        self._tasks = tasks
        self._affinity = affinity
        self._on_change = on_change
        self._breaker = Breaker(options.on_failure)
        self._reader: asyncio.Task[None] | None = None
        self._running: dict[asyncio.Task[None], Group] = {}
        self.finished: dict[Ticket, RolloutGroup] = {}
        """Groups to hand out."""
        self.failure: BaseException | None = None
        """Why no group will be begun any longer."""

    def start(self, source: Tasks) -> None:
        """Begin to read tasks."""
        self._reader = self._tasks.start(self._read(source), name="read tasks")
        self._reader.add_done_callback(self._ended)

    @property
    def has_read_all(self) -> bool:
        """Whether no further group will begin."""
        return self._reader is not None and self._reader.done()

    @property
    def has_ended(self) -> bool:
        """Whether no further group will end."""
        return self.has_read_all and not self._running

    @property
    def running(self) -> list[Group]:
        """The groups under way, the oldest first."""
        return list(self._running.values())

    def end_without_batch(self, *, may_raise: bool) -> None:
        """Say why the tasks ended without a batch; raise if groups have failed.

        Raises:
            RolloutError: groups have failed, and `may_raise`.
        """
        self._fail(self._breaker.end_without_batch(may_raise=may_raise))
        if self.failure is not None:
            raise self.failure

    async def _read(self, source: Tasks) -> None:
        pacer = Pacer()
        try:
            index = 0
            async with aclosing(each(source)) as tasks:
                async for task in tasks:
                    if self._progress.is_wanted(index):
                        self._begin(index, task, await self._gate.admit())
                    else:
                        await pacer.pause()  # there may be millions of them
                    index += 1
            self._warn_of_missing_tasks(index)
        except asyncio.CancelledError as cancelled:
            if is_being_cancelled():
                raise
            # Otherwise the data would seem to have ended.
            raise RolloutError("`tasks` raised CancelledError, though the stream was not cancelled") from cancelled

    def _warn_of_missing_tasks(self, count: int) -> None:
        """Warn of tasks that are certainly not those that were meant."""
        begun = self._progress.first_new
        if count < begun:
            log.warning(
                "`tasks` ended after %d, but the stream continues from a state in which %d had been begun: `tasks` "
                "must come from the first on again, in the same order",
                count,
                begun,
            )
        elif not count:
            log.warning("`tasks` is empty, so there is nothing to roll out; an iterator can be used only once")

    def _begin(self, index: int, task: Any, ticket: Ticket) -> None:
        self._progress.begun(index)
        group = Group(index, task, ticket.version, affinity_key=f"{self._affinity}/{index}", priority=index)
        running = self._tasks.start(self._roll_out(group, ticket), name=f"roll out task {index}")
        self._running[running] = group
        running.add_done_callback(self._ended)

    async def _roll_out(self, group: Group, ticket: Ticket) -> None:
        try:
            outcome = await self._outcome(group)
        except BaseException:
            ticket.drop()
            raise
        match outcome:
            case RolloutGroup():
                self.finished[ticket] = outcome
                self._breaker.accepted()
                ticket.accept()
            case Dropped(is_constant=is_constant):
                self._progress.ended(group.index)
                self._breaker.dropped(is_constant=is_constant)
                ticket.drop()
            case Failed(error=error):
                self._progress.ended(group.index)
                self._breaker.failed(error)
                ticket.fail()
        self._fail(self._breaker.error)

    async def _outcome(self, group: Group) -> RolloutGroup | Dropped | Failed:
        result = await self._roller.roll_out(group)
        if isinstance(result, Failed):
            return result
        if isinstance(result, Dropped):
            self._meter.ended(result.episodes, is_constant=False, is_dropped=True)
            return result
        finished = RolloutGroup(index=group.index, task=group.task, version=group.version, episodes=result)
        try:
            is_constant = not await prepare(finished, self._options, self._resources.max_episode_tokens)
        except Exception as error:  # e.g. of a function of the user's that computes advantages
            return Failed(error)
        is_dropped = is_constant and not self._options.keep_constant_groups
        self._meter.ended(result, is_constant=is_constant, is_dropped=is_dropped)
        return Dropped(result, is_constant=True) if is_dropped else finished

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        if not task.cancelled():
            self._fail(task.exception())
        self._on_change()

    def _fail(self, error: BaseException | None) -> None:
        """Begin no further group if there is an error."""
        if error is not None and self.failure is None:
            self.failure = error
            if self._reader is not None:
                self._reader.cancel()

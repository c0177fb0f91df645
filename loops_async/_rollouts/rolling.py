"""Rolling out one group: its members side by side, and their repetitions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from functools import partial
from inspect import isawaitable, iscoroutinefunction, isfunction, ismethod, unwrap
from typing import Any

from msgspec import Struct

from .._arguments import check_finite
from .._tasks import cancel_and_wait, is_being_cancelled, run_to_completion, take_exception
from .._waiting import TimeLimit
from ..errors import BudgetExceededError, InputError
from ..types.tensors import is_list_like, plain_number
from .context import Group, Resources, Rollout, RolloutContext, agent_episode, check_refusal, leave, shut
from .episode import Episode
from .options import Options, members_needed

__all__ = ["Dropped", "Failed", "Roller", "is_plain_function"]

log = logging.getLogger("loops_async")


class Dropped(Struct, frozen=True):
    """A group with nothing to learn: `is_constant`, or too many members were left out; these were finished."""

    episodes: list[Episode]
    is_constant: bool = False


class Failed(Struct, frozen=True):
    """An episode, or a whole group, has failed for good."""

    error: BaseException


class Roller:
    """Rolls out groups with one function."""

    def __init__(self, rollout: Rollout, options: Options, resources: Resources) -> None:
        self._rollout = rollout
        self._options = options
        self._resources = resources
        self._has_warned = False

    async def roll_out(self, group: Group) -> list[Episode] | Dropped | Failed:
        """Return the episodes of a group; none of its rollouts runs any longer."""
        options = self._options
        result = await (self._members(group) if options.unit == "episode" else self._whole(group))
        if isinstance(result, list) and len(result) < members_needed(options.on_failure, options.group_size):
            return Dropped(result)
        return result

    async def _members(self, group: Group) -> list[Episode] | Failed:
        """Return the members that are complete, once they are enough or cannot become enough."""
        size = self._options.group_size
        spare = size - members_needed(self._options.on_failure, size)
        running = {self._start(group, member): member for member in range(size)}
        episodes: dict[int, Episode] = {}
        missing, failure = 0, None
        try:
            while running and missing <= spare:
                ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    member, result = running.pop(task), _result_of(task)
                    if isinstance(result, Episode):
                        episodes[member] = result
                        continue
                    missing += 1
                    failure = result if isinstance(result, Failed) else failure
        finally:
            group.is_ending = True
            await cancel_and_wait(running)
        if failure is not None and missing > spare:
            return failure
        return [episodes[member] for member in sorted(episodes)]

    def _start(self, group: Group, member: int) -> asyncio.Task[Any]:
        # The blocking form names the rollout's thread so, too.
        name = f"loops_async: roll out task {group.index}, member {member}"
        task = asyncio.create_task(self._repeated(group, member), name=name)
        task.add_done_callback(take_exception)
        return task

    async def _whole(self, group: Group) -> list[Episode] | Failed:
        """Return the episodes of a rollout that makes all members of a group."""
        task = self._start(group, 0)
        try:
            await asyncio.wait([task])
        finally:
            group.is_ending = True
            await cancel_and_wait([task])
        result = _result_of(task)
        if isinstance(result, Failed):
            return result
        return [] if result is None else [each for each in result if each is not None]

    async def _repeated(self, group: Group, member: int) -> Any:
        """Return the result of a rollout, repeated while its failure may pass; `Failed` if it does not.

        Raises:
            BudgetExceededError: the budget of the client allows no more samples.
        """
        policy, attempt = self._options.on_failure, 0
        while True:
            is_group = self._options.unit == "group"
            context = RolloutContext(self._resources, group, member=member, attempt=attempt, for_group=is_group)
            try:
                result = await self._timed(self._rolled_out(context, group))
                check_refusal(context)
                return self._checked(result, context)
            except asyncio.CancelledError as cancelled:
                if is_being_cancelled():
                    raise
                error: BaseException = cancelled  # raised by a library: this rollout was not cancelled
            except BudgetExceededError:
                raise  # every other group would get it, too: the stream ends, and the task counts as not begun
            except Exception as failure:
                error = failure
            check_refusal(context)
            if group.is_ending:
                return Failed(error)  # which a cancellation became
            if attempt >= policy.retries or not policy.may_pass(error):
                self._warn_once(error, context)
                return Failed(error)
            attempt += 1
            self._resources.meter.retries += 1
            await asyncio.sleep(policy.pause_before(attempt, error))

    def _warn_once(self, error: BaseException, context: RolloutContext) -> None:
        """Warn of the first rollout that fails: its group may be spared, or end long before a batch is missed."""
        if self._has_warned:
            return
        self._has_warned = True
        message = "the rollout of task %d, member %d has failed; further failures are only counted (groups/failed)"
        log.warning(message, context.index, context.member, exc_info=error)

    async def _rolled_out(self, context: RolloutContext, group: Group) -> Any:
        """Return what a rollout returns; nothing that it began runs any longer, whatever its end is."""
        rollout: Any = self._rollout(context, group.task)
        if not isawaitable(rollout):
            raise InputError("rollout", f"must be `async def`; it returned {type(rollout).__name__}, not an awaitable")
        return await (rollout if self._resources.agents is None else _left_first(rollout, context))

    async def _timed(self, rollout: Awaitable[Any]) -> Any:
        limit = self._options.episode_timeout
        with TimeLimit(limit):
            return await rollout
        raise TimeoutError(f"a rollout took longer than episode_timeout={limit} s")

    def _checked(self, result: Any, context: RolloutContext) -> Any:
        """Return what a rollout has returned, if it can be trained on."""
        if isinstance(number := plain_number(result), int | float):
            result = agent_episode(context, number)
        if result is None:
            return None
        if self._options.unit == "episode":
            return _checked_episode(result, "the rollout")
        size = self._options.group_size
        if not is_list_like(result) or len(result) != size:
            raise InputError("rollout", f'with unit="group" it must return {size} episodes; got {result!r:.200}')
        return [None if each is None else _checked_episode(each, f"member {i}") for i, each in enumerate(result)]


def _result_of(rollout: asyncio.Task[Any]) -> Any:
    """Return the result of a rollout; one that was cancelled though its group was not, e.g. by itself, has failed."""
    if rollout.cancelled():
        return Failed(asyncio.CancelledError("the rollout was cancelled, though not by its stream"))
    return rollout.result()


def is_plain_function(rollout: Any) -> bool:
    """Whether a rollout is a plain ``def``; a lambda or an object that is called may return an awaitable."""
    while isinstance(rollout, partial):
        rollout = rollout.func
    rollout = unwrap(rollout)
    is_def = (isfunction(rollout) or ismethod(rollout)) and rollout.__name__ != "<lambda>"
    return is_def and not iscoroutinefunction(rollout)


async def _left_first(rollout: Awaitable[Any], context: RolloutContext) -> Any:
    """Await a rollout, and shut its door before it is cancelled: that ends the calls of an agent that blocks."""

    async def run() -> Any:
        return await rollout

    async def end() -> None:
        await shut(context)
        await cancel_and_wait([task])
        await leave(context)

    current = asyncio.current_task()
    task = asyncio.create_task(run(), name=None if current is None else current.get_name())
    task.add_done_callback(take_exception)
    try:
        await asyncio.wait([task])
        return task.result()
    finally:
        await run_to_completion(end())


def _checked_episode(episode: Any, source: str) -> Episode:
    if not isinstance(episode, Episode):
        raise InputError("rollout", f"{source} must be an Episode or None; got {type(episode).__name__}")
    if episode.reward is None:
        raise InputError("rollout", f"{source} has no reward: set episode.reward before you return it")
    if not episode.turns and not episode.sampled_tokens:
        raise InputError(
            "rollout", f"{source} has nothing that was sampled: call `ctx.sample(episode)`, in loops_async with `await`"
        )
    episode.check()
    episode.reward = check_finite(episode.reward, "reward")  # a float, also where it was numpy's or torch's
    return episode

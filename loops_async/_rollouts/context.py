"""What a rollout works with: the newest weights, the facts of its group, and a place for code that blocks."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, Final, TypeAlias, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from .._agents.gateway import AgentGateway, AgentRollout, gateway_rollout, shut_rollout
from .._agents.requests import stops_of
from .._arguments import check_at_least, check_finite
from .._sampling.limiter import Limiter, slots
from ..errors import BudgetExceededError, InputError, ProtocolError
from ..sampling import SamplingClient
from ..types import ModelInput, SampledSequence, SampleResponse, SamplingParams
from .agents import episode_of
from .episode import Episode
from .executor import Workers
from .metrics import Meter
from .policy import Policy

__all__ = ["Group", "Resources", "Rollout", "RolloutContext", "agent_episode", "check_refusal", "leave", "shut"]

NO_ROOM: Final = SampledSequence(tokens=[], logprobs=[], stop_reason="length")
"""The answer where there is no room for a token."""

T = TypeVar("T")

log = logging.getLogger("loops_async")


class Group:
    """One group while it is rolled out. `priority` is its place in the queue of the limiter: the smallest is first."""

    def __init__(self, index: int, task: Any, version: int, *, affinity_key: str, priority: int) -> None:
        self.index = index
        self.task = task
        self.version = version
        self.affinity_key = affinity_key
        self.priority = priority
        self.began: float = asyncio.get_running_loop().time()
        self.heard_at: float = self.began
        self.is_ending: bool = False
        """Whether its rollouts are being cancelled, so that none may begin again."""

    def heard(self) -> None:
        """Note that a rollout of this group makes progress."""
        self.heard_at = asyncio.get_running_loop().time()


class Resources(Struct, kw_only=True):
    """What all rollouts of a stream, or all of one evaluation, share."""

    policy: Callable[[], Policy[SamplingClient]]
    """Returns the weights to sample now."""
    group_size: int
    seed: int | None
    limiter: Limiter
    workers: Workers
    meter: Meter
    max_episode_tokens: int | None = None
    agents: AgentGateway | None = None
    """What serves agents, if that was asked for."""
    has_warned: bool = False
    """Also set where a reshaped distribution is no mistake: in an evaluation."""


class RolloutContext:
    """What a rollout samples with, and what it may know of its group.

    A stream gives one to each call of a rollout. Members of a group share `affinity_key`, so that the sampler computes
    their prompt once. `index` is the number of the task, from 0; `member` is the number within the group, from 0;
    `attempt` counts how often this member has failed before, from 0.

    Example:
        ::

            async def rollout(ctx, task):
                episode = loops.Episode.start(task.prompt)
                while not task.is_done(episode):
                    answer = await ctx.sample(episode, loops.SamplingParams(max_tokens=256))
                    episode.observe(await ctx.run(task.reply, answer.tokens))
                episode.reward = task.grade(episode)
                return episode
    """

    def __init__(
        self, resources: Resources, group: Group, *, member: int, attempt: int, for_group: bool = False
    ) -> None:
        self._resources = resources
        self._group = group
        self._member = member
        self._attempt = attempt
        self._for_group = for_group
        self._calls = 0
        self._agent: AgentRollout | None = None
        self._refusal: BudgetExceededError | None = None
        """Why the budget refused a call, unless one that was made later was answered."""

    @property
    def index(self) -> int:
        """The number of the task, from 0."""
        return self._group.index

    @property
    def member(self) -> int:
        """The number of this episode in its group, from 0; 0 where one call rolls out the whole group."""
        return self._member

    @property
    def attempt(self) -> int:
        """How often this episode has failed before."""
        return self._attempt

    @property
    def group_size(self) -> int:
        """The number of episodes in the group."""
        return self._resources.group_size

    @property
    def version(self) -> int:
        """The steps whose weights were published when the group began, as `StalenessGate.version`."""
        return self._group.version

    @property
    def affinity_key(self) -> str:
        """What the requests of the group have in common, so that they reach the same replica."""
        return self._group.affinity_key

    @property
    def sampler(self) -> SamplingClient:
        """A client of the newest published weights, for what `sample` does not offer; it is not part of the limit."""
        return self._resources.policy().sampler

    @property
    def policy(self) -> Policy[SamplingClient]:
        """The newest published weights, for a rollout that runs elsewhere: see `ProcessExecutor.run`.

        What is sampled there is not part of the stream's limit: the places of the executor are the limit. The stream
        still admits, repeats and cancels the rollout.

        Example:
            ::

                async def rollout(ctx, task):
                    return await executor.run(whole_episode, ctx.policy, task)
        """
        return self._resources.policy()

    @property
    def openai(self) -> AgentRollout:
        """The address and the key with which any client of OpenAI's or Anthropic's API is this rollout.

        Its `base_url` and `api_key` are for this rollout alone, and are closed when it ends; `openai_client` returns a
        client that has them. What is sampled with them is sampled as `sample` does it: with the newest weights, within
        the stream's limit, and with its seeds. The rollout then returns its reward, a number; it becomes an `Episode`
        of what was sampled.

        Raises:
            InputError: the stream was made without `agents`, or with ``unit="group"``.

        Example:
            ::

                async def rollout(ctx, task):
                    return await my_agent(ctx.openai.base_url, ctx.openai.api_key, task)
        """
        if self._agent is None:
            self._agent = self._new_agent()
        return self._agent

    async def sample(
        self, episode: Episode, sampling_params: SamplingParams | None = None, *, slice_tokens: int | None = None
    ) -> SampledSequence:
        """Sample the next answer of an episode, append it, and return it.

        It is sampled with the newest published weights, when it is its turn in the stream's limit.

        Args:
            episode: what to continue; `Episode.act` appends the answer with the version of the weights.
            sampling_params: how to sample; `SamplingParams()` when None. `max_tokens` is cut to the room left in
                `max_episode_tokens`. If these parameters or the stream have a seed, the seed that is sent is computed
                from both, and from the task, the member, the attempt and the number of the call.
            slice_tokens: sample the answer in requests of this many tokens, each with the newest weights, so that a
                long answer does not become stale. The answer then has no `text`.

        Returns:
            The answer. Without room for a token, an empty one whose `stop_reason` is ``"length"``; the episode then
            counts as truncated.

        Raises:
            InputError: an argument is invalid, e.g. `slice_tokens` together with stop strings; or the episode was
                changed meanwhile, e.g. by another `sample` of it.
            LoopsError: the errors of `SamplingClient.sample`. The stream repeats the episode if that may help.
        """
        if not isinstance(episode, Episode):
            raise InputError("episode", f"expected an Episode, got {type(episode).__name__}")
        params = self._cut(self._checked(sampling_params), len(episode.tokens))
        if params is None:
            episode.act(NO_ROOM)
            return NO_ROOM
        if slice_tokens is None:
            return await self._act(episode, params)
        return await self._act_in_slices(episode, params, _slice_size(slice_tokens, params))

    async def sample_group(
        self, prompt: ModelInput | Sequence[int], sampling_params: SamplingParams | None = None
    ) -> list[Episode]:
        """Sample `group_size` answers to a prompt in one request, and return an episode of each.

        For rollouts of whole groups (``unit="group"``). Arguments and errors are those of `sample`.
        """
        episodes = [Episode.start(prompt) for _ in range(self.group_size)]
        tokens = episodes[0].tokens
        params = self._cut(self._checked(sampling_params), len(tokens))
        if params is None:
            return [episode.act(NO_ROOM) for episode in episodes]
        answer, version = await self._ask(tokens, len(episodes), params)
        return [
            episode.act(sequence, policy_version=version)
            for episode, sequence in zip(episodes, answer.sequences, strict=True)
        ]

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Return ``function(*args)``, called where it may block: in the stream's `executor`, or in a worker thread.

        For what takes more than a few milliseconds of CPU, or waits without the event loop's knowledge: meanwhile the
        other rollouts go on.
        """
        result = await self._resources.workers.run(function, *args)
        self._group.heard()
        return result

    # --- agents ---

    def _agent_episode(self, reward: float) -> Episode | None:
        if self._agent is None:
            raise InputError("rollout", f"must be an Episode or None, unless it uses `ctx.openai`; got {reward!r}")
        return episode_of(self._agent.trajectories(), check_finite(reward, "reward"))

    async def _shut(self) -> None:
        if self._agent is not None:
            await shut_rollout(self._agent)

    async def _leave(self) -> None:
        if self._agent is not None:
            await self._agent.close()

    def _new_agent(self) -> AgentRollout:
        gateway = self._resources.agents
        if gateway is None:
            raise InputError("agents", "must be given to `rollouts`, e.g. agents={}, for `ctx.openai` to be served")
        if self._for_group:
            raise InputError("unit", "must be 'episode' where agents are rolled out: each call has one record")
        return gateway_rollout(gateway, lambda: self._sample_for_agent)

    async def _sample_for_agent(self, prompt: list[int], count: int, params: SamplingParams) -> SampleResponse:
        answer, version = await self._ask(prompt, count, self._checked(params))
        return replace(answer, policy_version=version)

    # --- requests ---

    async def _act(self, episode: Episode, params: SamplingParams) -> SampledSequence:
        size = len(episode.tokens)
        answer, version = await self._ask(episode.tokens, 1, params)
        if len(episode.tokens) != size:  # the answer would follow other tokens than those that it was sampled for
            raise InputError(
                "episode", "was changed while its next answer was sampled; sample and observe one after the other"
            )
        episode.act(answer.sequences[0], policy_version=version)
        return answer.sequences[0]

    async def _act_in_slices(self, episode: Episode, params: SamplingParams, size: int) -> SampledSequence:
        slices: list[SampledSequence] = []
        left = params.max_tokens or math.inf
        while left > 0:
            wanted = int(min(size, left))
            slices.append(await self._act(episode, replace(params, max_tokens=wanted)))
            if slices[-1].stop_reason != "length" or len(slices[-1].tokens) < wanted:
                break
            left -= wanted
        episode.turns -= len(slices) - 1  # to the environment they are one answer
        return SampledSequence(
            tokens=[token for each in slices for token in each.tokens],
            logprobs=[logprob for each in slices for logprob in each.logprobs or ()],
            stop_reason=slices[-1].stop_reason,
        )

    async def _ask(self, prompt: list[int], count: int, params: SamplingParams) -> tuple[SampleResponse, int | None]:
        """Sample `count` sequences; return the answer and the version of its weights."""
        resources = self._resources
        seeded = replace(params, seed=self._next_seed(params.seed))
        async with slots(resources.limiter, count, priority=self._group.priority) as held:
            policy = resources.policy()  # only now, so that it is the newest
            with resources.meter.in_flight(), self._noted_refusal():
                answer = await policy.sampler.sample(prompt, count, seeded, affinity_key=self.affinity_key)
            held.finished(sum(len(sequence.tokens) for sequence in answer.sequences))
        self._group.heard()
        if len(answer.sequences) != count:
            raise ProtocolError(f"the sampler sent {len(answer.sequences)} sequences where {count} were requested")
        if answer.policy_version is None and policy.sampler.checkpoint_path is not None:
            return answer, policy.version
        return answer, answer.policy_version

    @contextmanager
    def _noted_refusal(self) -> Generator[None]:
        """Note whether the budget refuses the call in the block."""
        before = self._refusal
        try:
            yield
        except BudgetExceededError as refusal:
            self._refusal = refusal
            raise
        if self._refusal is before:  # else another call was refused meanwhile
            self._refusal = None

    def _check_refusal(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _cut(self, params: SamplingParams, used: int) -> SamplingParams | None:
        """Cut `max_tokens` to the room that `used` tokens leave; return None if there is none."""
        most = self._resources.max_episode_tokens
        if most is None:
            return params
        room = most - used
        return None if room <= 0 else replace(params, max_tokens=min(room, params.max_tokens or room))

    def _next_seed(self, seed: int | None) -> int | None:
        self._calls += 1
        if seed is None and self._resources.seed is None:
            return None
        return derived_seed(seed, self._resources.seed, self.index, self._member, self._attempt, self._calls)

    def _checked(self, params: SamplingParams | None) -> SamplingParams:
        if params is None:
            return SamplingParams()
        if not isinstance(params, SamplingParams):
            raise InputError("sampling_params", f"expected SamplingParams, got {type(params).__name__}")
        if params.max_tokens is not None:
            check_at_least(params.max_tokens, 1, "sampling_params.max_tokens")
        if not self._resources.has_warned and (reshaped := _reshaped(params)):
            self._resources.has_warned = True
            log.warning(
                "rollouts are sampled with %s, but logprobs are those of the plain distribution: importance ratios are "
                "wrong by as much as the two differ. Train with temperature=1, top_p=1 and top_k=-1.",
                reshaped,
            )
        return params


_PLAIN: Final[dict[str, tuple[float, ...]]] = {"temperature": (1.0,), "top_p": (1.0,), "top_k": (-1, 0)}
"""The values with which the distribution is that of the model."""

Rollout: TypeAlias = Callable[[RolloutContext, Any], Awaitable[Episode | Sequence[Episode | None] | float | None]]
"""Rolls out a task: returns an episode with a reward, or None to leave it out; a list of them with ``unit="group"``.

One that uses `RolloutContext.openai` returns the reward alone.
"""


def agent_episode(context: RolloutContext, reward: float) -> Episode | None:
    """Return what an agent sampled as an episode; None if that was nothing.

    Raises:
        InputError: the rollout used no agent, so that there is nothing that the reward could be of.
    """
    return context._agent_episode(reward)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - private to users


def check_refusal(context: RolloutContext) -> None:
    """Raise an error that the rollout may have caught: an agent sees an error of HTTP in its place.

    Raises:
        BudgetExceededError: the budget refused a call of this attempt, and none that was made later was answered.
    """
    context._check_refusal()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - private to users


async def shut(context: RolloutContext) -> None:
    """Let the agent of one attempt make no further call, and cancel its samples."""
    await context._shut()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - private to users


async def leave(context: RolloutContext) -> None:
    """Close what belongs to one attempt, once nothing of it runs any longer."""
    await context._leave()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - private to users


def derived_seed(*parts: int | None) -> int:
    """Return a seed of 31 bits, which every sampler accepts; equal parts give equal seeds, on every machine."""
    numbers = [None if part is None else int(part) for part in parts]  # `repr` shows where one is numpy's
    digest = blake2b(repr(numbers).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _reshaped(params: SamplingParams) -> str:
    """Return the settings that change the distribution."""
    settings = {name: getattr(params, name) for name in _PLAIN}
    return ", ".join(f"{name}={value!r}" for name, value in settings.items() if value not in _PLAIN[name])


def _slice_size(slice_tokens: int, params: SamplingParams) -> int:
    size = check_at_least(slice_tokens, 1, "slice_tokens")
    if stops_of(params):
        raise InputError("slice_tokens", "cannot be used with stop strings, which may span two slices; use token ids")
    if params.structured_outputs is not None:
        raise InputError("slice_tokens", "cannot be used with structured_outputs, which each slice would begin anew")
    return size

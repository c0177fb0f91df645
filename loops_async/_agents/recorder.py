"""Answers the calls of one rollout, and records them."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from .._tasks import TaskOwner, run_to_completion
from ..errors import LoopsError, ProtocolError
from ..types import SampledSequence, SampleResponse, SamplingParams
from .continued_text import TextContinuity
from .continuity import Continuity
from .errors import RefusedCall, refusal_of
from .exchange import Exchange
from .messages import Message
from .parsers import ToolParser
from .prompts import Prompter
from .records import Call, Prompt, Status
from .replies import read_reply, read_text
from .requests import AgentRequest, Sampling, stops_of
from .tokens import Tokens

__all__ = ["Kit", "Recorder", "Sample"]

log = logging.getLogger("loops_async")

Sample: TypeAlias = Callable[[list[int], int, SamplingParams], Awaitable[SampleResponse]]
"""Samples a prompt: its tokens, the number of completions, and how."""


class Kit(Struct, frozen=True, kw_only=True):
    """What all rollouts of a gateway share."""

    tokens: Tokens
    prompter: Prompter
    parser: ToolParser
    sampling: Sampling
    variables: Mapping[str, Any]
    max_context: int | None
    grace: float


class Recorder:
    """The calls of one rollout, by arrival, and what runs for them."""

    def __init__(self, kit: Kit, sample: Callable[[], Sample], max_calls: int | None) -> None:
        self.calls: list[Call] = []
        self.is_closed: bool = False
        self.kit: Kit = kit
        self._sample = sample
        self._max_calls = max_calls
        self._asked = 0
        self._messages = Continuity()
        self._texts = TextContinuity()
        self._tasks = TaskOwner()
        self._exchanges: dict[bytes, Exchange] = {}

    def exchange(self, request: AgentRequest, *, key: bytes, is_retry: bool) -> Exchange:
        """Begin to answer a request, or join the attempt that this one repeats.

        Args:
            request: what is asked.
            key: equal for requests with the same path and body.
            is_retry: whether the client says that it has sent this before.

        Raises:
            RefusedCall: the rollout is closed, or may make no further call.
        """
        self._check_open()
        known = self._exchanges.get(key)
        if is_retry and known is not None and not known.has_failed:
            return known
        if self._max_calls is not None and self._asked >= self._max_calls:
            raise RefusedCall(400, "rollout_limit", f"this rollout may make {self._max_calls} calls, and has made them")
        self._asked += 1
        # Now, so that a later change of the gateway's sampler does not concern this call.
        answer = self._answer(request, self._sample())
        exchange = Exchange(self._tasks.start(answer, name="answer an agent"), self.kit.grace)
        self._exchanges[key] = exchange
        return exchange

    async def count(self, request: AgentRequest) -> int:
        """Return how many tokens the prompt of a request has, rendered anew; nothing is recorded."""
        self._check_open()
        call = Call(request.route, request.model)
        variables = {**self.kit.variables, **request.variables}
        await self.kit.prompter.prepare(call, request.messages, request.tools, variables, Continuity())
        return len(call.prompt.tokens())

    async def close(self) -> None:
        """Cancel every call that runs, and wait until it has ended."""
        self.is_closed = True
        self._exchanges.clear()
        await run_to_completion(self._tasks.close())

    def _check_open(self) -> None:
        if self.is_closed:
            raise RefusedCall(410, "rollout_closed", "the rollout is closed")

    async def _answer(self, request: AgentRequest, sample: Sample) -> list[Call]:
        """Return the calls, one for each reply."""
        calls = [Call(request.route, request.model) for _ in range(request.count)]
        for index, call in enumerate(calls[1:], start=1):
            call.id = f"{calls[0].id}-{index}"
        self.calls += calls
        try:
            return await self._answered(calls, request, sample)
        except asyncio.CancelledError:
            _end(calls, "cancelled", "the agent went away, or the rollout was closed")
            raise
        except RefusedCall as refused:
            _end(calls, "failed", str(refused))
            raise
        except LoopsError as error:
            _end(calls, "failed", f"{type(error).__name__}: {error}")
            raise refusal_of(error) from error
        except Exception as error:
            log.exception("a call of an agent has failed")
            _end(calls, "failed", repr(error))
            raise RefusedCall(500, "gateway_failed", f"the gateway failed: {error!r}") from error

    async def _answered(self, calls: list[Call], request: AgentRequest, sample: Sample) -> list[Call]:
        params = self.kit.sampling.of(request.params)
        await self._prepare(calls[0], request)
        prompt = calls[0].prompt
        tokens = prompt.tokens()
        params = self._fitted(params, len(tokens))
        response = await sample(tokens, len(calls), params)
        if len(response.sequences) != len(calls):
            raise ProtocolError(f"the sampler sent {len(response.sequences)} sequences, not {len(calls)}")
        for call, sequence in zip(calls, response.sequences, strict=True):
            call.prompt = prompt
            text, call.stop_string = await read_text(sequence, self.kit.tokens, stops_of(params))
            self._record(call, sequence, response.policy_version)
            self._read(call, text, request)
        for call in calls:
            self._finish(call, request)
        return calls

    async def _prepare(self, call: Call, request: AgentRequest) -> None:
        """Set the prompt of a call."""
        if request.route == "completions":
            await self._continue_text(call.prompt, request.prompt)
            return
        variables = {**self.kit.variables, **request.variables}
        await self.kit.prompter.prepare(call, request.messages, request.tools, variables, self._messages)

    async def _continue_text(self, prompt: Prompt, given: str | list[int]) -> None:
        found = self._texts.find(given)
        rest = given if found is None else given[found[1] :]
        ids = rest if isinstance(rest, list) else await self.kit.tokens.encode(rest, is_begin=found is None)
        if found is None:
            prompt.begin_anew("new", ids, None)
        else:
            prompt.continue_call(found[0], [], ids)

    def _fitted(self, params: SamplingParams, used: int) -> SamplingParams:
        """Cut `max_tokens` to the room that the prompt leaves."""
        if used == 0:
            raise RefusedCall(400, "invalid_value", "the prompt has no token", param="prompt")
        most = self.kit.max_context
        if most is None:
            return params
        if used >= most:
            message = f"the prompt has {used} tokens, and max_context is {most}"
            raise RefusedCall(400, "context_length_exceeded", message, param="messages")
        return replace(params, max_tokens=min(most - used, params.max_tokens or most))

    def _record(self, call: Call, sequence: SampledSequence, policy_version: int | None) -> None:
        call.tokens = list(sequence.tokens)
        given = sequence.logprobs
        call.logprobs = [math.nan] * len(call.tokens) if given is None else list(given)
        if len(call.logprobs) != len(call.tokens):
            raise ProtocolError(f"the sampler sent {len(call.logprobs)} logprobs for {len(call.tokens)} tokens")
        call.policy_version = policy_version
        call.stop_reason = sequence.stop_reason

    def _read(self, call: Call, text: str, request: AgentRequest) -> None:
        if request.route == "completions":
            call.reply = Message(role="assistant", content=text)
            return
        parser = self.kit.parser if request.uses_tools else None
        call.reply, call.parse_failures = read_reply(text, is_thinking=call.prompt.ends_open, parser=parser)

    def _finish(self, call: Call, request: AgentRequest) -> None:
        if request.route == "completions":
            self._texts.finish(call, request.prompt, call.reply.content if call.reply else "")
        else:
            self._messages.finish(call)
        call.end("ok")


def _end(calls: list[Call], status: Status, error: str) -> None:
    for call in calls:
        call.end(status, error)

"""Agents without a socket: requests as they are on the wire, answered by a model that says what it is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

from loops_async._agents.dialects.base import Answer, Fields
from loops_async._agents.dialects.chat import Chat
from loops_async._agents.messages import Message
from loops_async._agents.parsers import parser_for
from loops_async._agents.prompts import Prompter
from loops_async._agents.recorder import Kit, Recorder
from loops_async._agents.records import AgentCall, shown
from loops_async._agents.requests import Sampling
from loops_async._agents.templates import ChatTemplate
from loops_async._agents.tokens import Tokens
from loops_async._agents.worker import Worker
from loops_async.types import SampledSequence, SampleResponse, SamplingParams
from tests.support.byte_tokenizer import ByteTokenizer

WEATHER: Final = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
TIME: Final = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}


def kit(
    tokenizer: ByteTokenizer,
    *,
    history: Literal["template", "keep"] = "template",
    variables: Mapping[str, Any] | None = None,
) -> Kit:
    """Return what a gateway gives its rollouts."""
    worker = Worker()
    tokens = Tokens(tokenizer, None, worker)
    template = ChatTemplate(tokenizer.chat_template, tokens.names)
    return Kit(
        tokens=tokens,
        prompter=Prompter(tokens, template, history, worker),
        parser=parser_for(template.text),
        sampling=Sampling(None, None),
        variables=variables or {},
        max_context=None,
        grace=0.0,
    )


class Agent:
    """One rollout whose replies are those in `says`: the text of each, or its tokens, and what closes it."""

    def __init__(self, tokenizer: ByteTokenizer, **options: Any) -> None:
        self.tokenizer = tokenizer
        self.kit = kit(tokenizer, **options)
        self.recorder = Recorder(self.kit, lambda: self._sample, None)
        self.says: list[tuple[str | list[int], str]] = []
        self._asked = 0

    @property
    def calls(self) -> list[AgentCall]:
        return list(shown(self.recorder.calls).values())

    async def ask(self, **body: Any) -> dict[str, Any]:
        """Send a chat request; return the body of the answer."""
        asked = Chat().read(Fields({"model": "m", **body}, ()))
        self._asked += 1
        exchange = self.recorder.exchange(asked, key=str(self._asked).encode(), is_retry=False)
        await exchange.wait()
        calls = exchange.result()
        return Chat().answer(Answer(request=asked, calls=calls, pieces=[[] for _ in calls]))

    async def reply(self, text: str | list[int], end: str, **body: Any) -> dict[str, Any]:
        """Send a chat request that is answered with `text`, closed by the token `end`; return the message."""
        self.says.append((text, end))
        answer = await self.ask(**body)
        message: dict[str, Any] = answer["choices"][0]["message"]
        return message

    def rendered(self, call: AgentCall, variables: Mapping[str, Any] | None = None) -> list[int]:
        """Return the prompt that a fresh rendering of the recorded messages has."""
        template = ChatTemplate(self.tokenizer.chat_template, self.kit.tokens.names)
        text = template.render([_message(each) for each in call.messages or []], call.tools, variables or {})
        return self.tokenizer.encode(text, add_special_tokens=False)

    async def _sample(self, prompt: list[int], count: int, params: SamplingParams) -> SampleResponse:
        text, end = self.says.pop(0)
        tokens = text if isinstance(text, list) else self.tokenizer.encode(text + end, add_special_tokens=False)
        logprobs = [-math.sqrt(len(prompt) + index) for index in range(len(tokens))]
        sequence = SampledSequence(tokens=tokens, logprobs=logprobs, stop_reason="stop" if end else "length")
        return SampleResponse(sequences=[sequence] * count, policy_version=len(self.recorder.calls))


def _message(given: dict[str, Any]) -> Message:
    [message] = Chat().read(Fields({"messages": [given]}, ())).messages
    return message

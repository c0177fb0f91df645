"""The record of a rollout: each call once, as what it adds to the call that it continues."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias
from uuid import uuid4

from msgspec import Struct

from .._values import Value
from .messages import Message

__all__ = ["AgentCall", "Branch", "Call", "Prompt", "Route", "Status", "shown"]

Route: TypeAlias = Literal["chat", "completions", "responses", "messages"]
Status: TypeAlias = Literal["running", "ok", "cancelled", "failed"]
Branch: TypeAlias = Literal["new", "edited", "template", "tools"]


class AgentCall(Value, Struct, frozen=True, kw_only=True):
    """One call of an agent, as it was recorded.

    - `id`: also that of the answer, and its header ``x-request-id``.
    - `route`: the API that was called; `model`: the name that the agent gave, which is free to mean anything.
    - `status`: only calls that are ``"ok"`` become training data.
    - `parent_id`, `branch`: the call that this one continues, token for token, if `branch` is None. Otherwise its
      prompt was rendered anew, and `branch` says why: the conversation is ``"new"``; or that of the parent was
      ``"edited"``; or the ``"template"`` does not keep what came before; or the ``"tools"`` or template variables
      differ.
    - `messages`, `tools`, `reply`: as in a chat request, whatever the route; None for completions.
    - `prompt_tokens`, and of the reply `tokens` and `logprobs` (in nats; NaN where the sampler sent none), with the
      `policy_version` that sampled them, and `stop_reason` as in `SampledSequence`.
    - `parse_failures`: how many tool calls could not be read, so that they are in the text of the reply.
    - `error`: why it failed. `started`: Unix time in seconds; `seconds`: how long it took, or takes so far.
    """

    id: str
    route: Route
    model: str
    status: Status
    parent_id: str | None = None
    branch: Branch | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = []
    reply: dict[str, Any] | None = None
    prompt_tokens: list[int] = []
    tokens: list[int] = []
    logprobs: list[float] = []
    policy_version: int | None = None
    stop_reason: str | None = None
    parse_failures: int = 0
    error: str | None = None
    started: float = 0.0
    seconds: float = 0.0


class Prompt:
    """What a call was asked, kept as what it adds to an earlier call.

    `parent` is the call that it continues; then `added` are the messages behind the parent's reply, else all of them.
    `rest` are the tokens behind the first `shared` ones of `base`, which is the parent, or the call that the prompt has
    most in common with. `text_size` and `text_digest` are those of the text as the template writes it, by which the
    next call sees whether the template keeps it. `ends_open`: whether that text ends in an open ``<think>``.
    """

    def __init__(self, tools: list[dict[str, Any]], signature: bytes = b"") -> None:
        self.tools = tools
        self.signature = signature
        self.parent: Call | None = None
        self.parent_id: str | None = None
        self.branch: Branch | None = None
        self.added: list[Message] = []
        self.base: Call | None = None
        self.shared: int = 0
        self.rest: list[int] = []
        self.hash: bytes = b""
        self.text_size: int = 0
        self.text_digest: bytes = b""
        self.ends_open: bool = False

    def continue_call(self, parent: Call, added: Sequence[Message], rest: list[int]) -> None:
        """Begin with all tokens of `parent`."""
        self.parent = self.base = parent
        self.parent_id = parent.id
        self.branch = None
        self.added = list(added)
        self.shared = len(parent.all_tokens())
        self.rest = rest

    def begin_anew(self, branch: Branch, tokens: list[int], similar: Call | None) -> None:
        """Have tokens of its own, of which those in common with a `similar` call are kept once."""
        whole = [] if similar is None else similar.all_tokens()
        self.branch = branch
        self.parent_id = None if similar is None else similar.id
        self.shared = _common(whole, tokens)
        self.base = similar if self.shared else None
        self.rest = tokens[self.shared :]

    def chain(self) -> list[Call]:
        """Return the calls that this prompt continues, the first one first."""
        calls: list[Call] = []
        call = self.parent
        while call is not None:
            calls.append(call)
            call = call.prompt.parent
        return calls[::-1]

    def messages(self) -> list[Message]:
        """Return the messages, with the recorded replies."""
        messages: list[Message] = []
        for call in self.chain():
            messages += call.prompt.added
            if call.reply is not None:
                messages.append(call.reply)
        return [*messages, *self.added]

    def tokens(self) -> list[int]:
        """Return the tokens."""
        bases: list[Call] = []
        base = self.base
        while base is not None:
            bases.append(base)
            base = base.prompt.base
        tokens: list[int] = []
        for call in reversed(bases):
            del tokens[call.prompt.shared :]  # of what is here, those of its base
            tokens += call.prompt.rest
            tokens += call.tokens
        return [*tokens[: self.shared], *self.rest]


class Call:
    """A call while the rollout lives. `mark` stands for the reply in the texts by which its turn's end is found."""

    def __init__(self, route: Route, model: str) -> None:
        self.id: str = f"call-{uuid4().hex}"
        self.route: Route = route
        self.model = model
        self.status: Status = "running"
        self.prompt: Prompt = Prompt([])
        self.reply: Message | None = None
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.policy_version: int | None = None
        self.stop_reason: str | None = None
        self.stop_string: str | None = None
        self.parse_failures: int = 0
        self.error: str | None = None
        self.mark: str = f"reply{uuid4().hex}"
        self.started: float = time.time()
        self._began: float = time.monotonic()
        self._seconds: float | None = None

    def end(self, status: Status, error: str | None = None) -> None:
        """Note how the call has ended; the status last, since other threads may read it."""
        self._seconds = time.monotonic() - self._began
        self.error = error
        self.status = status

    def chain(self) -> list[Call]:
        """Return the calls that this one continues, the first one first, and itself."""
        return [*self.prompt.chain(), self]

    def conversation(self) -> list[Message]:
        """Return the messages of the request and the reply."""
        return [*self.prompt.messages(), *([] if self.reply is None else [self.reply])]

    def all_tokens(self) -> list[int]:
        """Return the tokens of the prompt and of the reply."""
        return [*self.prompt.tokens(), *self.tokens]

    def shown(self, before: Mapping[Call, AgentCall]) -> AgentCall:
        """Return the call as users see it. What it shares with a call in `before` is taken from there."""
        status, prompt = self.status, self.prompt  # the status first, since it is set last
        return AgentCall(
            id=self.id,
            route=self.route,
            model=self.model,
            status=status,
            parent_id=prompt.parent_id,
            branch=prompt.branch,
            messages=None if self.route == "completions" else _messages(prompt, before),
            tools=prompt.tools,
            reply=None if self.reply is None else self.reply.to_chat(),
            prompt_tokens=_tokens(prompt, before),
            tokens=list(self.tokens),
            logprobs=list(self.logprobs),
            policy_version=self.policy_version,
            stop_reason=self.stop_reason,
            parse_failures=self.parse_failures,
            error=self.error,
            started=self.started,
            seconds=time.monotonic() - self._began if self._seconds is None else self._seconds,
        )


def shown(calls: Iterable[Call]) -> dict[Call, AgentCall]:
    """Return calls, given by arrival, as users see them.

    Each is made of the one that it continues: a hundred turns have ten thousand messages between them.
    """
    made: dict[Call, AgentCall] = {}
    for call in calls:
        made[call] = call.shown(made)
    return made


def _messages(prompt: Prompt, before: Mapping[Call, AgentCall]) -> list[dict[str, Any]]:
    parent = _finished(prompt.parent, before)
    if parent is None:
        return [each.to_chat() for each in prompt.messages()]
    reply = [] if parent.reply is None else [parent.reply]
    return [*(parent.messages or ()), *reply, *(each.to_chat() for each in prompt.added)]


def _tokens(prompt: Prompt, before: Mapping[Call, AgentCall]) -> list[int]:
    base = _finished(prompt.base, before)
    if base is None:
        return prompt.tokens()
    tokens = base.prompt_tokens + base.tokens
    del tokens[prompt.shared :]
    tokens += prompt.rest
    return tokens


def _finished(call: Call | None, before: Mapping[Call, AgentCall]) -> AgentCall | None:
    """Return a call that is known, unless it was looked at before it had ended: it has changed since then."""
    known = None if call is None else before.get(call)
    return known if known is not None and known.status == "ok" else None


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common, by halving: comparing slices is fast."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

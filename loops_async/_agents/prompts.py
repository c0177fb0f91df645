"""The prompt of a call: what an earlier call had, token for token, and what follows it; or a fresh rendering.

What follows is found without a table of models: the conversation is rendered with a mark in the place of each recorded
reply. The first end token behind the last mark closes that turn, and the text behind it is what follows. With marks, no
text that a model wrote can be taken for an end token, and what the template keeps of a conversation can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from .continuity import Continuity
from .messages import Message, ToolCall, digest
from .records import Call, Prompt
from .templates import ChatTemplate
from .tokens import Tokens
from .worker import Worker

__all__ = ["History", "Prompter", "signature_of"]

History: TypeAlias = Literal["template", "keep"]


class _Rest(Struct, frozen=True):
    """What follows a reply in a text: the end token that closes it, and the text behind."""

    close: str
    text: str


class Prompter:
    """Writes prompts with one template and one tokenizer."""

    def __init__(self, tokens: Tokens, template: ChatTemplate, history: History, worker: Worker) -> None:
        self._tokens = tokens
        self._worker = worker
        self._template = template
        self._history = history

    async def prepare(
        self,
        call: Call,
        messages: Sequence[Message],
        tools: list[dict[str, Any]],
        variables: Mapping[str, Any],
        continuity: Continuity,
    ) -> None:
        """Set the prompt of a call.

        Raises:
            RefusedCall: there is no template, or it refuses the conversation.
        """
        prompt = call.prompt = Prompt(tools, signature_of(tools, variables))
        match = continuity.find(messages, prompt.signature)
        if match.call is not None:
            messages = [*match.call.conversation()[: match.length], *messages[match.length :]]
        text = None
        if match.call is not None and match.branch is None:
            text = await self._continue(prompt, match.call, messages[match.length :], variables)
        if text is None:
            text = await self._render(messages, prompt, variables)
            prompt.added = list(messages)
            prompt.begin_anew(match.branch or "template", await self._tokens.encode(text), match.call)
        prompt.text_size, prompt.text_digest = len(text), _digest(text)
        prompt.ends_open = text.rstrip().endswith("<think>")
        continuity.begin(call, messages, match.hashes)

    async def _continue(
        self, prompt: Prompt, parent: Call, added: Sequence[Message], variables: Mapping[str, Any]
    ) -> str | None:
        """Let a prompt continue `parent`, and return its text; None if the template does not allow it."""
        text = await self._render([*self._marked(parent), *added], prompt, variables)
        if self._history == "template" and not _keeps(text, parent):
            return None
        rest = self._rest(text, parent)
        if rest is None:
            return None
        close = self._tokens.end_tokens[rest.close]
        ids = await self._tokens.encode(rest.close + rest.text)
        if close not in ids:
            return None
        behind = ids[ids.index(close) + 1 :]  # some tokenizers put a space before it
        is_closed = parent.tokens[-1:] == [close]
        prompt.continue_call(parent, added, behind if is_closed else [close, *behind])
        return text

    def _marked(self, parent: Call) -> list[Message]:
        """Return the conversation up to the reply of `parent`, with marks for the recorded replies."""
        messages: list[Message] = []
        for call in parent.chain():
            messages += call.prompt.added
            messages.append(self._mark(call))
        return messages

    def _mark(self, call: Call) -> Message:
        """Return a reply of the same shape, whose texts are marks."""
        reply = call.reply or Message(role="assistant")
        reasoning = None if not reply.reasoning else f"{call.mark}r"
        calls = [ToolCall(each.id, each.name, "{}") for each in reply.tool_calls] if self._template.has_tools else []
        if calls:
            # The last name, since some templates drop the text beside calls.
            calls[-1] = replace(calls[-1], name=f"{call.mark}n")
        content = "" if calls and not reply.content else f"{call.mark}c"
        return Message(role="assistant", content=content, reasoning=reasoning, tool_calls=tuple(calls))

    def _rest(self, text: str, parent: Call) -> _Rest | None:
        at = max(text.rfind(f"{parent.mark}n"), text.rfind(f"{parent.mark}c"))
        if at < 0:
            return None
        ends = [(found, token) for token in self._tokens.end_tokens if (found := text.find(token, at)) >= 0]
        if not ends:
            return None
        found, close = min(ends)
        return _Rest(close, text[found + len(close) :])

    async def _render(self, messages: Sequence[Message], prompt: Prompt, variables: Mapping[str, Any]) -> str:
        size = sum(message.size for message in messages) + len(msgspec.json.encode(prompt.tools))
        return await self._worker.run(size, self._template.render, messages, prompt.tools, variables)


def signature_of(tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> bytes:
    """Return what two calls with the same tools and template variables have in common."""
    return digest([msgspec.json.encode([tools, variables], order="sorted")])


def _keeps(text: str, parent: Call) -> bool:
    """Whether a text begins with that of the parent's prompt, and has the reasoning of its reply."""
    prompt = parent.prompt
    if len(text) < prompt.text_size or _digest(text[: prompt.text_size]) != prompt.text_digest:
        return False
    return parent.reply is None or not parent.reply.reasoning or f"{parent.mark}r" in text


def _digest(text: str) -> bytes:
    return digest([text.encode("utf-8", "surrogatepass")])

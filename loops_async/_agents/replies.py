"""From sampled tokens to the message that an agent gets."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

from ..types import SampledSequence
from .messages import Message, ToolCall
from .parsers import ToolParser
from .tokens import Tokens

__all__ = ["read_reply", "read_text"]

_OPEN, _CLOSE = "<think>", "</think>"


async def read_text(sequence: SampledSequence, tokens: Tokens, stops: Sequence[str]) -> tuple[str, str | None]:
    """Return the text of a completion, without its end token or what ended it; and the stop string that did."""
    sampled = sequence.tokens
    if sampled and sampled[-1] in tokens.end_tokens.values():
        sampled = sampled[:-1]
    text = await tokens.decode(sampled)
    if sequence.stop_reason != "stop":
        return text, None
    at, stop = min(((at, stop) for stop in stops if (at := text.find(stop)) >= 0), default=(len(text), None))
    return text[:at], stop


def read_reply(text: str, *, is_thinking: bool, parser: ToolParser | None) -> tuple[Message, int]:
    """Return the message that a text is, and how many tool calls in it could not be read.

    Args:
        text: what `read_text` returns.
        is_thinking: whether the prompt ends in an open ``<think>``.
        parser: None where there are no tools to call.
    """
    reasoning, content = _split(text, is_thinking=is_thinking)
    if parser is None:
        return Message(role="assistant", content=content, reasoning=reasoning), 0
    parsed = parser.parse(content)
    calls = tuple(ToolCall(f"call_{uuid4().hex[:9]}", name, arguments) for name, arguments in parsed.tool_calls)
    reply = Message(role="assistant", content=parsed.content, reasoning=reasoning, tool_calls=calls)
    return reply, parsed.failures


def _split(text: str, *, is_thinking: bool) -> tuple[str | None, str]:
    """Return the reasoning, if there is any, and the rest."""
    begin = text.lstrip()
    thought, closed, content = begin.removeprefix(_OPEN).partition(_CLOSE)
    if not closed or not (is_thinking or begin.startswith(_OPEN)):
        return None, text
    return thought.strip() or None, content.lstrip("\n")

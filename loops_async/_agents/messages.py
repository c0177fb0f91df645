"""Messages of a conversation, in the one form that every dialect is translated to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, Final

import msgspec
from msgspec import Struct

from .._kinds import is_dict, is_list

__all__ = ["Message", "ToolCall", "digest", "running_hashes"]

MESSAGE_SIZE: Final = 64


class ToolCall(Struct, frozen=True):
    """One call of a tool: `arguments` is JSON text, exactly as it was written."""

    id: str
    name: str
    arguments: str

    @property
    def parsed(self) -> Any:
        """The arguments as an object; the text itself where it is not JSON."""
        try:
            return msgspec.json.decode(self.arguments)
        except (msgspec.DecodeError, RecursionError):
            return self.arguments

    @property
    def meaning(self) -> Any:
        """The arguments as they are compared: 1.0 is the number 1, as which JavaScript writes it."""
        try:
            return _without_fractions(self.parsed)
        except RecursionError:
            return self.arguments


class Message(Struct, frozen=True, kw_only=True):
    """One message. `reasoning` is what a model thought before it answered; None where it is not known."""

    role: str
    content: str = ""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None

    @property
    def size(self) -> int:
        """The characters of all its texts, and as many as take as long as what a template does for each message."""
        calls = sum(len(call.name) + len(call.arguments) for call in self.tool_calls)
        return MESSAGE_SIZE + len(self.content) + len(self.reasoning or "") + calls

    def canonical(self) -> bytes:
        """Return what two messages have in common that mean the same: not the ids of calls, and not the reasoning."""
        calls = [[call.name, call.meaning] for call in self.tool_calls]
        return msgspec.json.encode([self.role, self.content, self.name, calls], order="sorted")

    def to_chat(self) -> dict[str, Any]:
        """Return the message as in a chat request, without what is empty."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def _without_fractions(value: Any) -> Any:
    """Return a JSON value with 1 in place of 1.0."""
    if is_dict(value):
        return {name: _without_fractions(each) for name, each in value.items()}
    if is_list(value):
        return [_without_fractions(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def running_hashes(messages: Sequence[Message], begin: bytes = b"") -> list[bytes]:
    """Return the hash of each beginning of a conversation: that of one message, of two, and so on."""
    hashes: list[bytes] = []
    for message in messages:
        begin = digest((begin, message.canonical()))
        hashes.append(begin)
    return hashes


def digest(parts: Iterable[bytes]) -> bytes:
    """Return a hash of these parts, of which all but the last have a known length."""
    return blake2b(b"".join(parts), digest_size=16).digest()

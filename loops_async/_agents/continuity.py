"""Which earlier call a conversation continues: the one with the longest beginning in common, then the latest."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from .messages import Message, running_hashes
from .records import Branch, Call

__all__ = ["Continuity", "Match"]


class Match(Struct, frozen=True):
    """What a conversation has to do with an earlier `call`.

    Its first `length` messages are those of `call`; without a `branch`, these are all of them and the reply.
    """

    call: Call | None
    length: int
    branch: Branch | None
    hashes: list[bytes]
    """Those of each beginning of the conversation."""


class Continuity:
    """The finished calls of one rollout by their messages; the calls of two rollouts are never looked up together.

    Hashes leave out the reasoning, which frameworks drop when they send a conversation back; where it is sent, it must
    be the same.
    """

    def __init__(self) -> None:
        self._finished: dict[bytes, list[Call]] = {}
        self._begun: dict[bytes, Call] = {}

    def find(self, messages: Sequence[Message], signature: bytes) -> Match:
        """Return what a conversation continues, given the `signature` of its tools and template variables."""
        hashes = running_hashes(messages)
        other_tools: tuple[Call, int] | None = None
        for length in range(len(messages), 0, -1):
            for call in reversed(self._finished.get(hashes[length - 1], ())):
                if not _has_same_reasoning(call, messages[:length]):
                    continue
                if call.prompt.signature == signature:
                    return Match(call, length, None, hashes)
                other_tools = other_tools or (call, length)
        if other_tools is not None:
            return Match(*other_tools, "tools", hashes)
        return self._edited(messages, hashes)

    def begin(self, call: Call, messages: Sequence[Message], hashes: Sequence[bytes]) -> None:
        """Note the messages of a call, so that a later one is known to be an edit of them."""
        call.prompt.hash = hashes[-1] if hashes else b""
        for message, hashed in zip(messages, hashes, strict=True):
            if message.role != "system":  # which conversations have in common that have nothing else
                self._begun[hashed] = call

    def finish(self, call: Call) -> None:
        """Let later conversations continue a call that has its reply."""
        if call.reply is not None:
            [hashed] = running_hashes([call.reply], call.prompt.hash)
            self._finished.setdefault(hashed, []).append(call)

    def _edited(self, messages: Sequence[Message], hashes: list[bytes]) -> Match:
        """Return the latest call that begins alike and goes on otherwise."""
        for length in range(len(messages), 0, -1):
            call = self._begun.get(hashes[length - 1])
            if call is not None and _has_same_reasoning(call, messages[:length]):
                is_edit = length < len(messages)  # else it is the same request once more
                return Match(call, length, "edited", hashes) if is_edit else Match(None, 0, "new", hashes)
        return Match(None, 0, "new", hashes)


def _has_same_reasoning(call: Call, messages: Sequence[Message]) -> bool:
    """Whether a conversation sends no other reasoning than that of the call and its reply."""
    if not any(message.reasoning for message in messages):
        return True
    recorded = call.conversation()[: len(messages)]
    return all(
        not sent.reasoning or sent.reasoning == kept.reasoning for sent, kept in zip(messages, recorded, strict=True)
    )

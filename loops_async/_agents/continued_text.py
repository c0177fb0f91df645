"""Which earlier completion a prompt continues, by its tokens or by its text."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from .messages import digest
from .records import Call

__all__ = ["TextContinuity"]


class TextContinuity:
    """The finished completions of one rollout, by their prompt with the reply."""

    def __init__(self) -> None:
        self._by_tokens: dict[int, dict[bytes, Call]] = {}
        self._by_text: dict[int, dict[bytes, Call]] = {}

    def find(self, prompt: str | Sequence[int]) -> tuple[Call, int] | None:
        """Return the call with the longest prompt and reply that `prompt` begins with, and their length."""
        known = self._by_text if isinstance(prompt, str) else self._by_tokens
        return next(_matches(known, prompt), None)

    def finish(self, call: Call, prompt: str | Sequence[int], text: str) -> None:
        """Let later prompts continue a call, whose reply has the text `text`."""
        _add(self._by_tokens, call.all_tokens(), call)
        if isinstance(prompt, str):
            _add(self._by_text, prompt + text, call)


def _matches(known: dict[int, dict[bytes, Call]], prompt: str | Sequence[int]) -> Iterator[tuple[Call, int]]:
    for size in sorted(known, reverse=True):
        if size <= len(prompt) and (call := known[size].get(_digest(prompt[:size]))):
            yield call, size


def _add(known: dict[int, dict[bytes, Call]], whole: str | Sequence[int], call: Call) -> None:
    known.setdefault(len(whole), {})[_digest(whole)] = call


def _digest(whole: str | Sequence[int]) -> bytes:
    return digest([whole.encode("utf-8", "surrogatepass") if isinstance(whole, str) else array("q", whole).tobytes()])

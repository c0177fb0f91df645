"""A tokenizer, used by one call at a time, and in a worker thread where a text is long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

from anyio import to_thread

from ..errors import ConfigError

__all__ = ["LONG_TEXT", "Tokens", "in_thread_if"]

LONG_TEXT: Final = 8192
"""From this number of characters on, work with a text takes longer than an event loop may be held."""

END_TOKENS: Final = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "</s>",
    "<|user|>",
    "<|observation|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek's
)
"""What closes an assistant's turn in one family of models or another."""

T = TypeVar("T")


async def in_thread_if(is_long: bool, function: Callable[..., T], *args: Any) -> T:
    """Return ``function(*args)``, called in a worker thread if it takes long."""
    return await to_thread.run_sync(function, *args) if is_long else function(*args)


class Tokens:
    """A Hugging Face tokenizer, or what has its ``encode``, ``decode``, ``eos_token`` and ``eos_token_id``.

    `end_tokens` maps the text of each token that closes an assistant's turn to its id.
    """

    def __init__(self, tokenizer: Any, end_tokens: Sequence[str] | None) -> None:
        self._tokenizer = tokenizer
        self._turn = asyncio.Lock()  # tokenizers fail with "Already borrowed" where two threads use one
        self._special: dict[str, int] = _special_tokens(tokenizer)
        self.end_tokens: Mapping[str, int] = self._ends(end_tokens)

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's own template; the one named ``default`` where it has several."""
        given: Any = getattr(self._tokenizer, "chat_template", None)
        template: str | None = cast("Any", given)["default"] if isinstance(given, dict) else given
        return template

    @property
    def names(self) -> dict[str, str]:
        """The special tokens by the name of their variable in templates, e.g. ``bos_token``."""
        given: Mapping[str, Any] = getattr(self._tokenizer, "special_tokens_map", None) or {}
        return {name: str(token) for name, token in given.items() if isinstance(token, str)}

    async def encode(self, text: str, *, is_begin: bool = False) -> list[int]:
        """Return the ids of a text that has its special tokens written out; `is_begin` adds what a text begins with."""
        async with self._turn:
            return await in_thread_if(len(text) >= LONG_TEXT, self._encoded, text, is_begin)

    async def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        async with self._turn:
            return await in_thread_if(len(tokens) >= LONG_TEXT // 4, self._decoded, tokens)

    async def decode_each(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each token by itself."""
        async with self._turn:
            return await in_thread_if(len(tokens) >= LONG_TEXT // 32, lambda: [self._decoded([t]) for t in tokens])

    def _encoded(self, text: str, is_begin: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=is_begin))

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _ends(self, names: Sequence[str] | None) -> dict[str, int]:
        eos = getattr(self._tokenizer, "eos_token", None)
        if names is None:
            names = [name for name in (*END_TOKENS, eos) if name and name in self._special]
        unknown = [name for name in names if name not in self._special]
        if unknown:
            raise ConfigError(f"end_tokens: not a special token of this tokenizer: {', '.join(map(repr, unknown))}")
        if not names:
            raise ConfigError("end_tokens: the tokenizer has no end token that is known; name those of the model")
        return {name: self._special[name] for name in names}


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of special tokens by their text."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = {str(token.content): index for index, token in added.items() if token.special}
    eos = getattr(tokenizer, "eos_token", None)
    if eos and eos not in special:
        special[eos] = tokenizer.eos_token_id
    return special

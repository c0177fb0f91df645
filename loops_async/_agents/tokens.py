"""A tokenizer, used by one call at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from ..errors import ConfigError
from .worker import Worker

__all__ = ["Tokens"]

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

CHARACTERS_PER_TOKEN: Final = 4
DECODING_ONE: Final = 32
"""To decode one token by itself takes as long as to encode so many characters."""
PROBE: Final = "a Zürich\n\n  1"


class Tokens:
    """A Hugging Face tokenizer, or what has its ``encode``, ``decode``, ``eos_token`` and ``eos_token_id``.

    `end_tokens` maps the text of each token that closes an assistant's turn to its id.
    """

    def __init__(self, tokenizer: Any, end_tokens: Sequence[str] | None, worker: Worker) -> None:
        self._tokenizer = tokenizer
        self._worker = worker
        self._turn = asyncio.Lock()  # tokenizers fail with "Already borrowed" where two threads use one
        self._special: dict[str, int] = _special_tokens(tokenizer)
        self.end_tokens: Mapping[str, int] = self._ends(end_tokens)
        self._fast: Any = _fast_tokenizer(tokenizer, "".join(self.end_tokens))

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
            return await self._worker.run(len(text), self._encoded, text, is_begin)

    async def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        async with self._turn:
            return await self._worker.run(CHARACTERS_PER_TOKEN * len(tokens), self._decoded, tokens)

    async def decode_each(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each token by itself."""
        async with self._turn:
            return await self._worker.run(DECODING_ONE * len(tokens), self._each_decoded, tokens)

    def _encoded(self, text: str, is_begin: bool) -> list[int]:
        if self._fast is not None and _is_plain(self._fast):
            return _fast_encoded(self._fast, text, is_begin)
        return list(self._tokenizer.encode(text, add_special_tokens=is_begin))

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _each_decoded(self, tokens: Sequence[int]) -> list[str]:
        return [self._decoded([token]) for token in tokens]

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


def _fast_tokenizer(tokenizer: Any, special: str) -> Any:
    """Return the tokenizer of the `tokenizers` library that this one is built on, if it encodes alike; else None.

    It is three times as fast, and lets the event loop run meanwhile.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or not hasattr(fast, "encode_batch_fast"):
        return None
    text = f"{PROBE}{special}{PROBE}"
    as_wanted = [list(tokenizer.encode(text, add_special_tokens=is_begin)) for is_begin in (False, True)]
    return fast if as_wanted == [_fast_encoded(fast, text, is_begin) for is_begin in (False, True)] else None


def _is_plain(fast: Any) -> bool:
    """Whether others, who may use it too, have not left it set to cut or fill texts, or to split special tokens."""
    return fast.truncation is None and fast.padding is None and not fast.encode_special_tokens


def _fast_encoded(fast: Any, text: str, is_begin: bool) -> list[int]:
    # Only for a batch does the library let go of the interpreter.
    [encoding] = fast.encode_batch_fast([text], add_special_tokens=is_begin)
    return list(encoding.ids)

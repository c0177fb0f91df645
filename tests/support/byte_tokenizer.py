"""A tokenizer of bytes with the special tokens of many models, which needs no other library."""

# ruff: noqa: RUF001 - DeepSeek's characters

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Final

SPECIAL: Final = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[INST]",
    "[/INST]",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|system|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
IDS: Final = {token: 256 + index for index, token in enumerate(SPECIAL)}
SPACE: Final = 255
"""What `adds_space` puts before a text; no text has this byte."""


class ByteTokenizer:
    """Byte b is token b. With `adds_space`, every text begins with one more token, as with some real tokenizers."""

    def __init__(self, chat_template: str | None = None, *, eos: str = "<|im_end|>", adds_space: bool = False) -> None:
        self.chat_template = chat_template
        self.eos_token = eos
        self.special_tokens_map = {"bos_token": "<s>", "eos_token": eos}
        self.added_tokens_decoder = {i: SimpleNamespace(content=token, special=True) for token, i in IDS.items()}
        self._pieces = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
        self._space = [SPACE] * adds_space

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begin = [IDS["<s>"]] if add_special_tokens else []
        return [*begin, *self._space, *(token for piece in self._pieces.split(text) for token in self._ids(piece))]

    def decode(self, tokens: Sequence[int], **_: bool) -> str:
        return "".join(self._texts(tokens))

    def _ids(self, piece: str) -> Iterable[int]:
        return [IDS[piece]] if piece in IDS else piece.encode("utf-8", "surrogatepass")

    def _texts(self, tokens: Sequence[int]) -> Iterator[str]:
        plain = bytearray()
        for token in tokens:
            if token < 255:
                plain.append(token)
                continue
            yield plain.decode("utf-8", "replace")
            plain.clear()
            yield "" if token == SPACE else SPECIAL[token - 256]
        yield plain.decode("utf-8", "replace")

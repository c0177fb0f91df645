"""What takes the place of a tokenizer in pages that run on the echo engine: importing the real ones takes seconds."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any


class ByteTokenizer:
    """Token b is byte b, and 256 to 258 are special, as in the embedded service."""

    eos_token = "<|im_end|>"
    eos_token_id = 258
    pad_token_id = 256

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Iterable[int], **_: Any) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def apply_chat_template(
        self,
        messages: Iterable[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        """Return what transformers returns: a dictionary, unless `return_dict` is false."""
        turns = [(message["role"], f"{message['content']}<|im_end|>\n") for message in messages]
        turns += [("assistant", "")] if add_generation_prompt else []
        text = "".join(f"<|im_start|>{role}\n{content}" for role, content in turns)
        if not tokenize:
            return text
        start, end = b"<|im_start|>", b"<|im_end|>"
        tokens = [*text.encode().replace(start, b"\xfe").replace(end, b"\xff")]
        ids = [{0xFE: 257, 0xFF: 258}.get(token, token) for token in tokens]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)} if return_dict else ids


class DrawingTokenizer(ByteTokenizer):
    """Draws what it decodes, so that the members of a group have different rewards."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def decode(self, tokens: Iterable[int], **_: Any) -> str:
        del tokens
        return self._random.choice(["yes", "no", "search", "Vex", "Quillmar"])

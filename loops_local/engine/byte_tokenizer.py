"""A byte tokenizer: id b is byte b. It is lossless on any UTF-8 and needs no download.

It is written as plain JSON in the format of the `tokenizers` library, without using that library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

__all__ = ["END_TOKEN", "PAD_TOKEN", "SPECIAL_TOKENS", "START_TOKEN", "VOCAB_SIZE", "write"]

SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
PAD_TOKEN, START_TOKEN, END_TOKEN = range(256, 259)
VOCAB_SIZE = 259

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(directory: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `directory`."""
    _write_json(directory / "tokenizer.json", _tokenizer())
    pad, _, end = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", config)


def _tokenizer() -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    added = [
        {
            "id": 256 + i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL_TOKENS)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": _vocabulary(), "merges": []},
    }


def _vocabulary() -> dict[str, int]:
    """Map each byte to one printable character, as GPT-2 does: to itself if printable, else to one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    vocabulary = {symbols[byte]: byte for byte in range(256)}
    return vocabulary | {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))

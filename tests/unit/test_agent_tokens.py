"""How the gateway of agents uses a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from loops_async._agents.tokens import Tokens
from loops_async._agents.worker import Worker

tokenizers = pytest.importorskip("tokenizers", reason="NOT TESTED: fast tokenizers")

TEXT = "<|im_start|>user\nZürich\n\n  1 2<|im_end|>\n"


class Backend:
    """A tokenizer of the `tokenizers` library that notes which of its methods are called."""

    def __init__(self) -> None:
        made: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            special_tokens=["<|im_start|>", "<|im_end|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(["Zürich user"], trainer)
        self._made = made
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.called.append(name)
        return getattr(self._made, name)


class Fast:
    """A tokenizer as `transformers` wraps one; some of its subclasses add to what the backend does."""

    eos_token = "<|im_end|>"
    eos_token_id = 1

    def __init__(self, *, adds: Sequence[int] = ()) -> None:
        self.backend_tokenizer = Backend()
        self._adds = list(adds)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.backend_tokenizer.no_truncation()
        return [*self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, *self._adds]

    def decode(self, tokens: list[int], **_: bool) -> str:
        text: str = self.backend_tokenizer.decode(tokens, skip_special_tokens=False)
        return text


async def encoded(fast: Fast) -> tuple[list[int], list[str]]:
    """Return what a text is encoded to, and which methods of the backend did it."""
    tokens = Tokens(fast, None, Worker())
    fast.backend_tokenizer.called.clear()
    ids = await tokens.encode(TEXT)
    return ids, [name for name in fast.backend_tokenizer.called if name.startswith("encode")]


async def test_a_fast_tokenizer_lets_go_of_the_interpreter() -> None:
    """It does so in the methods for batches only."""
    fast = Fast()
    ids, called = await encoded(fast)
    assert ids == fast.encode(TEXT)
    assert called == ["encode_special_tokens", "encode_batch_fast"]
    assert await Tokens(fast, None, Worker()).decode(ids) == TEXT


async def test_what_a_tokenizer_adds_to_its_backend_is_kept() -> None:
    ids, called = await encoded(Fast(adds=[7]))
    assert ids[-1] == 7
    assert called == ["encode"]


async def test_a_backend_that_others_have_set_to_cut_is_not_used_as_it_is() -> None:
    fast = Fast()
    whole = fast.encode(TEXT)
    tokens = Tokens(fast, None, Worker())
    fast.backend_tokenizer.enable_truncation(max_length=3)
    assert await tokens.encode(TEXT) == whole

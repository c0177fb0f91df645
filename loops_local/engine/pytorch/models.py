"""Loads base models: the frozen weights, the tokenizer, and the facts that the engine needs."""

from __future__ import annotations

import inspect
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

from .. import byte_tokenizer
from ..base import ModelInfo, RefusedError
from . import attention, pretrained, recompute
from .kv_cache import KvCache, Prefill, Prefix, contents
from .lora import Active, Pair, Shapes, fresh, inject, pairs, using
from .products import Linear

__all__ = ["Base", "load_base"]

TINY = "tiny"

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""How far the logits of a model may be from those of the engine, in relation to their size: both are rounded."""

_SEEDING = threading.Lock()
"""Held while weights are drawn from torch's random numbers, which all threads of the process share."""


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen causal language model, shared by every trainer and sampler of an engine.

    `end_tokens` end a completion; `cache_name` is the network's argument for the KV cache, and `cache_bytes` the memory
    that the cache takes for one position. The weights are on `device` in `dtype`; adapters, their gradients and
    optimizers, logprobs and losses are on the CPU in float32, so that only this class and the cache know devices.
    """

    info: ModelInfo
    network: Any
    tokenizer: Any
    shapes: Shapes
    end_tokens: frozenset[int]
    cache_name: str
    cache_bytes: int
    device: torch.device
    dtype: torch.dtype

    def active(self, weights: Mapping[str, Pair], gate: float | Tensor) -> Active:
        """Return the term of an adapter where the weights are; gradients flow back."""
        if isinstance(gate, Tensor):
            gate = gate.to(self.device, self.dtype)
        return Active({name: (self._own(a), self._own(b)) for name, (a, b) in weights.items()}, gate)

    def _own(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)

    def hidden(self, tokens: Tensor, cache: Cache | None = None, **placement: Tensor) -> Tensor:
        """Run the layers below the output head: (rows, length) token ids to (rows, length, width).

        With a `cache`, the tokens follow those in the cache, and are added to it; `placement` says at which positions.
        """
        cached = {self.cache_name: cache, "use_cache": cache is not None}
        placed = {name: part.to(self.device) for name, part in placement.items()}
        tokens = tokens.to(self.device)
        output: Tensor = self.network.base_model(input_ids=tokens, **cached, **placed).last_hidden_state
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head: (..., width) to (..., vocabulary), in float32."""
        logits: Tensor = self.network.get_output_embeddings()(hidden).float()
        cap = getattr(self.network.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def load_base(model: str, *, cache_dir: Path, dtype: str = "float32", device: str = "auto") -> Base:
    """Load the base model called `model`; raises `RefusedError` if it cannot be loaded."""
    precision: torch.dtype = getattr(torch, dtype)
    place = _device(device)
    if model == TINY:
        network, tokenizer = _tiny()
        return _base(TINY, network.to(precision), tokenizer, place)
    if model in (pretrained.NAME, pretrained.ALIAS):
        directory = pretrained.fetch(cache_dir)
        return _base(pretrained.NAME, *_from_transformers(str(directory), precision), place)
    return _base(model, *_from_transformers(model, precision), place)


def _device(name: str) -> torch.device:
    """Return the device called `name`; ``auto`` is a GPU of CUDA or Apple's, if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RefusedError(f"device: {name!r} cannot be used: {error}") from error


def _tiny() -> tuple[Any, Any]:
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=byte_tokenizer.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        # With the usual 0.02, the random features are so weak that LoRA on a frozen base learns almost nothing.
        initializer_range=0.2,
        pad_token_id=byte_tokenizer.PAD_TOKEN,
        bos_token_id=None,
        eos_token_id=byte_tokenizer.END_TOKEN,
    )
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as directory:
        byte_tokenizer.write(Path(directory))
        return network, AutoTokenizer.from_pretrained(directory)


def _from_transformers(model: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load from a directory or the hub; the code in a model's files is never run."""
    try:
        with _quiet():
            network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
            return network, AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        where = "the directory" if Path(model).is_dir() else "the hub (there is no such directory)"
        raise RefusedError(
            f"cannot load the model {model!r} from {where}: {error} -- it can be a directory of transformers, "
            f"a hub id, {pretrained.NAME!r} or {TINY!r}"
        ) from error


def _base(name: str, network: Any, tokenizer: Any, device: torch.device) -> Base:
    network.eval().requires_grad_(False)
    try:
        network.to(device)
    except RuntimeError as error:
        raise RefusedError(f"cannot load the model {name!r} onto the device {device}: {error}") from error
    network.set_attn_implementation(attention.NAME)
    info = ModelInfo(
        name=name,
        arch=type(network).__name__,
        max_seq_len=_max_length(network.config.get_text_config()),
        vocab_size=network.get_input_embeddings().num_embeddings,
    )
    head = network.get_output_embeddings()
    shapes = inject(network, skip=head)
    if type(head) is nn.Linear:
        Linear.convert(head, may_pack=False, is_head=True)
    recompute.allow(network)
    base = Base(
        info=info,
        network=network,
        tokenizer=tokenizer,
        shapes=shapes,
        end_tokens=_end_tokens(network, tokenizer),
        cache_name=_cache_name(network),
        cache_bytes=0,
        device=device,
        dtype=network.dtype,
    )
    return replace(base, cache_bytes=_probe(base))


def _max_length(config: Any) -> int:
    """Return the longest sequence that is computed exactly: the sampler's cache has no sliding windows."""
    longest: int = config.max_position_embeddings
    window: int = getattr(config, "sliding_window", None) or longest
    kinds = getattr(config, "layer_types", None)
    return min(longest, window) if kinds is None or "sliding_attention" in kinds else longest


def _end_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    ends = network.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)


def _cache_name(network: Any) -> str:
    """Return the name of the cache argument: transformers renamed it in 5.24, and removes the old name in 5.40."""
    return "cache" if "cache" in inspect.signature(network.base_model.forward).parameters else "past_key_values"


@torch.no_grad()
def _probe(base: Base) -> int:
    """Run the model as the sampler does, with an adapter for each row and a cache; return the bytes of one position.

    An architecture is refused if these logits are not equal to the model's own.
    """
    if not base.shapes:
        raise _unfit(base, "has no linear layers that LoRA could train")
    tokens = torch.arange(8).view(2, 4) % base.info.vocab_size
    prefill, kv_cache = Prefill(3), KvCache[int]()
    try:
        changing_nothing = pairs(fresh(base.shapes, 1, 0), base.shapes, 1)
        with using(base.active(changing_nothing, torch.ones(2, 1, 1))):
            parts = [base.hidden(part, **prefill.next(part.shape[1])) for part in (tokens[:, :1], tokens[:, 1:3])]
            prompt = torch.cat(parts, 1)
            for row in range(2):
                kv_cache.add(row, Prefix.of(prefill.cache, row, 3, prompt[row, 2]), shared=row == 1)
            rows, placement = kv_cache.next()
            following = base.hidden(tokens[rows, 3:], **placement)[rows]
        ours = base.logits(torch.cat([prompt, following], 1))
        own = base.network(tokens.to(base.device)).logits.float()
    except Warning as warning:
        # This says nothing about the model: the process turns warnings into errors.
        raise _unfit(base, f"could not be checked: {type(warning).__name__} was raised: {warning}") from warning
    except Exception as error:
        raise _unfit(base, f"does not run on it: {error}") from error
    if (ours - own).norm() > _TOLERANCE[base.dtype] * own.norm():
        raise _unfit(base, "computes its logits in a way that the engine does not know")
    return sum(part[0, :, 0].nbytes for layer in contents(prefill.cache) for part in layer)


def _unfit(base: Base, why: str) -> RefusedError:
    runs = "the torch engine runs decoder-only transformers with plain attention"
    return RefusedError(f"{runs}; {base.info.name!r} ({base.info.arch}) {why}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of transformers inside the block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()

"""What the tests of the engine share: examples, weights at will, and gradients read through the public door."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from loops_async.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput, SamplingParams
from loops_local.engine import byte_tokenizer
from loops_local.engine.base import Adapter, SampleJob, Trainer

Weights = dict[str, NDArray[np.float32]]

SGD = AdamParams(learning_rate=1e9, beta1=0.0, beta2=0.0, eps=1e9, grad_clip_norm=0.0)
"""With an eps that dwarfs the gradient, a step of Adam takes the gradient itself off the weights."""


def text(prompt: str, answer: str) -> Datum:
    """A datum that learns to continue `prompt` with `answer` and an end token."""
    full = [*prompt.encode(), *answer.encode(), byte_tokenizer.END_TOKEN]
    skipped = len(prompt.encode()) - 1
    return Datum(model_input=full[:-1], loss_fn_inputs={"target_tokens": [-100] * skipped + full[skipped + 1 :]})


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def job(prompt: str | Sequence[int], adapter: Adapter | None = None, n: int = 1, **params: Any) -> SampleJob:
    prompt = list(prompt.encode()) if isinstance(prompt, str) else prompt
    prompt_logprobs = params.pop("prompt_logprobs", None)
    return SampleJob(
        prompt=ModelInput.from_ints(prompt),
        num_samples=n,
        adapter=adapter,
        params=SamplingParams(**params),
        prompt_logprobs=prompt_logprobs,
    )


def logprobs(output: ForwardBackwardOutput) -> list[NDArray[np.float64]]:
    return [one["logprobs"].to_numpy().astype(np.float64) for one in output.loss_fn_outputs]


def weights(trainer: Trainer, scratch: Path) -> Weights:
    trainer.adapter().save(scratch)
    return load_file(scratch / "adapter_model.safetensors")


def set_weights(trainer: Trainer, new: Mapping[str, NDArray[Any]], scratch: Path) -> None:
    trainer.adapter().save(scratch)
    save_file(
        {name: np.ascontiguousarray(part, np.float32) for name, part in new.items()},
        scratch / "adapter_model.safetensors",
    )
    trainer.load(scratch, optimizer=False)


def randomize(trainer: Trainer, scratch: Path, seed: int = 0, size: float = 0.1) -> Weights:
    """Give both A and B random values, so that every part of the adapter has an effect and a gradient."""
    random = np.random.default_rng(seed)
    new = {
        name: random.normal(0, size, part.shape).astype(np.float32) for name, part in weights(trainer, scratch).items()
    }
    set_weights(trainer, new, scratch)
    return new


def gradient(trainer: Trainer, scratch: Path) -> Weights:
    """Read the gradients that `trainer` holds, per token unless skipped, off a step that subtracts them."""
    before = weights(trainer, scratch)
    trainer.optim_step(SGD)
    after = weights(trainer, scratch)
    return {name: before[name] - after[name] for name in before}


def dot(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> float:
    return math.fsum(float(np.vdot(one[name].astype(np.float64), other[name])) for name in one)


def save_model(kind: str, directory: Path, **changes: Any) -> Path:
    """Save a random model of an architecture of transformers, with the byte tokenizer."""
    network_class = getattr(transformers, kind)
    settings: dict[str, Any] = {
        "vocab_size": byte_tokenizer.VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": byte_tokenizer.PAD_TOKEN,
        "bos_token_id": None,
        "eos_token_id": byte_tokenizer.END_TOKEN,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(1)
    network_class(network_class.config_class(**settings | changes)).save_pretrained(directory)
    byte_tokenizer.write(directory)
    return directory

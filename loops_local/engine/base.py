"""The interface of an engine: base weights that never change, and any number of adapters as plain values.

The service knows engines only through these protocols. An engine has no network, no ids and no queues; the service
calls a `Trainer` from its one training thread, and a `Sampler` batches requests in its own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from loops_async.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput, SamplingParams

__all__ = [
    "Adapter",
    "Completion",
    "Engine",
    "ModelInfo",
    "RefusedError",
    "SampleJob",
    "Sampler",
    "SamplerUsage",
    "Trainer",
    "fits",
]


class RefusedError(ValueError):
    """The engine cannot do this; the text says what and why (HTTP 422 or a failed operation)."""


class ModelInfo(Struct, frozen=True, kw_only=True):
    """The facts about a base model."""

    name: str
    arch: str
    max_seq_len: int
    vocab_size: int


class Adapter(Protocol):
    """The LoRA weights of one version: immutable, so they can be served while the next version is trained.

    Weak references to it must be possible: the service finds adapters that are in use without keeping them alive.
    """

    @property
    def rank(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """The memory of the weights."""

    def save(self, directory: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` in PEFT's format."""


class Trainer(Protocol):
    """One run's adapter in training, its gradients and its optimizer. Not safe for use from two threads at once."""

    @property
    def step(self) -> int:
        """The number of optimizer steps since the adapter was new, continued by `load` with `optimizer`."""

    @property
    def rank(self) -> int: ...

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        config: Mapping[str, Any],
        *,
        backward: bool,
        top_k: int = 0,
    ) -> ForwardBackwardOutput:
        """Compute the loss and logprobs; with `backward`, add to the gradients.

        The batch has passed `checks.check_batch`, and `top_k` is at most `MAX_TOP_K_LOGPROBS`. What the model cannot
        take, e.g. a token id outside its vocabulary, is a `RefusedError`, and leaves the gradients as they were.
        """

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        """Normalise, clip and apply the gradients with Adam, reset them, and return metrics.

        Of the metrics, ``backward_passes`` is the number of calls of `forward` whose gradients were applied.
        """

    def adapter(self) -> Adapter:
        """Return an immutable copy of the weights."""

    def save(self, directory: Path) -> None:
        """Write the adapter in PEFT's format, the optimizer's state and the step, all bit-exact."""

    def save_gradients(self, directory: Path) -> None:
        """Write the gradients that no optimizer step has applied yet, bit-exact, into a directory of `save`."""

    def load_gradients(self, directory: Path) -> None:
        """Read what `save_gradients` wrote, if it did, after `load` with `optimizer`."""

    def load(self, directory: Path, *, optimizer: bool) -> None:
        """Read weights; with `optimizer` also moments and step, otherwise start with a new optimizer at step 0.

        A directory that holds only an adapter can be loaded without `optimizer`.
        """


class SampleJob(Struct, frozen=True, kw_only=True):
    """One prompt to complete `num_samples` times; `adapter` None samples the base model."""

    prompt: ModelInput
    num_samples: int = 1
    params: SamplingParams = SamplingParams()
    adapter: Adapter | None = None
    prompt_logprobs: int | None = None
    """None: no logprobs of the prompt; 0: those of its tokens; K: also those of the K best tokens at each position."""


class Completion(Struct, frozen=True, kw_only=True):
    """One completion; `logprobs` are in nats, at temperature 1 and before top_k and top_p."""

    tokens: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str


def fits(prompt: int, max_tokens: int, longest: int, *, scoring: bool) -> bool:
    """Return whether a prompt and its completion fit into a sequence of the `longest` length, in tokens.

    With `scoring` (logprobs of the prompt), the prompt alone may have that length if one token is asked for, because
    that token is not fed back to the model.
    """
    return prompt + max_tokens <= longest or (scoring and prompt == longest and max_tokens == 1)


class SampleOutcome(Struct, frozen=True, kw_only=True):
    """All completions of a job. `prompt_logprobs[i]` maps token id to logprob at prompt position i; entry 0 is None.

    Each map has the prompt's token first, then the best K in order.
    """

    completions: list[Completion]
    prompt_logprobs: list[dict[int, float] | None] | None = None


class SamplerUsage(Struct, frozen=True, kw_only=True):
    """Figures of a sampler. Bytes and completions are those of now; the others count from its start.

    `cache_bytes` is the memory of the KV cache, `prefix_bytes` that of the prompts that are kept for later requests.
    `prefilled` and `reused` are positions of prompts: computed, and taken from a kept prompt or from another sample of
    the same prompt. `put_back` are completions that were interrupted, because memory was full, and continued later.
    """

    running: int = 0
    waiting: int = 0
    cache_bytes: int = 0
    prefix_bytes: int = 0
    prefilled: int = 0
    reused: int = 0
    put_back: int = 0


class Sampler(Protocol):
    """Completes prompts, and batches all requests that run at the same time, also those with different adapters."""

    def submit(self, job: SampleJob) -> Future[SampleOutcome]:
        """Check `job` (raises `RefusedError`) and queue it. Cancelling the future removes it from the batch."""

    @property
    def usage(self) -> SamplerUsage:
        """What the sampler holds and has done; may be read from any thread."""

    def close(self) -> None:
        """Stop the thread and cancel the pending futures."""


class Engine(Protocol):
    """A base model, ready to train adapters and to sample."""

    @property
    def model(self) -> ModelInfo: ...

    def trainer(self, rank: int, seed: int | None = None) -> Trainer:
        """Return a trainer with a new adapter, which changes nothing yet; the same `seed` gives the same adapter."""

    def sampler(self) -> Sampler:
        """Start a sampler."""

    def load_adapter(self, directory: Path) -> Adapter:
        """Read an adapter that `Adapter.save` or `Trainer.save` wrote."""

    def write_tokenizer(self, directory: Path) -> None:
        """Write the model's tokenizer as `tokenizer.json` and the files that belong to it."""


EngineFactory = Callable[[str], Engine]
"""Loads an engine by the model's name: a hub id, a directory, or a name that the engine defines.

Raises `RefusedError` if the model cannot be loaded.
"""

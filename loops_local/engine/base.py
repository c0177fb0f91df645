"""What an engine is: base weights that never change, and any number of adapters as plain values.

The service knows engines only through these protocols. An engine has no network, no ids and no queues; the service
calls a `Trainer` from its one training thread, and a `Sampler` does its own batching in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from loops_async.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput, SamplingParams

__all__ = ["Adapter", "Completion", "Engine", "ModelInfo", "RefusedError", "SampleJob", "Sampler", "Trainer"]


class RefusedError(ValueError):
    """The engine cannot do what was asked; the text says what and why (HTTP 422 or a failed operation)."""


class ModelInfo(Struct, frozen=True, kw_only=True):
    """What there is to know of a base model."""

    name: str
    arch: str
    max_seq_len: int
    vocab_size: int


class Adapter(Protocol):
    """The LoRA weights of one version: immutable, so it is served while its successor is being trained."""

    @property
    def rank(self) -> int: ...

    def save(self, directory: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` in PEFT's format."""


class Trainer(Protocol):
    """One run's adapter in training, its gradients and its optimizer. Not safe for use from two threads at once."""

    @property
    def step(self) -> int:
        """Optimizer steps applied since the adapter was fresh, or since the state that was loaded with optimizer."""

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
        """Compute the loss and logprobs; with `backward`, add gradients to those already there."""

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        """Normalise, clip and apply the gradients with Adam, forget them, and return metrics."""

    def adapter(self) -> Adapter:
        """Return an immutable copy of the weights."""

    def save(self, directory: Path) -> None:
        """Write the adapter in PEFT's format, the optimizer's state and the step, all bit-exact."""

    def load(self, directory: Path, *, optimizer: bool) -> None:
        """Read weights; with `optimizer` also moments and step, else a fresh optimizer and step 0.

        A directory that holds only an adapter can be loaded without `optimizer`.
        """


class SampleJob(Struct, frozen=True, kw_only=True):
    """One prompt to complete `num_samples` times; `adapter` None samples the base model."""

    prompt: ModelInput
    num_samples: int = 1
    params: SamplingParams = SamplingParams()
    adapter: Adapter | None = None
    prompt_logprobs: int | None = None
    """None: not asked; 0: the prompt's own tokens; K: also the K best at each position."""


class Completion(Struct, frozen=True, kw_only=True):
    """One completion; `logprobs` are those of the distribution sampled at temperature 1, unfiltered, in nats."""

    tokens: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str


class SampleOutcome(Struct, frozen=True, kw_only=True):
    """All completions of a job. `prompt_logprobs[i]` maps token id to logprob at prompt position i; entry 0 is None.

    Each map has the prompt's own token first, then the best K in order.
    """

    completions: list[Completion]
    prompt_logprobs: list[dict[int, float] | None] | None = None


class Sampler(Protocol):
    """Completes prompts, batching whatever is under way at the same time, whichever adapters it uses."""

    def submit(self, job: SampleJob) -> Future[SampleOutcome]:
        """Check `job` (raises `RefusedError`) and queue it. Cancelling the future gives its place to others."""

    def close(self) -> None:
        """Stop the thread; futures under way are cancelled."""


class Engine(Protocol):
    """A base model, ready to train adapters and to sample."""

    @property
    def model(self) -> ModelInfo: ...

    def trainer(self, rank: int, seed: int | None = None) -> Trainer:
        """Make a trainer with a fresh adapter; the same `seed` gives the same adapter."""

    def sampler(self) -> Sampler:
        """Start a sampler."""

    def load_adapter(self, directory: Path) -> Adapter:
        """Read an adapter that `Adapter.save` or `Trainer.save` wrote."""

    def write_tokenizer(self, directory: Path) -> None:
        """Write the model's tokenizer as a `tokenizer.json` and its companions."""


EngineFactory = Callable[[str], Engine]
"""From a model's name (a hub id, a directory, or one of our own) to an engine; raises `RefusedError` if it cannot."""

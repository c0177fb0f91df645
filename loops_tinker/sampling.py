"""Sampling clients."""

from __future__ import annotations

import base64
import os
import pickle
from dataclasses import dataclass
from typing import Any

import loops_sync
from loops_async._copies import SameWhenCopied

from . import convert, types
from .errors import APIConnectionError, UnsupportedError
from .futures import APIFuture, AwaitableConcurrentFuture, started
from .settings import key_for_pickled_clients

__all__ = ["BackcompatSamplingClientFuture", "RetryConfig", "SamplingClient", "for_scripts"]


@dataclass
class RetryConfig:
    """How samples are retried. Here retries are built in; only `progress_timeout` is read: the seconds for a sample."""

    max_connections: int | None = 1000
    progress_timeout: float = 7200.0
    retry_delay_base: float = 0.5
    retry_delay_max: float = 10.0
    jitter_factor: float = 0.25
    enable_retry_logic: bool = True
    enable_stuck_detection: bool = True
    retryable_exceptions: tuple[type[Exception], ...] = (TimeoutError, APIConnectionError)


class SamplingClient(SameWhenCopied):
    """Samples from one model. It can be pickled, without the API key, and needs no closing."""

    def __init__(self, core: loops_sync.SamplingClient, seconds: float) -> None:
        self._made = core
        self._made_seconds = seconds

    @property
    def _core(self) -> loops_sync.SamplingClient:
        return self._made

    @property
    def _seconds(self) -> float:
        """The time limit of one sample."""
        return self._made_seconds

    def sample(
        self,
        prompt: types.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[types.SampleResponse]:
        """Complete a prompt.

        Args:
            prompt: the prompt.
            num_samples: how many completions.
            sampling_params: how to sample.
            include_prompt_logprobs: also score the prompt.
            topk_prompt_logprobs: also list so many candidates at each of its positions.
            topk_sample_logprobs: not offered by Loops; neither are the arguments after it.
            target_prompt_logprobs: not offered.
            prompt_alt_tokens_k: not offered.
            prompt_logprobs_last_n: not offered.

        Raises:
            UnsupportedError: an argument was given that Loops does not offer.
        """
        _refuse(
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        return started(
            self._core.sample,
            convert.model_input(prompt),
            num_samples,
            convert.sampling_params(sampling_params),
            include_prompt_logprobs,
            topk_prompt_logprobs,
            timeout=self._seconds,
            convert=convert.sample_response,
            ends_with_waiter=True,
        )

    async def sample_async(
        self,
        prompt: types.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> types.SampleResponse:
        """Complete a prompt; the arguments are those of `sample`."""
        return await self.sample(
            prompt,
            num_samples,
            sampling_params,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs,
            target_prompt_logprobs,
            prompt_alt_tokens_k,
            prompt_logprobs_last_n,
        )

    def compute_logprobs(
        self, prompt: types.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """Return the logprob of each token of the prompt, given those before it, in nats; None for the first."""
        _refuse(prompt_logprobs_last_n=prompt_logprobs_last_n)
        return started(
            self._core.compute_logprobs, convert.model_input(prompt), timeout=self._seconds, ends_with_waiter=True
        )

    async def compute_logprobs_async(
        self, prompt: types.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> list[float | None]:
        """Return the logprobs of the prompt, as `compute_logprobs`."""
        return await self.compute_logprobs(prompt, prompt_logprobs_last_n)

    def get_base_model(self) -> str:
        """Return the name of the base model."""
        return self._core.get_base_model()

    async def get_base_model_async(self) -> str:
        """Return the name of the base model."""
        return self.get_base_model()

    def get_tokenizer(self) -> Any:
        """Return the Hugging Face tokenizer of the base model; needs transformers."""
        return self._core.get_tokenizer()

    def get_sampler_handle(self) -> str:
        """Return text, without the API key, of which `from_sampler_handle` makes a client elsewhere."""
        return base64.urlsafe_b64encode(pickle.dumps(SamplingClient(self._core, self._seconds))).decode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> SamplingClient:
        """Make a client of a handle, which must come from a program that you trust: it is a pickle.

        `api_key` counts where the environment has none.
        """
        if api_key is not None:
            os.environ.setdefault("BASETEN_API_KEY", api_key)
        made: SamplingClient = pickle.loads(base64.urlsafe_b64decode(handle))  # noqa: S301 - as documented
        return made

    def get_telemetry(self) -> None:
        """Return None: nothing is reported to anybody."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._core, self._seconds)

    def __repr__(self) -> str:
        return f"<SamplingClient {self.get_base_model()}>"


class BackcompatSamplingClientFuture(AwaitableConcurrentFuture[SamplingClient], SamplingClient):
    """The future of a sampling client, which also is that client: each use of it waits."""

    @property
    def _core(self) -> loops_sync.SamplingClient:
        return self.result()._core  # noqa: SLF001 - itself

    @property
    def _seconds(self) -> float:
        return self.result()._seconds  # noqa: SLF001 - itself

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'done' if self.done() else 'pending'}>"


def for_scripts(core: loops_sync.SamplingClient, retry_config: RetryConfig | None) -> SamplingClient:
    """Return the client of a script, whose samples may take as long as with `tinker`: longer than those of Loops."""
    return SamplingClient(core, (retry_config or RetryConfig()).progress_timeout)


def _rebuilt(core: loops_sync.SamplingClient, seconds: float) -> SamplingClient:
    key_for_pickled_clients()
    return SamplingClient(core, seconds)


def _refuse(**options: object) -> None:
    for name, value in options.items():
        if value not in (None, 0):
            raise UnsupportedError(f"{name} is not offered by Loops")

"""Training clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, TypeAlias
from uuid import uuid4

import loops_async as loops
import loops_sync
from loops_async._copies import SameWhenCopied

from . import convert, types
from .errors import UnsupportedError
from .futures import APIFuture, AwaitableConcurrentFuture, in_thread, started
from .paths import from_loops, to_loops
from .sampling import BackcompatSamplingClientFuture, RetryConfig, SamplingClient, for_scripts
from .settings import ignore

__all__ = ["BackcompatTrainingClientFuture", "CustomLossFn", "TrainingClient"]

SNAPSHOT_SECONDS: Final = 30 * 24 * 3600
"""How long the weights of a sampling client are kept, which no script deletes."""

CustomLossFn: TypeAlias = Callable[[list[types.Datum], list[Any]], tuple[Any, Mapping[str, float]]]
"""Computes a loss of datums, and of one tensor for each with the logprobs of its targets; returns it, and metrics."""


class TrainingClient(SameWhenCopied):
    """Trains one model. Calls run in the order in which they are made, whether they are waited for or not.

    Losses and gradients are sums over tokens.
    """

    def __init__(self, core: loops_sync.TrainingClient) -> None:
        self._made = core

    @property
    def _core(self) -> loops_sync.TrainingClient:
        return self._made

    @property
    def model_id(self) -> str:
        """The id of the training run."""
        return self._core.run_id

    @property
    def run_id(self) -> str:
        """The id of the training run."""
        return self._core.run_id

    # --- passes and steps ---

    def forward(
        self,
        data: Sequence[types.Datum],
        loss_fn: types.LossFnType = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Compute the loss and the logprobs, without gradients; the arguments are those of `forward_backward`."""
        return self._pass("forward", data, loss_fn, loss_fn_config)

    def forward_backward(
        self,
        data: Sequence[types.Datum],
        loss_fn: types.LossFnType = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Compute the loss, and add its gradients to the accumulated ones.

        Args:
            data: the examples.
            loss_fn: the loss.
            loss_fn_config: its settings.

        Raises:
            UnsupportedError: Loops has no such loss; the message says what to use.
        """
        return self._pass("forward_backward", data, loss_fn, loss_fn_config)

    def _pass(
        self, name: str, data: Sequence[types.Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None
    ) -> APIFuture[types.ForwardBackwardOutput]:
        config = convert.loss_config(loss_fn, loss_fn_config)
        datums = convert.loss_data(data, loss_fn)
        result = partial(convert.pass_output, datums, loss_fn, config)
        return started(getattr(self._core, name), datums, loss_fn, config, convert=result, converts_long=True)

    def forward_backward_custom(
        self,
        data: Sequence[types.Datum],
        loss_fn: CustomLossFn,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Add the gradients of your own loss, a function of the datums and the logprobs of their targets (needs torch).

        The function gets the datums as they are given, whatever inputs they have. The metrics of the result are those
        that it returns, and ``loss:sum``.
        """
        if not callable(loss_fn):
            raise UnsupportedError("a loss must be a function of (data, logprobs): Loops stores no losses")
        given = list(data)
        returned: dict[str, float] = {}

        def loss(_: Any, logprobs: list[Any]) -> Any:
            value, metrics = loss_fn(given, logprobs)
            returned.update(metrics)
            return value, {}

        def result(passed: loops.ForwardBackwardOutput) -> types.ForwardBackwardOutput:
            # What the trainer calls the loss is that of the replay; `loss` is the function's own.
            surrogate = passed.metrics.get("loss:sum", passed.loss)
            return convert.output(passed, {"surrogate_loss:sum": surrogate, "loss:sum": passed.loss, **returned})

        return started(
            self._core.forward_backward_custom,
            convert.custom_data(given),
            loss,
            convert=result,
            converts_long=True,
        )

    def optim_step(
        self, optim_params: types.OptimParams | None = None, *, adam_params: types.AdamParams | None = None
    ) -> APIFuture[types.OptimStepResponse]:
        """Apply the accumulated gradients, and clear them."""
        params = optim_params if optim_params is not None else adam_params
        adam = convert.adam_params(types.AdamParams() if params is None else params)
        return started(self._core.optim_step, adam, convert=convert.optim_response)

    # --- saving and loading ---

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[types.SaveWeightsResponse]:
        """Save weights and optimizer; one of the same name is replaced, whatever `overwrite` says."""
        ignore(user_metadata=user_metadata)
        return started(
            self._core.save_state,
            name,
            ttl_seconds,
            convert=lambda saved: types.SaveWeightsResponse(path=from_loops(saved.path)),
        )

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[types.SaveWeightsForSamplerResponse]:
        """Save weights to sample from; nothing that samples already is changed."""
        ignore(user_metadata=user_metadata)
        return started(
            self._core.save_weights_for_sampler,
            name,
            ttl_seconds=ttl_seconds,
            publish=False,
            convert=lambda saved: types.SaveWeightsForSamplerResponse(path=from_loops(saved.path)),
        )

    def save_weights_external(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: list[str] | None = None
    ) -> APIFuture[Any]:
        """Refused: every checkpoint of Loops can be downloaded."""
        raise UnsupportedError("Loops has no external weights; download a checkpoint with `loops checkpoints download`")

    def load_state(self, path: str, weights_access_token: str | None = None) -> APIFuture[types.LoadWeightsResponse]:
        """Load weights, with a fresh optimizer."""
        return self._load("load_state", path, weights_access_token)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[types.LoadWeightsResponse]:
        """Load weights and optimizer."""
        return self._load("load_state_with_optimizer", path, weights_access_token)

    def _load(self, name: str, path: str, token: str | None) -> APIFuture[types.LoadWeightsResponse]:
        refuse_token(token)
        return started(
            getattr(self._core, name),
            to_loops(path),
            convert=lambda _: types.LoadWeightsResponse(path=path, model_id=self.model_id),
        )

    # --- sampling clients ---

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
        kind: types.SamplingClientKind = "snapshot",
    ) -> BackcompatSamplingClientFuture:
        """Return a client of these weights: for ever, or with the kind ``"inflight"``, of these or newer ones."""
        ignore(record_stability_info=record_stability_info)
        if kind == "inflight":
            core = started(self._core.save_weights_and_get_sampling_client, name or f"inflight-{uuid4().hex}")
        else:
            core = started(self._core.snapshot, ttl_seconds=SNAPSHOT_SECONDS)
        return BackcompatSamplingClientFuture(core, lambda made: for_scripts(made, retry_config))

    def create_sampling_client(
        self, model_path: str, retry_config: RetryConfig | None = None, record_stability_info: bool = False
    ) -> BackcompatSamplingClientFuture:
        """Return a client of saved weights, on the sampler of this run."""
        ignore(record_stability_info=record_stability_info)
        core = self._core

        def make() -> SamplingClient:
            return for_scripts(core.create_sampling_client(to_loops(model_path)), retry_config)

        return BackcompatSamplingClientFuture(in_thread(make))

    # --- what is known ---

    def get_info(self) -> types.GetInfoResponse:
        """Return the model, and its LoRA rank if that is known."""
        return convert.info(self._core.get_info(), self.model_id)

    async def get_info_async(self) -> types.GetInfoResponse:
        """Return the model, and its LoRA rank if that is known."""
        return self.get_info()

    def get_tokenizer(self) -> Any:
        """Return the Hugging Face tokenizer of the base model; needs transformers."""
        return self._core.get_tokenizer()

    def get_console_url(self) -> str:
        """Refused: Loops has no page for it."""
        raise UnsupportedError(f"Loops has no page for a run; `loops runs show {self.model_id}` says what is known")

    def get_telemetry(self) -> None:
        """Return None: nothing is reported to anybody."""

    # --- the same for `await`, as scripts of the old generation have it ---

    async def forward_async(
        self,
        data: Sequence[types.Datum],
        loss_fn: types.LossFnType = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Return the future of `forward`."""
        return self.forward(data, loss_fn, loss_fn_config)

    async def forward_backward_async(
        self,
        data: Sequence[types.Datum],
        loss_fn: types.LossFnType = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Return the future of `forward_backward`."""
        return self.forward_backward(data, loss_fn, loss_fn_config)

    async def forward_backward_custom_async(
        self,
        data: Sequence[types.Datum],
        loss_fn: CustomLossFn,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Return the future of `forward_backward_custom`."""
        return self.forward_backward_custom(data, loss_fn, loss_type_input=loss_type_input)

    async def optim_step_async(
        self, optim_params: types.OptimParams | None = None, *, adam_params: types.AdamParams | None = None
    ) -> APIFuture[types.OptimStepResponse]:
        """Return the future of `optim_step`."""
        return self.optim_step(optim_params, adam_params=adam_params)

    async def save_state_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[types.SaveWeightsResponse]:
        """Return the future of `save_state`."""
        return self.save_state(name, ttl_seconds, overwrite, user_metadata)

    async def save_weights_for_sampler_async(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[types.SaveWeightsForSamplerResponse]:
        """Return the future of `save_weights_for_sampler`."""
        return self.save_weights_for_sampler(name, ttl_seconds, user_metadata)

    async def save_weights_external_async(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: list[str] | None = None
    ) -> APIFuture[Any]:
        """Refused, as `save_weights_external`."""
        return self.save_weights_external(name, ttl_seconds, age_encryption_recipients)

    async def load_state_async(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[types.LoadWeightsResponse]:
        """Return the future of `load_state`."""
        return self.load_state(path, weights_access_token)

    async def load_state_with_optimizer_async(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[types.LoadWeightsResponse]:
        """Return the future of `load_state_with_optimizer`."""
        return self.load_state_with_optimizer(path, weights_access_token)

    async def save_weights_and_get_sampling_client_async(
        self,
        name: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
        kind: types.SamplingClientKind = "snapshot",
    ) -> SamplingClient:
        """Return the client of `save_weights_and_get_sampling_client`."""
        return await self.save_weights_and_get_sampling_client(name, retry_config, record_stability_info, kind)

    async def create_sampling_client_async(
        self, model_path: str, retry_config: RetryConfig | None = None, record_stability_info: bool = False
    ) -> SamplingClient:
        """Return the client of `create_sampling_client`."""
        return await self.create_sampling_client(model_path, retry_config, record_stability_info)

    def __repr__(self) -> str:
        return f"<TrainingClient {self.model_id}>"


class BackcompatTrainingClientFuture(AwaitableConcurrentFuture[TrainingClient], TrainingClient):
    """The future of a training client, which also is that client: each use of it waits."""

    @property
    def _core(self) -> loops_sync.TrainingClient:
        return self.result()._core  # noqa: SLF001 - itself

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'done' if self.done() else 'pending'}>"


def refuse_token(weights_access_token: str | None) -> None:
    """Refuse a token for the weights of others."""
    if weights_access_token is not None:
        raise UnsupportedError("weights_access_token is not offered by Loops: a checkpoint belongs to its team")

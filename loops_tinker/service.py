"""The service client, which creates the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

import loops_async as loops
import loops_sync
from loops_async._copies import SameWhenCopied

from . import endings, types
from .errors import UnsupportedError, no_checkpoint
from .futures import AwaitableConcurrentFuture, in_thread
from .paths import parts, to_loops
from .rest import RestClient, capabilities
from .sampling import BackcompatSamplingClientFuture, RetryConfig, SamplingClient, for_scripts
from .settings import ignore, service_settings
from .training import BackcompatTrainingClientFuture, TrainingClient, refuse_token

__all__ = ["ServiceClient"]


class ServiceClient(SameWhenCopied):
    """Creates clients that train and sample. It connects at the first need, and needs no closing.

    ``with`` and `close` end what was created, which otherwise is scaled to zero when it was unused for an hour.

    Args:
        user_metadata: ignored with a warning, as are `project_id`, `display_name`, `default_headers_overrides` and
            unknown arguments.
        project_id: ignored.
        display_name: ignored.
        base_url: default ``LOOPS_BASE_URL``, then ``TINKER_BASE_URL``, else the hosted service.
        api_key: default ``BASETEN_API_KEY``, then ``TINKER_API_KEY``.
        default_headers_overrides: ignored.
        unknown: ignored.

    Raises:
        ConfigError: a `ValueError`: there is no API key and no URL, or they cannot be used.

    Example:
        ::

            service = tinker.ServiceClient()
            trainer = service.create_lora_training_client("Qwen/Qwen3-8B", rank=16).result()
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        ignore(
            user_metadata=user_metadata,
            project_id=project_id,
            display_name=display_name,
            default_headers_overrides=default_headers_overrides,
            **unknown,
        )
        self._settings = service_settings(api_key, base_url)
        self._opening = threading.Lock()
        self._opened: loops_sync.ServiceClient | None = None
        self._trainers: dict[str, loops_sync.TrainingClient] = {}
        self._samplers: list[loops_sync.SamplingClient] = []

    @property
    def _core(self) -> loops_sync.ServiceClient:
        with self._opening:
            if self._opened is None:
                self._opened = endings.open_service(self._settings)
            return self._opened

    # --- training clients ---

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> BackcompatTrainingClientFuture:
        """Start to train a model; Loops chooses which layers its adapter changes.

        Args:
            base_model: a model that the service supports.
            rank: the LoRA rank.
            seed: makes the fresh adapter reproducible.
            train_mlp: must be True.
            train_attn: must be True.
            train_unembed: ignored.
            user_metadata: ignored with a warning.
            optimizer: AdamW.

        Raises:
            UnsupportedError: layers were left out, or another optimizer was chosen.
        """
        if not (train_mlp and train_attn):
            raise UnsupportedError("train_mlp and train_attn must be True: Loops chooses the layers of an adapter")
        _check_optimizer(optimizer)
        ignore(user_metadata=user_metadata)
        return self._trainer(lambda core: core.create_lora_training_client(base_model, rank, seed))

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> BackcompatTrainingClientFuture:
        """Start to train from saved weights, with a fresh optimizer."""
        refuse_token(weights_access_token)
        _check_optimizer(optimizer)
        ignore(user_metadata=user_metadata)
        return self._trainer(_of_checkpoint(path, "create_training_client_from_state"))

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> BackcompatTrainingClientFuture:
        """Start to train from saved weights and their optimizer."""
        refuse_token(weights_access_token)
        ignore(user_metadata=user_metadata)
        return self._trainer(_of_checkpoint(path, "create_training_client_from_state_with_optimizer"))

    def _trainer(
        self, create: Callable[[loops_sync.ServiceClient], loops_sync.TrainingClient]
    ) -> BackcompatTrainingClientFuture:
        def make() -> TrainingClient:
            core = create(self._core)
            self._trainers[core.run_id] = core
            return TrainingClient(core)

        return BackcompatTrainingClientFuture(in_thread(make))

    # --- sampling clients ---

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
    ) -> BackcompatSamplingClientFuture:
        """Return a client of saved weights or of a base model.

        Weights of a run of this client are sampled on the run's own sampler; anything else has one of its own.

        Raises:
            ValueError: neither `model_path` nor `base_model` was given.
        """
        ignore(record_stability_info=record_stability_info)
        if model_path is None and base_model is None:
            raise ValueError("Either model_path or base_model must be provided")

        def make() -> SamplingClient:
            return for_scripts(self._sampler(model_path, base_model), retry_config)

        return BackcompatSamplingClientFuture(in_thread(make))

    def _sampler(self, model_path: str | None, base_model: str | None) -> loops_sync.SamplingClient:
        path = None if model_path is None else to_loops(model_path)
        trainer = None if model_path is None else self._trainers.get(parts(model_path)[0])
        if path is not None and trainer is not None:
            return trainer.create_sampling_client(path)
        if model_path is None:
            made = self._core.create_sampling_client(base_model)
        else:
            made = _of_checkpoint(model_path, "create_sampling_client_from_checkpoint")(self._core)
        self._samplers.append(made)
        return made

    # --- what the service has ---

    def create_rest_client(self) -> RestClient:
        """Return a client of what the service keeps."""
        return RestClient(_core=lambda: self._core)

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """Return the models that can be trained and sampled."""
        return in_thread(lambda: capabilities(self._core)).result()

    def list_checkpoints(self, run_id: str) -> list[loops.Checkpoint]:
        """Return the checkpoints of a run, for scripts of the first clients of Loops."""
        return self._core.list_checkpoints(run_id)

    def create_custom_loss(self, fn: Callable[..., Any], input_ranks: Mapping[str, Any]) -> Any:
        """Refused: Loops stores no losses."""
        raise UnsupportedError("Loops stores no losses; give the function to forward_backward_custom")

    def copy_weights(self, path: str, **options: Any) -> Any:
        """Refused: a checkpoint of Loops has one place."""
        raise UnsupportedError("Loops copies no checkpoints")

    def get_console_url(self) -> str:
        """Refused: Loops has no page for it."""
        raise UnsupportedError("Loops has no page for what a client does; `loops ps` lists what runs")

    def get_telemetry(self) -> None:
        """Return None: nothing is reported to anybody."""

    # --- the end ---

    def close(
        self, status: Literal["success", "errored", "interrupted"] = "success", detail: str | None = None
    ) -> AwaitableConcurrentFuture[None]:
        """End what was created, and all connections; `status` and `detail` are not reported to anybody."""
        return in_thread(self._close)

    def _close(self) -> None:
        with self._opening:
            opened, self._opened = self._opened, None
        if opened is not None:
            endings.close(opened, [*self._trainers.values(), *self._samplers])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    # --- the same for `await`, as scripts of the old generation have it ---

    async def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> TrainingClient:
        """Return the client of `create_lora_training_client`."""
        return await self.create_lora_training_client(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata, optimizer
        )

    async def create_training_client_from_state_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> TrainingClient:
        """Return the client of `create_training_client_from_state`."""
        return await self.create_training_client_from_state(
            path, base_model, user_metadata, weights_access_token, optimizer
        )

    async def create_training_client_from_state_with_optimizer_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """Return the client of `create_training_client_from_state_with_optimizer`."""
        return await self.create_training_client_from_state_with_optimizer(
            path, base_model, user_metadata, weights_access_token
        )

    async def create_sampling_client_async(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """Return the client of `create_sampling_client`."""
        return await self.create_sampling_client(model_path, base_model, retry_config, record_stability_info)

    async def get_server_capabilities_async(self) -> types.GetServerCapabilitiesResponse:
        """Return the models that can be trained and sampled."""
        return await in_thread(lambda: capabilities(self._core))


def _of_checkpoint(path: str, method: str) -> Callable[[loops_sync.ServiceClient], Any]:
    """Return a function that makes a client of a checkpoint, or raises a `NotFoundError` if there is none."""
    parts(path)

    def make(core: loops_sync.ServiceClient) -> Any:
        try:
            return getattr(core, method)(to_loops(path))
        except loops.InputError as error:
            if core.control_plane.list_checkpoints(checkpoint_path=to_loops(path)):
                raise
            raise no_checkpoint(path) from error

    return make


def _check_optimizer(optimizer: types.OptimizerConfig | None) -> None:
    if optimizer is not None and not isinstance(optimizer, types.AdamOptimizerConfig):
        raise UnsupportedError("Loops has one optimizer, AdamW; use AdamOptimizerConfig or leave `optimizer` out")

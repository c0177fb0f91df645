"""The entry point: a session on the service, and the clients made from it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from os import PathLike
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import anyio
from msgspec import UNSET

from ._config import Settings, checked_url, resolve_settings
from ._inputs import check, check_at_least, check_kind, check_positive
from ._readiness import wait_for_trainer
from ._runtime import Runtime
from .checkpoints import download
from .control_plane import ControlPlane
from .errors import ClosedError, InputError, LoopsError, ProtocolError, UnsupportedError
from .protocol import CheckpointUri
from .sampling import SamplerTarget, SamplingClient
from .training import TrainingClient
from .types import (
    Checkpoint,
    CheckpointDownload,
    CheckpointFilesResponse,
    CreateRunRequest,
    CreateSamplerRequest,
    Run,
    Sampler,
    ServerCapabilities,
    WandbConfig,
)

__all__ = ["ServiceClient"]

DEACTIVATE_SECONDS = 10.0


class ServiceClient:
    """A session on a Loops service.

    Entering it (or `open`) creates the session; leaving it (or `close`) ends every background task and connection.
    It belongs to the event loop in which it was opened.

    Args:
        training_project_id: the project of the session; None is the organization's default one.
        api_key: default ``BASETEN_API_KEY``.
        base_url: default ``LOOPS_BASE_URL``, else the hosted service.
        reuse_from_session_id: reuse that session's deployments where possible; default
            ``LOOPS_REUSE_FROM_SESSION_ID``. The same team's only, and best effort.
        auth_scheme: ``"Bearer"`` or ``"Api-Key"``; the service accepts both.

    Raises:
        ConfigError: there is neither a key nor a base_url, or one of them cannot be right.

    Example:
        ::

            async with loops.ServiceClient() as service:
                trainer = await service.create_lora_training_client("Qwen/Qwen3-0.6B", rank=16)
    """

    def __init__(
        self,
        training_project_id: str | None = None,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        reuse_from_session_id: str | None = None,
        auth_scheme: str = "Bearer",
    ) -> None:
        settings = resolve_settings(
            api_key=api_key,
            base_url=base_url,
            training_project_id=training_project_id,
            reuse_from_session_id=reuse_from_session_id,
            auth_scheme=auth_scheme,
        )
        self._prepare(settings, None)

    def _prepare(self, settings: Settings, local: _LocalUrls | None) -> None:
        self._settings = settings
        self._local = local
        self._runtime: Runtime | None = None
        self._session_id: str | None = None
        self._is_closed = False

    @classmethod
    def local(cls, *, trainer_url: str, sampler_url: str) -> ServiceClient:
        """Bind to a trainer and a sampler that run already, without a control plane and without a key.

        The run gets an id of its own, so saving, loading and publishing work; listing and downloading checkpoints
        work where the trainer's host also answers ``/v1/loops/checkpoints``, as the embedded service does.
        """
        trainer = checked_url(trainer_url, "trainer_url")
        sampler = checked_url(sampler_url, "sampler_url")
        parts = urlsplit(trainer)
        client = cls.__new__(cls)
        settings = Settings(base_url=f"{parts.scheme}://{parts.netloc}", api_key=None)
        client._prepare(settings, _LocalUrls(trainer, sampler))  # noqa: SLF001 - our own other constructor
        return client

    # --- life ---

    async def open(self) -> ServiceClient:
        """Create the session; opening an open client does nothing.

        Raises:
            AuthenticationError: the key is wrong.
            ConnectError: there is nothing at `base_url`.
            ProtocolError: what is there is not Loops.
        """
        if self._is_closed:
            raise ClosedError("this client is closed; make a new ServiceClient")
        if self._runtime is not None:
            return self
        runtime = Runtime(self._settings)
        try:
            self._session_id = "local" if self._local else await self._create_session(runtime)
        except BaseException:
            await runtime.close()
            raise
        self._runtime = runtime
        return self

    async def close(self) -> None:
        """End every background task and connection; runs and samplers go on. Closing twice does nothing."""
        self._is_closed = True
        if self._runtime is not None:
            await self._runtime.close()

    async def __aenter__(self) -> ServiceClient:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def session_id(self) -> str:
        """The session's id; ``"local"`` without a control plane."""
        if self._session_id is None:
            raise ClosedError("the session is not open yet: use `async with` or `await client.open()`")
        return self._session_id

    @property
    def control_plane(self) -> ControlPlane:
        """The REST API, one coroutine for each route."""
        return self._live.control_plane

    def __repr__(self) -> str:
        return f"<ServiceClient session {self._session_id} at {self._settings.base_url}>"

    # --- training ---

    async def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        timeout: float = 600.0,
        ready_timeout: float = 3600.0,
        wandb_config: WandbConfig | None = None,
        *,
        max_seq_len: int | None = None,
        scale_down_delay_seconds: int = 3600,
        replicas: int = 1,
        path: str | None = None,
        name: str | None = None,
    ) -> TrainingClient:
        """Provision a trainer with its paired sampler, and return when the trainer is ready.

        Args:
            base_model: a Hugging Face repository id that the service supports (`get_server_capabilities`).
            rank: the LoRA rank.
            seed: makes the fresh adapter reproducible.
            timeout: seconds that one request to the trainer may take.
            ready_timeout: seconds that the trainer may take to become ready.
            wandb_config: log every optimizer step there; needs the ``wandb`` extra.
            max_seq_len: longest example in tokens; None is the model's maximum.
            scale_down_delay_seconds: how long the trainer stays up unused.
            replicas: data-parallel copies.
            path: ``bt://loops:<run_id>/weights/<name>`` to start from.
            name: a display name; sent only when given.

        Raises:
            InputError: an argument breaks a rule; nothing was sent.
            BadRequestError: the service refuses, for example an unknown model.
            ProvisioningError: the deployment failed.
            NotReadyError: it was not ready in `ready_timeout`.

        A run whose provisioning fails or is cancelled is deactivated where the service allows it.
        """
        if wandb_config is not None:
            check_kind(wandb_config, WandbConfig, "wandb_config")
        check_at_least(rank, 1, "rank")
        request = CreateRunRequest(
            session_id=self.session_id,
            base_model=base_model,
            lora_rank=rank,
            seed=seed,
            max_seq_len=max_seq_len,
            scale_down_delay_seconds=scale_down_delay_seconds,
            replicas=replicas,
            path=path,
            reuse_from_session_id=self._settings.reuse_from_session_id,
            name=UNSET if name is None else name,
        )
        trainer = await self._provision(request, timeout, ready_timeout)
        if path is not None:
            await (await trainer.load_state(path)).result()
        return trainer

    async def create_training_client_from_state(
        self, path: str, *, timeout: float = 600.0, ready_timeout: float = 3600.0
    ) -> TrainingClient:
        """Provision a new run of the checkpoint's model and rank, with its weights and a fresh optimizer.

        `path` is ``bt://loops:<run_id>/weights/<name>``.
        """
        return await self._from_state(path, timeout, ready_timeout, with_optimizer=False)

    async def create_training_client_from_state_with_optimizer(
        self, path: str, *, timeout: float = 600.0, ready_timeout: float = 3600.0
    ) -> TrainingClient:
        """Provision a new run that continues from the checkpoint: weights, optimizer and step."""
        return await self._from_state(path, timeout, ready_timeout, with_optimizer=True)

    async def attach_training_client(
        self, run_id: str, *, timeout: float = 600.0, ready_timeout: float = 3600.0
    ) -> TrainingClient:
        """Return a client of a run that exists, to go on where the run stands: weights, gradients, optimizer, step.

        Nothing is reset. The trainer takes this client's operations after all that it has accepted before, whoever
        sent them; clients of one run that come from the same service client share one order.

        Raises:
            NotFoundError: there is no such run.
            ProvisioningError: its deployment has ended.
            NotReadyError: its trainer was not ready in `ready_timeout`.
        """
        _check_times(timeout, ready_timeout)
        runtime, is_local = self._live, self._local is not None
        run = await self._local_run(self._local, run_id) if self._local else await self.control_plane.get_run(run_id)
        if run.base_url is None:
            raise ProtocolError(f"run {run_id} has no trainer that can be reached; its status is {run.status.name}")
        await wait_for_trainer(runtime, run, ready_timeout=ready_timeout, is_local=is_local)
        return TrainingClient(
            runtime,
            run,
            lora_rank=None,
            max_seq_len=None,
            timeout=timeout,
            ready_timeout=ready_timeout,
            is_local=is_local,
        )

    # --- sampling ---

    async def create_sampling_client(
        self,
        base_model: str,
        timeout: float = 300.0,
        ready_timeout: float = 3600.0,
        model_path: str | None = None,
    ) -> SamplingClient:
        """Provision a standalone sampler of a base model, and return when it is ready.

        Args:
            base_model: a Hugging Face repository id that the service supports.
            timeout: seconds that one sample may take.
            ready_timeout: seconds that the sampler may take to become ready.
            model_path: not offered here; see `create_sampling_client_from_checkpoint`.

        Raises:
            UnsupportedError: `model_path` was given.
            SamplerTerminatedError: the deployment failed.
            NotReadyError: it was not ready in `ready_timeout`.
        """
        if model_path is not None:
            raise UnsupportedError(
                "create_sampling_client does not take model_path: sample a checkpoint on its run's sampler with "
                "TrainingClient.create_sampling_client(model_path), or without a run with "
                "ServiceClient.create_sampling_client_from_checkpoint(model_path)"
            )
        return await self._sampling_client(base_model, None, timeout, ready_timeout)

    async def create_sampling_client_from_checkpoint(
        self, model_path: str, timeout: float = 300.0, ready_timeout: float = 3600.0
    ) -> SamplingClient:
        """Provision a standalone sampler of one checkpoint, and return when it is ready.

        `model_path` is ``bt://loops:<run_id>/sampler_weights/<name>``; times and errors are those of
        `create_sampling_client`.
        """
        CheckpointUri.parse(model_path, kind="sampler_weights", path="model_path")
        checkpoint = await self._checkpoint_at(model_path)
        if checkpoint.base_model is None:
            raise ProtocolError(f"the service does not say which base model checkpoint {model_path} belongs to")
        return await self._sampling_client(checkpoint.base_model, model_path, timeout, ready_timeout)

    # --- what there is ---

    async def get_server_capabilities(self) -> ServerCapabilities:
        """Return the base models that the service supports."""
        return await self.control_plane.get_capabilities()

    async def list_checkpoints(self, run_id: str) -> list[Checkpoint]:
        """Return the checkpoints of a run."""
        return await self.control_plane.list_checkpoints(run_id=run_id)

    async def get_checkpoint_archive_url(
        self, checkpoint_id: str, page_size: int = 1000, page_token: int = 0
    ) -> CheckpointFilesResponse:
        """Return one page of a checkpoint's files with short-lived URLs.

        `checkpoint_id` is `Checkpoint.id`; `page_token` is an offset, the `next_page_token` of the page before.
        """
        return await self.control_plane.get_checkpoint_files(checkpoint_id, page_size=page_size, page_token=page_token)

    async def download_checkpoint(self, checkpoint_id: str, *, dest_dir: str | PathLike[str]) -> CheckpointDownload:
        """Download all files of a checkpoint into `dest_dir`.

        `checkpoint_id` is `Checkpoint.id`. Files are fetched in parallel, checked by size, and appear under their
        names only when they are whole.
        """
        return await download(self._live, checkpoint_id, dest_dir)

    # --- within ---

    @property
    def _live(self) -> Runtime:
        if self._is_closed:
            raise ClosedError("this client is closed; make a new ServiceClient")
        if self._runtime is None:
            raise ClosedError("this client is not open yet: use `async with` or `await client.open()`")
        return self._runtime

    async def _create_session(self, runtime: Runtime) -> str:
        session = await runtime.control_plane.create_session(training_project_id=self._settings.training_project_id)
        return session.id

    async def _provision(self, request: CreateRunRequest, timeout: float, ready_timeout: float) -> TrainingClient:
        check(request)
        _check_times(timeout, ready_timeout)
        runtime, is_local = self._live, self._local is not None
        run = self._local.run(request.base_model) if self._local else await runtime.control_plane.create_run(request)
        if run.base_url is None:
            raise ProtocolError(f"run {run.id} was made without the URL of its trainer; look at it with get_run")
        async with _deactivated_on_failure(runtime, run):
            await wait_for_trainer(runtime, run, ready_timeout=ready_timeout, is_local=is_local)
            trainer = TrainingClient(
                runtime,
                run,
                lora_rank=request.lora_rank,
                max_seq_len=request.max_seq_len,
                timeout=timeout,
                ready_timeout=ready_timeout,
                is_local=is_local,
            )
            # Whether a run that was created with a path keeps it through this is not specified: whoever wants
            # weights loads them afterwards.
            await (await trainer.init_trainer_server(request.lora_rank)).result()
        return trainer

    async def _local_run(self, local: _LocalUrls, run_id: str) -> Run:
        """Describe a run that exists in local mode, where only its sampler can say which model it trains."""
        sampler = local.sampler("")
        target = SamplerTarget(
            service_url=self._settings.base_url,
            base_url=sampler.base_url,
            base_model=sampler.base_model,
            run_id=run_id,
            authorize=False,
        )
        return local.run(await SamplingClient(target, self._live).discover_base_model_name(), run_id)

    async def _from_state(
        self, path: str, timeout: float, ready_timeout: float, *, with_optimizer: bool
    ) -> TrainingClient:
        CheckpointUri.parse(path, kind="weights")
        checkpoint = await self._checkpoint_at(path)
        rank = checkpoint.lora_adapter_config.rank if checkpoint.lora_adapter_config else None
        if checkpoint.base_model is None or rank is None:
            raise ProtocolError(f"the service does not say the base model and rank of checkpoint {path}")
        request = CreateRunRequest(
            session_id=self.session_id,
            base_model=checkpoint.base_model,
            lora_rank=rank,
            path=path,
            reuse_from_session_id=self._settings.reuse_from_session_id,
        )
        trainer = await self._provision(request, timeout, ready_timeout)
        load = trainer.load_state_with_optimizer if with_optimizer else trainer.load_state
        await (await load(path)).result()
        return trainer

    async def _checkpoint_at(self, path: str) -> Checkpoint:
        found = await self.control_plane.list_checkpoints(checkpoint_path=path)
        if not found:
            raise InputError("path", f"the service knows no checkpoint {path}; list them with list_checkpoints(run_id)")
        return found[0]

    async def _sampling_client(
        self, base_model: str, model_path: str | None, timeout: float, ready_timeout: float
    ) -> SamplingClient:
        _check_times(timeout, ready_timeout)
        runtime, is_local = self._live, self._local is not None
        if self._local:
            sampler, sampler_id = self._local.sampler(base_model), None
        else:
            request = CreateSamplerRequest(session_id=self.session_id, base_model=base_model, model_path=model_path)
            sampler = await runtime.control_plane.create_sampler(request)
            sampler_id = sampler.id
        target = SamplerTarget(
            service_url=self._settings.base_url,
            base_url=sampler.base_url,
            base_model=sampler.base_model,
            model_id=sampler.model_id,
            deployment_id=sampler.deployment_id,
            sampler_id=sampler_id,
            checkpoint_path=model_path,
            timeout=timeout,
            ready_timeout=ready_timeout,
            authorize=not is_local,
            is_queued=not is_local and sampler.deployment_id is None,
        )
        client = SamplingClient(target, runtime)
        await client.ensure_ready()
        return client


class _LocalUrls:
    """A trainer and a sampler without a control plane, described as the control plane would."""

    def __init__(self, trainer_url: str, sampler_url: str) -> None:
        self._trainer_url = trainer_url
        self._sampler_url = sampler_url

    def run(self, base_model: str, run_id: str | None = None) -> Run:
        return Run(
            id=run_id or f"local-{uuid4().hex[:8]}",
            session_id="local",
            base_model=base_model,
            base_url=self._trainer_url,
            created_at=datetime.now(UTC),
            sampler=self.sampler(base_model),
        )

    def sampler(self, base_model: str) -> Sampler:
        return Sampler(id="local", base_url=self._sampler_url, base_model=base_model, created_at=datetime.now(UTC))


@asynccontextmanager
async def _deactivated_on_failure(runtime: Runtime, run: Run) -> AsyncGenerator[None]:
    """Do not leave a run that nobody has a client for, where the service says what it runs on."""
    try:
        yield
    except BaseException as failure:
        if run.deployment_id is not None:
            with anyio.move_on_after(DEACTIVATE_SECONDS, shield=True):
                try:
                    await runtime.control_plane.deactivate_deployment(run.deployment_id)
                except LoopsError as error:
                    failure.add_note(f"run {run.id} could not be deactivated and may still cost money: {error}")
        raise


def _check_times(timeout: Any, ready_timeout: Any) -> None:
    check_positive(timeout, "timeout")
    check_positive(ready_timeout, "ready_timeout")

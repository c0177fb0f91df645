"""The entry point: a session on the service, and the clients that it creates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Hashable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, Literal, TextIO, TypeVar, get_args
from urllib.parse import urlsplit

from msgspec import UNSET, Struct

from ._arguments import check_at_least, check_positive, check_request
from ._checkpoints.download import download
from ._checkpoints.listing import checkpoint_files, checkpoints_of_all_runs
from ._copies import SameWhenCopied
from ._http.endpoint import Endpoint
from ._http.request_log import request_log_settings
from ._http.settings import Settings, checked_url, resolve_settings
from ._journal.journal import Journal, JournalSettings, journal_settings
from ._other_names import KnowsOtherNames
from ._session.deactivation import OnExit
from ._session.local import LocalProvisioner, LocalUrls
from ._session.provisioning import Provisioner, ProvisioningOptions, ServiceProvisioner
from ._session.recorded import recorded_session
from ._session.requests import run_request, sampler_request
from ._session.runtime import Runtime
from ._tasks import SingleFlight, run_to_completion
from ._training.step_log import StepOptions
from ._work.budget import Budget
from ._work.dump import dump, inflight
from ._work.registry import Work
from .control_plane import ControlPlane, resolve_team
from .errors import ClosedError, ConfigError, InputError, ProtocolError, UnsupportedError
from .protocol import LOCAL_ID, CheckpointUri
from .sampling import SamplingClient, Weights, sampling_client
from .training import TrainingClient, logging_begun, training_client
from .types import (
    AuthScheme,
    AvailabilityModel,
    Checkpoint,
    CheckpointDownload,
    CheckpointFile,
    CheckpointFilesResponse,
    CreateRunRequest,
    CreateSamplerRequest,
    CreateSessionRequest,
    DownloadProgress,
    InFlight,
    ProvisioningEvent,
    Run,
    Sampler,
    ServerCapabilities,
    StepMetrics,
    Usage,
    WandbConfig,
)

__all__ = ["ServiceClient"]

C = TypeVar("C", TrainingClient, SamplingClient)


class ServiceClient(SameWhenCopied, KnowsOtherNames):
    """A session on a Loops service.

    Entering it (or `open`) creates the session; leaving it (or `close`) ends every background task and connection.
    It belongs to the event loop in which it was opened, and calls every `on_progress` there: a callback must return
    quickly, and an exception that it raises ends the call.

    Args:
        training_project_id: the project of the session; None uses the organization's default project.
        api_key: default ``BASETEN_API_KEY``.
        base_url: default ``LOOPS_BASE_URL``, else the hosted service.
        reuse_from_session_id: reuse that session's deployments where possible; default
            ``LOOPS_REUSE_FROM_SESSION_ID``. Best effort, and only within the same team.
        auth_scheme: ``"Bearer"`` or ``"Api-Key"``; the service accepts both.
        reuse_from_run_id: reuse that run's deployment where possible; default ``LOOPS_REUSE_FROM_RUN_ID``. It takes
            precedence over `reuse_from_session_id`. Newer services only.
        team: the name or id of the team that sessions, runs and samplers belong to; default ``LOOPS_TEAM``, else the
            team of the API key. Newer services only.
        availability_model: ``"dedicated"`` or ``"spot"`` machines; default ``LOOPS_AVAILABILITY_MODEL``, else the
            service's choice. Newer services only.
        proxy: the URL of an http or https proxy for all hosts; default ``HTTPS_PROXY``, ``HTTP_PROXY`` and
            ``ALL_PROXY``. This machine and the hosts that ``NO_PROXY`` lists are connected to directly.
        allow_http: whether the API key may be sent unencrypted to another machine, for a service in a network that you
            trust; default ``LOOPS_ALLOW_HTTP``, else False.
        on_exit: what happens, when this client closes, to the runs and samplers that it created and that were not
            deactivated: ``"deactivate"`` ends them, concurrently and within 30 s, and logs what could not be ended;
            ``"warn"`` logs one line that names them and the command that stops them; ``"leave"`` does nothing. What
            was only attached to is never touched. The default is ``"warn"``, since deactivating a run loses its
            unsaved training, while a run that is left can be attached to again, and is scaled to zero when it is not
            used for some time. Close the client if you rely on ``"deactivate"``: one that is dropped may only warn.
        request_log: a file to which each request and each answer is appended as a line of JSON, without secrets, and
            readable for you alone; default ``LOOPS_REQUEST_LOG``, else none. ``LOOPS_REQUEST_LOG_BODIES`` is
            ``short`` (the default: bodies up to 2,000 characters), ``full`` or ``none``.
        budget: limits of what the session may use, e.g. of tokens or of the cost; default none.
        journal: a file in which this client records what the service does for it, so that a program that was killed
            can be started again unchanged: with the same journal it gets the same session and runs, and the results of
            operations that were already executed; only the others are executed. The file is readable for you alone and
            holds no key; it grows with the results.
        journal_samples: also record samples, so that none is paid for twice. Needed by a program that trains on what
            it samples: without it, the program would get other data when it is started again.

    Raises:
        ConfigError: neither an API key nor a base_url was given, or an argument is invalid.

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
        auth_scheme: AuthScheme = "Bearer",
        reuse_from_run_id: str | None = None,
        team: str | None = None,
        availability_model: AvailabilityModel | Literal["dedicated", "spot"] | None = None,
        proxy: str | None = None,
        allow_http: bool | None = None,
        on_exit: Literal["deactivate", "warn", "leave"] = "warn",
        request_log: str | PathLike[str] | None = None,
        budget: Budget | None = None,
        journal: str | PathLike[str] | None = None,
        journal_samples: bool = False,
    ) -> None:
        if on_exit not in get_args(OnExit):
            raise ConfigError(f"on_exit must be 'deactivate', 'warn' or 'leave'; got {on_exit!r}")
        settings = resolve_settings(
            api_key=api_key,
            base_url=base_url,
            training_project_id=training_project_id,
            reuse_from_session_id=reuse_from_session_id,
            auth_scheme=auth_scheme,
            reuse_from_run_id=reuse_from_run_id,
            team=team,
            availability_model=availability_model,
            proxy=proxy,
            allow_http=allow_http,
            request_log=request_log,
        )
        self._set_up(settings, None, on_exit, journal_settings(journal, journal_samples))
        self.budget = budget

    def _set_up(
        self, settings: Settings, local: LocalUrls | None, on_exit: OnExit, journal: JournalSettings | None = None
    ) -> None:
        self._settings = settings
        self._journal_settings = journal
        self._on_exit: OnExit = on_exit
        self._local = local
        self._session: _Session | None = None
        self._opening = asyncio.Lock()
        self._is_closed = False
        self._budget: Budget | None = None

    @classmethod
    def local(cls, *, trainer_url: str, sampler_url: str) -> ServiceClient:
        """Connect to a trainer and a sampler that already run, without a control plane and without an API key.

        The run gets its own id, so saving, loading and publishing work. Listing and downloading checkpoints work if
        the trainer's host also serves ``/v1/loops/checkpoints``, as the embedded service does.
        """
        trainer = checked_url(trainer_url, "trainer_url")
        sampler = checked_url(sampler_url, "sampler_url")
        parts = urlsplit(trainer)
        client = cls.__new__(cls)
        settings = Settings(
            base_url=f"{parts.scheme}://{parts.netloc}", api_key=None, request_log=request_log_settings(None)
        )
        client._set_up(settings, LocalUrls(trainer, sampler), "leave")  # noqa: SLF001 - an alternative constructor
        return client

    # --- opening and closing ---

    async def open(self) -> ServiceClient:
        """Create the session; does nothing if the client is already open.

        Raises:
            ConfigError: there is no such team.
            JournalError: the journal is in use, is of another service, or its session is gone.
            AuthenticationError: the API key was rejected.
            ConnectError: no server answers at `base_url`.
            ProtocolError: the server at `base_url` is not a Loops service.
        """
        async with self._opening:
            self._check_not_closed()
            if self._session is None:
                runtime = Runtime(self._settings, self._on_exit, self._new_journal())
                try:
                    if runtime.journal is not None:
                        await runtime.journal.open()
                    session = await self._create_session(runtime)
                    self._check_not_closed()
                except BaseException:
                    await runtime.close()
                    raise
                self._session = session
                runtime.transport.work.budget = self._budget
                runtime.warn_if_unclosed(repr(self))
        return self

    async def close(self) -> None:
        """End every background task and connection. Closing again does nothing.

        Runs and samplers keep running, unless `on_exit` is ``"deactivate"``.
        """
        self._is_closed = True
        if self._session is not None:
            await self._session.runtime.close()

    async def __aenter__(self) -> ServiceClient:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def session_id(self) -> str:
        """The session's id; ``"local"`` without a control plane."""
        if self._session is None:
            raise ClosedError("this client is not open yet: use `async with` or `await client.open()`")
        return self._session.id

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        return self._open_session.runtime.transport.loop

    @property
    def control_plane(self) -> ControlPlane:
        """The REST API, one method for each route."""
        return self._open_session.runtime.control_plane

    def __repr__(self) -> str:
        session = self._session.id if self._session else "-"
        state = "closed" if self._is_closed else "open" if self._session else "not open"
        return f"<ServiceClient session={session} base_url={self._settings.base_url} {state}>"

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
        sampler_num_replicas: int | None = None,
        with_sampler: bool = True,
        keep_on_failure: bool = False,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
        on_step: Callable[[StepMetrics], object] | None = None,
    ) -> TrainingClient:
        """Provision a trainer with its paired sampler, and return when the trainer is ready.

        Any number may be provisioned concurrently. A run whose provisioning fails or is cancelled is deactivated. One
        that is ready runs until it is deactivated: see `training_run` and `TrainingClient.deactivate`.

        Args:
            base_model: a Hugging Face repository id that the service supports (`get_server_capabilities`).
            rank: the LoRA rank.
            seed: makes the fresh adapter reproducible.
            timeout: seconds that one request to the trainer may take.
            ready_timeout: seconds that the trainer may take to become ready.
            wandb_config: log every optimizer step to Weights & Biases (the ``wandb`` extra), or to a run that exists.
            max_seq_len: longest example in tokens; None is the model's maximum.
            scale_down_delay_seconds: how long an unused trainer keeps running.
            replicas: data-parallel copies.
            path: ``bt://loops:<run_id>/weights/<name>`` to start from.
            name: a display name; sent only when given.
            sampler_num_replicas: copies of the paired sampler; sent only when given.
            with_sampler: False creates the trainer alone, by a route of newer services. The first call that needs the
                paired sampler creates it: publishing or sampling weights, a stream of rollouts, or `get_tokenizer`.
            keep_on_failure: do not deactivate the run when its provisioning fails or is cancelled.
            on_progress: called with each change of state, in order; see `ServiceClient` for its rules.
            on_step: called with the metrics of each optimizer step, in order, in a thread of its own, which may take
                its time; what it raises is logged. It is no longer called after the training client is closed.

        Raises:
            InputError: an argument is invalid; nothing was sent.
            BadRequestError: the service refused the request, e.g. because it does not know the model.
            LostAnswerError: the connection broke before the answer came, and no run was found; it may exist.
            ProvisioningError: the deployment failed.
            NotReadyError: it was not ready within `ready_timeout`.
        """
        rank = check_at_least(rank, 1, "rank")
        request = run_request(
            self._settings,
            self.session_id,
            base_model=base_model,
            lora_rank=rank,
            seed=seed,
            max_seq_len=max_seq_len,
            scale_down_delay_seconds=scale_down_delay_seconds,
            replicas=replicas,
            path=path,
            name=name,
            sampler_num_replicas=sampler_num_replicas,
        )
        if sampler_num_replicas is not None and not with_sampler:
            raise InputError("sampler_num_replicas", "is for the sampler that with_sampler=False leaves out")
        options = ProvisioningOptions(ready_timeout, keep_on_failure, on_progress, with_sampler)
        return await self._start_training(request, options, StepOptions(wandb_config, on_step), timeout)

    def training_run(
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
        sampler_num_replicas: int | None = None,
        with_sampler: bool = True,
        keep_on_failure: bool = False,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
        on_step: Callable[[StepMetrics], object] | None = None,
    ) -> AbstractAsyncContextManager[TrainingClient]:
        """Provision a trainer with its paired sampler for the time of one block.

        The run is deactivated when the block ends, also by an exception, a cancellation or Ctrl-C; save what you need
        before. This waits at most 30 s. If it fails, the log says so, and the end of the block raises nothing new.
        Arguments and errors are those of `create_lora_training_client`.

        Example:
            ::

                async with service.training_run("Qwen/Qwen3-0.6B", rank=16) as trainer:
                    step = await trainer.forward_backward(data, "cross_entropy")
        """
        begin = partial(
            self.create_lora_training_client,
            base_model,
            rank,
            seed,
            timeout,
            ready_timeout,
            wandb_config,
            max_seq_len=max_seq_len,
            scale_down_delay_seconds=scale_down_delay_seconds,
            replicas=replicas,
            path=path,
            name=name,
            sampler_num_replicas=sampler_num_replicas,
            with_sampler=with_sampler,
            keep_on_failure=keep_on_failure,
            on_progress=on_progress,
            on_step=on_step,
        )
        return self._scope(begin, lambda trainer: trainer.run_id)

    async def create_training_client_from_state(
        self,
        path: str,
        *,
        timeout: float = 600.0,
        ready_timeout: float = 3600.0,
        wandb_config: WandbConfig | None = None,
        keep_on_failure: bool = False,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
        on_step: Callable[[StepMetrics], object] | None = None,
    ) -> TrainingClient:
        """Provision a new run of the checkpoint's model and rank, with its weights and a fresh optimizer.

        `path` is ``bt://loops:<run_id>/weights/<name>``; the other arguments and the errors are those of
        `create_lora_training_client`.
        """
        options = ProvisioningOptions(ready_timeout, keep_on_failure, on_progress)
        steps = StepOptions(wandb_config, on_step)
        return await self._start_training(await self._state_request(path), options, steps, timeout)

    async def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        *,
        timeout: float = 600.0,
        ready_timeout: float = 3600.0,
        wandb_config: WandbConfig | None = None,
        keep_on_failure: bool = False,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
        on_step: Callable[[StepMetrics], object] | None = None,
    ) -> TrainingClient:
        """Provision a new run that continues from the checkpoint: weights, optimizer and step.

        Arguments and errors are those of `create_training_client_from_state`.
        """
        options = ProvisioningOptions(ready_timeout, keep_on_failure, on_progress)
        steps = StepOptions(wandb_config, on_step)
        request = await self._state_request(path)
        return await self._start_training(request, options, steps, timeout, with_optimizer=True)

    async def provision_run(
        self,
        request: CreateRunRequest,
        *,
        ready_timeout: float = 3600.0,
        keep_on_failure: bool = False,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
    ) -> Run:
        """Create a run and return it when its trainer is ready, without starting to train.

        To train it, use `attach_training_client`. Arguments and errors are those of `create_lora_training_client`.
        """
        options = ProvisioningOptions(ready_timeout, keep_on_failure, on_progress)

        request = check_request(request, CreateRunRequest)
        session = self._open_session

        async def provision() -> Run:
            async with session.provisioner.run(request, options) as run:
                return run

        return await session.runtime.tasks.run(
            provision(), name="provision a run", discard=lambda run: _discard(session.runtime, run.id, options)
        )

    async def wait_for_run(
        self,
        run_id: str,
        *,
        ready_timeout: float = 3600.0,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
    ) -> Run:
        """Wait until the trainer of an existing run is ready.

        The run is not deactivated when this fails or is cancelled. Errors are those of `create_lora_training_client`.
        """
        options = ProvisioningOptions(ready_timeout=ready_timeout, on_progress=on_progress)
        session = self._open_session
        waiting = session.provisioner.existing_run(run_id, options)
        return await session.runtime.tasks.run(waiting, name=f"wait for run {run_id}")

    async def attach_training_client(
        self,
        run_id: str,
        *,
        timeout: float = 600.0,
        ready_timeout: float = 3600.0,
        wandb_config: WandbConfig | None = None,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
        on_step: Callable[[StepMetrics], object] | None = None,
    ) -> TrainingClient:
        """Return a client of an existing run, which continues from the run's current weights, optimizer and step.

        Nothing is reset, not even accumulated gradients. The trainer runs this client's operations after all that it
        has accepted before, from any client; clients of one run that the same service client created share one order.
        `on_progress` is called with each change of state of the trainer, in order; the other arguments are those of
        `create_lora_training_client`.

        Raises:
            NotFoundError: there is no such run.
            ProvisioningError: its deployment has ended.
            NotReadyError: its trainer was not ready within `ready_timeout`.
        """
        timeout = check_positive(timeout, "timeout")
        steps = StepOptions(wandb_config, on_step).checked()
        run = await self.wait_for_run(run_id, ready_timeout=ready_timeout, on_progress=on_progress)
        runtime = self._open_session.runtime
        trainer = training_client(runtime, run, timeout=timeout, ready_timeout=ready_timeout, steps=steps)
        return await logging_begun(trainer)

    # --- sampling ---

    async def create_sampling_client(
        self,
        base_model: str | None = None,
        timeout: float = 300.0,
        ready_timeout: float = 3600.0,
        model_path: str | None = None,
        *,
        max_seq_len: int | None = None,
        num_replicas: int | None = None,
        shared: bool = False,
        keep_on_failure: bool = False,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
    ) -> SamplingClient:
        """Provision a standalone sampler of a base model, and return when it is ready.

        A sampler whose provisioning fails or is cancelled is deactivated if the service supports that. One that is
        ready runs until it is deactivated: see `standalone_sampler` and `SamplingClient.deactivate`.

        Args:
            base_model: a Hugging Face repository id that the service supports. It must be given; with `model_path`
                alone, the error says what to call instead.
            timeout: seconds that one sample may take, retries included.
            ready_timeout: seconds that the sampler may take to become ready.
            model_path: not supported here; see `create_sampling_client_from_checkpoint`.
            max_seq_len: most tokens of a prompt with its completion; None is the model's maximum.
            num_replicas: copies of the sampler; sent only when given.
            shared: use the sampler that an earlier call with the same arguments has created with ``shared=True``, if it
                was not deactivated; so many places of a program can ask for the same sampler, which is paid once.
            keep_on_failure: do not deactivate the sampler when its provisioning fails or is cancelled.
            on_progress: called with each change of state, in order; see `ServiceClient` for its rules.

        Raises:
            InputError: `base_model` is missing; nothing was sent.
            UnsupportedError: `model_path` was given.
            LostAnswerError: the connection broke before the answer came; the sampler may exist.
            SamplerTerminatedError: the deployment failed.
            NotReadyError: it was not ready within `ready_timeout`.
        """
        if model_path is not None:
            raise UnsupportedError(
                "create_sampling_client does not take model_path: sample a checkpoint on its run's sampler with "
                "TrainingClient.create_sampling_client(model_path), or without a run with "
                "ServiceClient.create_sampling_client_from_checkpoint(model_path)"
            )
        if base_model is None:
            raise InputError("base_model", "is needed: a Hugging Face repository id that the service supports")
        request = sampler_request(
            self._settings,
            self.session_id,
            base_model=base_model,
            max_seq_length=max_seq_len,
            num_replicas=num_replicas,
        )
        options = ProvisioningOptions(ready_timeout, keep_on_failure, on_progress)
        return await self._start_sampling(request, options, timeout, shared_as=request if shared else None)

    async def create_sampling_client_from_checkpoint(
        self,
        model_path: str,
        timeout: float = 300.0,
        ready_timeout: float = 3600.0,
        *,
        max_seq_len: int | None = None,
        num_replicas: int | None = None,
        shared: bool = False,
        keep_on_failure: bool = False,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
    ) -> SamplingClient:
        """Provision a standalone sampler of one checkpoint, and return when it is ready.

        `model_path` is ``bt://loops:<run_id>/sampler_weights/<name>``; the other arguments and errors are those of
        `create_sampling_client`.
        """
        CheckpointUri.parse(model_path, kind="sampler_weights", path="model_path")
        checkpoint = await self._checkpoint_at(model_path)
        if checkpoint.base_model is None:
            raise ProtocolError(f"the service does not say which base model checkpoint {model_path} belongs to")
        request = sampler_request(
            self._settings,
            self.session_id,
            base_model=checkpoint.base_model,
            model_path=model_path,
            max_seq_length=max_seq_len,
            num_replicas=num_replicas,
        )
        options = ProvisioningOptions(ready_timeout, keep_on_failure, on_progress)
        # The id, since another checkpoint may get the path.
        return await self._start_sampling(
            request, options, timeout, shared_as=(request, checkpoint.id) if shared else None
        )

    def standalone_sampler(
        self,
        base_model: str | None = None,
        timeout: float = 300.0,
        ready_timeout: float = 3600.0,
        *,
        model_path: str | None = None,
        max_seq_len: int | None = None,
        num_replicas: int | None = None,
        keep_on_failure: bool = False,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
    ) -> AbstractAsyncContextManager[SamplingClient]:
        """Provision a standalone sampler for the time of one block, of a base model or of a checkpoint.

        The sampler is deactivated when the block ends, as `training_run` does it with a run. Give either `base_model`
        or `model_path`, which is ``bt://loops:<run_id>/sampler_weights/<name>``; other arguments and errors are those
        of `create_sampling_client`.

        Raises:
            InputError: both or none of `base_model` and `model_path` were given; nothing was sent.

        Example:
            ::

                async with service.standalone_sampler("Qwen/Qwen3-0.6B") as sampler:
                    answer = await sampler.sample(prompt)
        """
        if (base_model is None) == (model_path is None):
            raise InputError("base_model", "give exactly one of `base_model` and `model_path`")
        begin = partial(
            self.create_sampling_client if model_path is None else self.create_sampling_client_from_checkpoint,
            str(base_model if model_path is None else model_path),
            timeout,
            ready_timeout,
            max_seq_len=max_seq_len,
            num_replicas=num_replicas,
            keep_on_failure=keep_on_failure,
            on_progress=on_progress,
        )
        return self._scope(begin, lambda sampler: sampler.sampler_id)

    async def attach_sampling_client(
        self,
        *,
        sampler_id: str | None = None,
        run_id: str | None = None,
        timeout: float = 300.0,
        ready_timeout: float = 3600.0,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
    ) -> SamplingClient:
        """Return a client of a sampler that exists, when it is ready; it samples the weights that are served.

        Args:
            sampler_id: the id of a sampler, e.g. `SamplingClient.sampler_id` in another program, or a row of
                ``loops ps``.
            run_id: the id of a run, for its paired sampler.
            timeout: seconds that one sample may take, retries included.
            ready_timeout: seconds that the sampler may take to become ready, e.g. when it was scaled to zero.
            on_progress: called with each change of state, in order; see `ServiceClient` for its rules.

        Raises:
            InputError: both or none of `sampler_id` and `run_id` were given; nothing was sent.
            NotFoundError: there is no such sampler or run.
            UnsupportedError: the run has no paired sampler.
            ClosedError: it was deactivated through this service client.
            SamplerTerminatedError: its deployment has ended.
            NotReadyError: it was not ready within `ready_timeout`.
        """
        if (sampler_id is None) == (run_id is None):
            raise InputError("sampler_id", "give exactly one of `sampler_id` and `run_id`")
        timeout = check_positive(timeout, "timeout")
        options = ProvisioningOptions(ready_timeout=ready_timeout, on_progress=on_progress)
        session = self._open_session
        session.runtime.running.check(run_id=run_id, sampler_id=sampler_id)
        found = session.provisioner.existing_sampler(options, sampler_id=sampler_id, run_id=run_id)
        sampler = await session.runtime.tasks.run(found, name="attach to a sampler")
        endpoint = Endpoint.of_sampler(
            sampler,
            service_url=self._settings.base_url,
            run_id=run_id,
            timeout=timeout,
            ready_timeout=options.ready_timeout,
        )
        return sampling_client(endpoint, runtime=session.runtime)

    async def provision_sampler(
        self,
        request: CreateSamplerRequest,
        *,
        ready_timeout: float = 3600.0,
        keep_on_failure: bool = False,
        on_progress: Callable[[ProvisioningEvent], object] | None = None,
    ) -> Sampler:
        """Create a sampler and return it when it is ready, without creating a client.

        Arguments and errors are those of `create_sampling_client`.
        """
        options = ProvisioningOptions(ready_timeout, keep_on_failure, on_progress)
        return await self._provision_sampler(request, options)

    # --- models and checkpoints ---

    async def get_server_capabilities(self) -> ServerCapabilities:
        """Return the base models that the service supports."""
        return await self.control_plane.get_capabilities()

    async def list_checkpoints(self, run_id: str) -> list[Checkpoint]:
        """Return the checkpoints of a run."""
        return await self.control_plane.list_checkpoints(run_id=run_id)

    async def list_all_checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints of all runs, oldest first.

        This makes one request for each run, 16 at once, since the service lists only those of one run or base model.
        """
        return await checkpoints_of_all_runs(self.control_plane)

    async def get_checkpoint_archive_url(
        self, checkpoint_id: str, page_size: int = 1000, page_token: int = 0
    ) -> CheckpointFilesResponse:
        """Return one page of a checkpoint's files with short-lived URLs.

        `checkpoint_id` is `Checkpoint.id`; `page_token` is an offset, the `next_page_token` of the previous page.
        """
        return await self.control_plane.get_checkpoint_files(checkpoint_id, page_size=page_size, page_token=page_token)

    async def checkpoint_files(self, checkpoint_id: str, *, page_size: int = 1000) -> AsyncIterator[CheckpointFile]:
        """Yield every file of a checkpoint with a short-lived URL, fetching pages as they are needed.

        `checkpoint_id` is `Checkpoint.id`.

        Raises:
            UnsupportedError: the store of the checkpoint has no file URLs.

        Example:
            ::

                checkpoint = (await service.list_checkpoints(trainer.run_id))[0]
                async for file in service.checkpoint_files(checkpoint.id):
                    print(file.relative_file_name, file.size_bytes)
        """
        async with aclosing(checkpoint_files(self.control_plane, checkpoint_id, page_size=page_size)) as files:
            async for file in files:
                yield file

    async def download_checkpoint(
        self,
        checkpoint_id: str,
        *,
        dest_dir: str | PathLike[str],
        on_progress: Callable[[DownloadProgress], object] | None = None,
    ) -> CheckpointDownload:
        """Download all files of a checkpoint into `dest_dir`, completely or not at all.

        Eight files are fetched at a time. They get their final names when all of them are complete. An interrupted
        download (even by SIGKILL) is resumed by the next call. Sizes are checked, and so are checksums that the file
        store reports. The API key is not sent to the file store.

        Args:
            checkpoint_id: `Checkpoint.id`.
            dest_dir: created if it does not exist. Files of the same names in it are replaced.
            on_progress: called many times a second, in order; see `ServiceClient` for its rules.

        Raises:
            ProtocolError: the listing names a file outside `dest_dir`, or the same file twice, or the size or
                checksum of a file is not the announced one.
            UnsupportedError: the store of the checkpoint has no file URLs.
            OSError: the disk is full, or `dest_dir` is not writable.
        """
        return await download(self._open_session.runtime, checkpoint_id, dest_dir, on_progress)

    # --- what is under way ---

    def inflight(self) -> list[InFlight]:
        """Return everything that is under way in this session, the oldest first.

        Makes no request and waits for nothing, so it answers in any thread, also when nothing else does.

        Example:
            ::

                for each in service.inflight():
                    print(each.kind, each.what, each.waiting_for, f"{each.age:.0f} s")
        """
        return inflight(self._work)

    def dump(self, file: TextIO | None = None) -> str:
        """Return what is under way as text: counts, the 50 oldest, connections, and what else may explain a delay.

        Makes no request and waits for nothing, so it answers in any thread, also when nothing else does. `dump_all`
        does it for every open client, also in a signal handler.

        Args:
            file: also write it there, e.g. ``sys.stderr``.
        """
        return dump(self._work, file)

    @property
    def usage(self) -> Usage:
        """What this session has used until now: a snapshot, from which an earlier one can be subtracted.

        Makes no request; it can also be read when the client is closed.

        Example:
            ::

                before = service.usage
                answer = await sampler.sample(prompt)
                used = service.usage - before
                print(used.completion_tokens, used.cost(loops.Prices(prompt=0.1, completion=0.4)))
        """
        return Usage() if self._session is None else self._work.usage()

    @property
    def budget(self) -> Budget | None:
        """The limits of what the session may use; None for none. Can be set at any time.

        Raises:
            InputError: what is set is no `Budget`.
        """
        return self._budget

    @budget.setter
    def budget(self, budget: Budget | None) -> None:
        if budget is not None and not isinstance(budget, Budget):
            raise InputError("budget", f"must be a Budget or None; got {type(budget).__name__}")
        self._budget = budget
        if self._session is not None:
            self._work.budget = budget

    # --- internals ---

    @property
    def _work(self) -> Work:
        """What is under way, which is nothing after the end."""
        return (self._session or self._open_session).runtime.transport.work

    @property
    def _open_session(self) -> _Session:
        self._check_not_closed()
        if self._session is None:
            raise ClosedError("this client is not open yet: use `async with` or `await client.open()`")
        return self._session

    def _check_not_closed(self) -> None:
        if self._is_closed:
            raise ClosedError("this client is closed; create a new ServiceClient")

    async def _create_session(self, runtime: Runtime) -> _Session:
        if self._local is not None:
            return _Session(runtime, LOCAL_ID, LocalProvisioner(runtime, self._local), SingleFlight(runtime.tasks))
        settings, plane = self._settings, runtime.control_plane
        team_id = None if settings.team is None else await resolve_team(plane, settings.team)

        async def create() -> str:
            return (await plane.create_session(training_project_id=settings.training_project_id, team_id=team_id)).id

        project = UNSET if settings.training_project_id is None else settings.training_project_id
        session_id = await recorded_session(runtime, CreateSessionRequest(training_project_id=project), create())
        provisioner = ServiceProvisioner(runtime, session_id, team_id)
        return _Session(runtime, session_id, provisioner, SingleFlight(runtime.tasks))

    def _new_journal(self) -> Journal | None:
        return None if self._journal_settings is None else Journal(self._journal_settings, self._settings.base_url)

    async def _state_request(self, path: str) -> CreateRunRequest:
        CheckpointUri.parse(path, kind="weights")
        checkpoint = await self._checkpoint_at(path)
        rank = checkpoint.lora_adapter_config.rank if checkpoint.lora_adapter_config else None
        if checkpoint.base_model is None or rank is None:
            raise ProtocolError(f"the service does not say the base model and rank of checkpoint {path}")
        return run_request(self._settings, self.session_id, base_model=checkpoint.base_model, lora_rank=rank, path=path)

    async def _start_training(
        self,
        request: CreateRunRequest,
        options: ProvisioningOptions,
        steps: StepOptions,
        timeout: float,
        *,
        with_optimizer: bool = False,
    ) -> TrainingClient:
        request = check_request(request, CreateRunRequest)
        timeout = check_positive(timeout, "timeout")
        steps = steps.checked()
        session = self._open_session

        async def start() -> TrainingClient:
            async with session.provisioner.run(request, options) as run:
                trainer = training_client(
                    session.runtime,
                    run,
                    lora_rank=request.lora_rank,
                    max_seq_len=request.max_seq_len,
                    timeout=timeout,
                    ready_timeout=options.ready_timeout,
                    steps=steps,
                    make_sampler=None if options.with_sampler else partial(session.provisioner.paired_sampler, run),
                )
                try:
                    await _initialize(trainer, request, with_optimizer)
                    await logging_begun(trainer)
                except BaseException:
                    await trainer.close()
                    raise
                return trainer

        async def discard(trainer: TrainingClient) -> None:
            await _discard(session.runtime, trainer.run_id, options)
            await trainer.close()

        return await session.runtime.tasks.run(start(), name="provision a run", discard=discard)

    @asynccontextmanager
    async def _scope(self, begin: Callable[[], Awaitable[C]], id_of: Callable[[C], str | None]) -> AsyncGenerator[C]:
        """Yield what `begin` creates, and deactivate it at the end of the block."""
        runtime = self._open_session.runtime
        client = await begin()

        async def end() -> None:
            await runtime.leftovers.end(id_of(client))
            await client.close()

        try:
            yield client
        finally:
            await run_to_completion(end())

    async def _checkpoint_at(self, path: str) -> Checkpoint:
        found = await self.control_plane.list_checkpoints(checkpoint_path=path)
        if not found:
            raise InputError("path", f"the service has no checkpoint {path}; list them with list_checkpoints(run_id)")
        return found[0]

    async def _start_sampling(
        self,
        request: CreateSamplerRequest,
        options: ProvisioningOptions,
        timeout: float,
        *,
        shared_as: Hashable = None,
    ) -> SamplingClient:
        timeout = check_positive(timeout, "timeout")
        request = check_request(request, CreateSamplerRequest)  # before it is a key
        make = partial(self._provision_sampler, request, options)
        sampler = Endpoint.of_sampler(
            await (make() if shared_as is None else self._shared_sampler(shared_as, make)),
            service_url=self._settings.base_url,
            timeout=timeout,
            ready_timeout=options.ready_timeout,
        )
        return sampling_client(sampler, Weights(checkpoint_path=request.model_path), self._open_session.runtime)

    async def _shared_sampler(self, key: Hashable, make: Callable[[], Coroutine[Any, Any, Sampler]]) -> Sampler:
        session = self._open_session
        made = session.shared_samplers.peek(key)
        if made is not None and session.runtime.running.is_deactivated(made.id):
            session.shared_samplers.discard(key)
        return await session.shared_samplers.get(key, make)

    async def _provision_sampler(self, request: CreateSamplerRequest, options: ProvisioningOptions) -> Sampler:
        request = check_request(request, CreateSamplerRequest)
        session = self._open_session
        provisioning = session.provisioner.sampler(request, options)
        return await session.runtime.tasks.run(
            provisioning, name="provision a sampler", discard=lambda made: _discard(session.runtime, made.id, options)
        )


class _Session(Struct, frozen=True):
    """The state of an open client."""

    runtime: Runtime
    id: str
    provisioner: Provisioner
    shared_samplers: SingleFlight[Hashable, Sampler]


async def _discard(runtime: Runtime, id_: str, options: ProvisioningOptions) -> None:
    """Deactivate what became ready in the moment in which its caller was cancelled."""
    if not options.keep_on_failure:
        await runtime.leftovers.end(id_)


async def _initialize(trainer: TrainingClient, request: CreateRunRequest, with_optimizer: bool) -> None:
    await (await trainer.init_trainer_server(request.lora_rank)).result()
    # It is not specified whether the initialization keeps the weights of a run that was created with a path.
    if request.path is not None:
        load = trainer.load_state_with_optimizer if with_optimizer else trainer.load_state
        await (await load(request.path)).result()

"""Training: the operations of one run's trainer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar
from uuid import uuid4

from msgspec.structs import replace

from ._arguments import check_at_least, check_config, check_kind, checked_data, checked_examples, listed
from ._checkpoints.download import download
from ._copies import SameWhenCopied
from ._http.endpoint import Endpoint
from ._http.retry import READ, retry
from ._operations.batch import Batch
from ._operations.future import OperationFuture
from ._operations.operation import SmallBody, SmallOperation
from ._operations.submitter import Submitter
from ._other_names import KnowsOtherNames
from ._sampling.adaptive import Adaptive
from ._sampling.limiter import Limiter
from ._sampling.tokenizer import load_tokenizer
from ._session.deactivation import deactivate_run
from ._session.paired_sampler import MakeSampler, PairedSampler
from ._session.readiness import health_request
from ._session.runtime import Runtime
from ._training.custom_loss import SURROGATE, SURROGATE_CONFIG, CustomLossBatch, check_custom_loss, without_own_inputs
from ._training.own_metrics import OwnMetricsSender
from ._training.step_log import StepLog, StepOptions
from .errors import ApiError, ClosedError, InputError, UnfinishedSubmission, UnsupportedError
from .protocol import (
    MAX_TOP_K_LOGPROBS,
    CheckpointUri,
    ForwardBody,
    InitTrainerServerBody,
    LoadStateBody,
    OptimStepBody,
    PolicyVersion,
    SaveStateBody,
    SaveWeightsForSamplerBody,
    check_checkpoint_name,
)
from .sampling import SamplingClient, Weights, sampling_client
from .types import (
    AdamParams,
    Checkpoint,
    CheckpointDownload,
    CheckpointFilesResponse,
    CustomLossFn,
    Datum,
    DownloadProgress,
    ForwardBackwardOutput,
    GetInfoResponse,
    InitTrainerServerResponse,
    LoadWeightsResponse,
    LocalDeployment,
    LossFnType,
    ModelData,
    OptimStepResponse,
    Run,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    ServerlessDeployment,
    StepResult,
)

if TYPE_CHECKING:
    from ._rollouts.context import Rollout
    from ._rollouts.executor import Executor
    from ._rollouts.failures import FailurePolicy
    from ._rollouts.options import Advantages
    from ._rollouts.policy import Policy
    from ._rollouts.state import RolloutState
    from ._rollouts.stream import RolloutStream

__all__ = ["ForwardBackwardFuture", "TrainingClient"]

T = TypeVar("T")

FROZEN_SECONDS: Final = 24 * 3600
"""How long weights are kept that were saved to evaluate them."""

ForwardBackwardFuture: TypeAlias = OperationFuture[ForwardBackwardOutput]


class TrainingClient(SameWhenCopied, KnowsOtherNames):
    """Trains one run. Created by `ServiceClient.create_lora_training_client` or `ServiceClient.attach_training_client`.

    Operations are submitted in the order of the calls. A call returns a future as soon as the trainer has accepted
    the operation; waiting for the result is a separate step. A call with invalid arguments, or that is cancelled
    before it was sent, takes no turn. Many operations may be in flight, and waited for in any order.

    Example:
        ::

            step = await trainer.forward_backward(data, "cross_entropy")
            optim = await trainer.optim_step(loops.AdamParams(learning_rate=4e-5))
            loss = (await step).loss
            await optim
    """

    def __init__(self) -> None:
        raise TypeError("a training client is created by a ServiceClient")

    def _set_up(
        self,
        runtime: Runtime,
        run: Run,
        endpoint: Endpoint,
        *,
        lora_rank: int | None,
        max_seq_len: int | None,
        steps: StepOptions,
        make_sampler: MakeSampler | None,
    ) -> None:
        self._runtime = runtime
        self._run = run
        self._lora_rank = lora_rank
        self._max_seq_len = max_seq_len
        self._endpoint = endpoint
        self._paired = PairedSampler(runtime, run, make_sampler, ready_timeout=endpoint.ready_timeout)
        self._is_closed = False
        self._submitter = Submitter(
            self._endpoint,
            runtime.turns(run.id),
            transport=runtime.transport,
            tasks=runtime.tasks,
            journal=runtime.journal,
        )
        about = {"run_id": run.id, "base_model": run.base_model, "lora_rank": lora_rank}
        self._log = StepLog(steps, run.id, about, runtime.tasks, OwnMetricsSender(endpoint, runtime))
        self._heartbeat_name = f"the trainer of run {run.id}"
        transport, request, running = runtime.transport, health_request(endpoint), runtime.running

        async def ping() -> None:
            if not running.is_deactivated(run.id):
                await transport.ask(request)

        runtime.heartbeat.add(self._heartbeat_name, self, ping)

    # --- properties that need no request ---

    @property
    def run_id(self) -> str:
        """The id of the run that is trained."""
        return self._run.id

    @property
    def run(self) -> Run:
        """The run as the service described it when this client was created."""
        return self._run

    @property
    def wandb_run(self) -> Any:
        """The run that the steps are logged to, to log more to it; None without a `WandbConfig`.

        It is `WandbConfig.run`, or the run of Weights & Biases that was begun for this client; None if it could not be
        begun. Numbers of a step belong into its row: give them to `log`, since a tracker drops what comes for a step
        that it has seen.
        """
        return self._log.run

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Add metrics of your own to those of the next `optim_step` or `step` that is submitted.

        They go where the metrics of steps go: to `WandbConfig`, to `on_step`, and, the numbers among them, to the
        dashboard of the embedded service (`ServerCapabilities.metrics`); without these, nowhere. If several calls give
        the same name, the last one counts. Names of the library, e.g. ``loss`` and ``step``, keep its numbers.

        Args:
            metrics: numbers, or what your tracker takes, by name.

        Raises:
            InputError: `metrics` is not a mapping with text as names.

        Example:
            ::

                trainer.log({"reward": 0.5})
                await trainer.optim_step(loops.AdamParams(learning_rate=4e-5))
        """
        if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
            raise InputError("metrics", "must be a mapping whose names are text")
        self._log.own(metrics)

    def get_info(self) -> GetInfoResponse:
        """Return the run's model, and its LoRA rank and longest sequence if they are known."""
        name = self._run.base_model
        return GetInfoResponse(
            model_data=ModelData(model_name=name, tokenizer_id=name),
            model_name=name,
            lora_rank=self._lora_rank,
            max_seq_len=self._max_seq_len,
        )

    # --- training ---

    async def forward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFnType = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        top_k_logprobs: int = 0,
    ) -> ForwardBackwardFuture:
        """Compute the loss and the logprobs, without changing the gradients.

        Arguments and errors are those of `forward_backward`.
        """
        return await self._forward("forward", data, loss_fn, loss_fn_config, top_k_logprobs)

    async def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFnType = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        top_k_logprobs: int = 0,
        resume: UnfinishedSubmission | None = None,
    ) -> ForwardBackwardFuture:
        """Compute the loss and add its gradients to the accumulated ones.

        Losses are summed over tokens; `optim_step` divides by the number of tokens, unless the loss sets
        ``skip_token_normalization``. Several calls before one `optim_step` equal one call with all their data. A
        batch over 24 MiB of JSON is split, in order, and the results of its parts are merged.

        Args:
            data: the examples, whose ``loss_fn_inputs`` are the inputs of the loss; N is an example's number of
                positions. Inputs that the loss does not read are refused, except a ``mask`` (N,) for the drift
                metrics, which is not sent, and is refused where the loss counts a position that it masks.
            loss_fn: ``cross_entropy`` reads ``target_tokens`` of shape (N,) or (N, K) and ``weights`` of the same
                shape, both optional. ``importance_sampling``, ``ppo``, ``cispo``, ``dro`` and ``dppo`` need the
                sampler's ``logprobs`` (N,) in nats and ``advantages`` (N,) or (1,); ``target_tokens`` (N,) are
                optional. ``dpo`` takes pairs, chosen then rejected, and needs ``target_tokens`` (N,) and
                ``ref_logprobs`` (N,) in nats; ``weights`` (N,) are optional. Without ``target_tokens`` the targets
                are the input, shifted by one; without ``weights`` every target has weight 1, except -100, which is
                not scored.
            loss_fn_config: settings of the loss, e.g. ``{"clip_low_threshold": 0.8}`` for ``ppo``. Every loss has
                ``skip_token_normalization``, False by default, which the trainer must confirm; and, with the embedded
                service alone, ``score_all_targets``: logprobs are real numbers also where an advantage is zero, for KL
                metrics, instead of 0.0.
            top_k_logprobs: how many candidates to list at each active position, 0 to 20.
            resume: `LoopsError.unfinished` of the call that this one repeats, with the same arguments, when other
                operations were sent after it; no part of it is then trained twice.

        Raises:
            InputError: an argument is invalid; nothing was sent and no turn was taken.
            ApiError: the trainer refused the request.
            ServerShutdownError: the trainer is shutting down.
            TransportError: the trainer did not answer for more than a minute.
            UnsupportedError: raised by the future: the trainer does not know ``skip_token_normalization`` for this
                loss, so it has added gradients that `optim_step` divides.
        """
        step = await self._forward("forward_backward", data, loss_fn, loss_fn_config, top_k_logprobs, resume)
        self._log.add_pass(step, len(data))
        return step

    async def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLossFn, *, loss_type_input: Literal["logprobs"] = "logprobs"
    ) -> ForwardBackwardFuture:
        """Add the gradients of your own loss function, written in torch (the ``torch`` extra).

        The trainer scores the targets, `loss_fn` and its backward pass run in a worker thread of this process, and
        the trainer replays the gradients. All of this is one operation in the order of the calls: later calls wait.
        It returns when the trainer has accepted the replay.

        The gradients are those of `loss_fn`, not divided by the number of tokens, so one `optim_step` cannot combine
        them with those of `forward_backward`, unless that sets ``skip_token_normalization``.

        Args:
            data: the examples, with ``target_tokens`` of shape (N,) or (N, K) and optional ``weights``. They may have
                other inputs, e.g. advantages, in any shape: these are for `loss_fn` and are not sent.
            loss_fn: called with the datums of `data` and a list with one float32 tensor per example, which has the
                shape of the targets and holds their logprobs in nats, 0.0 where the target is masked. It returns a
                scalar tensor and a dict of metrics. It must not wait for operations of this client, since they wait
                for it.
            loss_type_input: the input of `loss_fn`; only ``"logprobs"`` is supported.

        Returns:
            The future of the replay. Its result has the loss of `loss_fn`, and the metrics of the trainer and of
            `loss_fn`; where both have the same name, that of `loss_fn` counts.

        Raises:
            InputError: an argument is invalid, or `loss_fn` returned something invalid.
            ImportError: torch is not installed.
            UnsupportedError: the trainer does not support ``skip_token_normalization``.
            RemoteOpError: the trainer could not score the targets.

        Example:
            ::

                def push_apart(data, logprobs):
                    margin = logprobs[0].sum() - logprobs[1].sum()
                    return torch.nn.functional.softplus(-margin), {"margin": margin.item()}

                step = await trainer.forward_backward_custom(pair, push_apart)
        """
        self._check_open()
        given = listed(data)
        scored = list(
            checked_examples([without_own_inputs(datum) for datum in given], SURROGATE, max_seq_len=self._max_seq_len)
        )
        check_custom_loss(scored, loss_fn, loss_type_input)
        body = self._forward_body(SURROGATE, SURROGATE_CONFIG)
        step = await self._submitter.submit(CustomLossBatch(given, scored, loss_fn, body, self._submitter))
        self._log.add_pass(step, len(given))
        return step

    async def optim_step(
        self, adam_params: AdamParams, *, resume: UnfinishedSubmission | None = None
    ) -> OperationFuture[OptimStepResponse]:
        """Apply Adam to the accumulated gradients and clear them; the policy version increases by one.

        Args:
            adam_params: the settings of Adam.
            resume: as in `forward_backward`.
        """
        adam_params = check_kind(adam_params, AdamParams, "adam_params")
        body = OptimStepBody(adam_params=adam_params)
        with self._log.next_step() as own:
            step = await self._submit("optim_step", OptimStepResponse, body, resume)
            self._log.add_step(step, own)
        return step

    async def init_trainer_server(self, lora_rank: int) -> OperationFuture[InitTrainerServerResponse]:
        """Start again with a new adapter of this rank; unsaved training is lost."""
        lora_rank = check_at_least(lora_rank, 1, "lora_rank")
        body = InitTrainerServerBody(lora_rank=lora_rank, base_model=self._run.base_model)
        return await self._submit("init_trainer_server", InitTrainerServerResponse, body)

    async def step(
        self,
        data: Sequence[Datum],
        loss_fn: LossFnType,
        adam_params: AdamParams,
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> OperationFuture[StepResult]:
        """Do one training step: `forward_backward` and `optim_step` in one go, with no other operation in between.

        Args:
            data: the examples, as in `forward_backward`.
            loss_fn: the loss, as there.
            adam_params: the settings of Adam.
            loss_fn_config: settings of the loss.

        Returns:
            The future of both results; it raises the error of the first that failed. The optimizer steps even if the
            pass fails after the trainer has accepted it, with the gradients that there are.

        Raises:
            InputError: an argument is invalid; nothing was sent and no turn was taken.
            LoopsError: the errors of `forward_backward`. Where the pass was accepted and only `optim_step` failed,
                a note on the error says so.
        """
        self._check_open()
        adam_params = check_kind(adam_params, AdamParams, "adam_params")
        batch = self._forward_batch("forward_backward", data, loss_fn, loss_fn_config)
        optim_step = self._small_operation("optim_step", OptimStepResponse, OptimStepBody(adam_params=adam_params))
        with self._log.next_step() as own:
            passed, stepped = await self._submitter.submit_pair(batch, optim_step)
            self._log.add_pass(passed, len(data))
            self._log.add_step(stepped, own)

        async def collect() -> StepResult:
            await passed.settled()
            await stepped.settled()  # also where the pass has failed: an error that is not seen is logged
            return StepResult(forward_backward=await passed, optim=await stepped)

        return OperationFuture(
            collect,
            tasks=self._runtime.tasks,
            operation="step",
            operation_id=passed.operation_id,
            run_id=self.run_id,
        )

    # --- rollouts ---

    def rollouts(
        self,
        rollout: Rollout,
        tasks: Iterable[Any] | AsyncIterable[Any],
        *,
        group_size: int,
        groups_per_step: int,
        max_staleness: int = 1,
        run_ahead: int | None = None,
        minibatches: int = 1,
        unit: Literal["episode", "group"] = "episode",
        advantages: Advantages = "centered",
        keep_constant_groups: bool = False,
        mask_truncated: bool = False,
        limit: int | Adaptive | Limiter = 256,
        on_failure: FailurePolicy | None = None,
        episode_timeout: float | None = None,
        max_episode_tokens: int | None = None,
        executor: Executor | None = None,
        drop_last: bool = False,
        seed: int | None = None,
        name: str = "policy",
        state: RolloutState | None = None,
        agents: Mapping[str, Any] | None = None,
    ) -> RolloutStream:
        """Roll out tasks beside training: return a stream of batches to train on.

        Each task becomes a group of `group_size` episodes, whose rewards are compared with each other. A group begins
        when the bound on its age allows it, and continues while earlier ones are trained. `RolloutStream` has an
        example.

        Each rollout is a task on the event loop, which it must not hold: what computes for more than a few
        milliseconds, or blocks, goes through `RolloutContext.run`. A rollout that is no longer needed is cancelled.

        Args:
            rollout: called with a `RolloutContext` and a task; returns an `Episode` with a reward, or None to leave it
                out; or the reward, if it used `RolloutContext.openai`. Its exceptions are those of `on_failure`.
            tasks: read one by one, as groups begin, so it may be endless. To resume, it must yield the same tasks in
                the same order.
            group_size: episodes of each task.
            groups_per_step: groups of each training step.
            max_staleness: a group may be trained this many steps after those whose weights were published when it
                began. It is never discarded: rollouts and batches wait instead. 0: exactly on-policy.
            run_ahead: how many steps rollouts may begin ahead of the published weights, `max_staleness` when None and
                never more. So `run_ahead` sets the usual staleness, and `max_staleness` that of the slowest groups:
                with a long tail, 2 and 8 keep the trainer busier than 2 and 2.
            minibatches: hand out each step in this many batches, which come earlier: call `forward_backward` on each,
                `optim_step` and `publish` with that for which `RolloutBatch.is_last_of_step` is True.
            unit: ``"group"``: `rollout` is called once for each task, and returns a list of `group_size` episodes, of
                which some may be None.
            advantages: how rewards become advantages, as `group_advantages` does it, or a function of the list of
                rewards.
            keep_constant_groups: also train groups in which every advantage is 0; otherwise they are dropped.
            mask_truncated: advantage 0 for episodes that ended because they were too long; their rewards are still
                part of the others' baseline.
            limit: the most sequences in flight. A `Limiter` may be shared; an `Adaptive` limit follows the capacity of
                the sampler.
            on_failure: which failures are tolerated; `FailurePolicy()` when None.
            episode_timeout: the longest time of one attempt at an episode in seconds, in which it also waits for its
                turn in `limit`; None has no limit, since slow is not stuck.
            max_episode_tokens: the longest episode; None is the longest sequence of the run. Answers end there, and
                what was observed beyond it is left out.
            executor: where `RolloutContext.run` calls functions, e.g. a `ProcessExecutor`; worker threads when None.
            drop_last: leave out the last step if there are too few groups for it. Which step that is shows only at the
                end, so the `minibatches` of a step then come once all its groups have finished.
            seed: makes sampling repeatable, as far as the order in which weights are published allows.
            name: publish under ``sampler_weights/<name>``.
            state: continue where `RolloutStream.save` was called.
            agents: serve `RolloutContext.openai`, so that rollouts may be programs that speak OpenAI's or Anthropic's
                API: keyword arguments of `AgentGateway`, e.g. ``{}``. `max_context` is `max_episode_tokens` unless
                given.

        Raises:
            InputError: an argument is invalid.
            ConfigError: the same, for `agents`.
            UnsupportedError: the run has no paired sampler.
            ClosedError: this client is closed.
        """
        from ._rollouts.failures import FailurePolicy
        from ._rollouts.options import Options
        from ._rollouts.recorded import RecordedBatches
        from ._rollouts.stream import RolloutStream

        self._check_open()
        options = Options(
            group_size=group_size,
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            run_ahead=run_ahead,
            minibatches=minibatches,
            unit=unit,
            advantages=advantages,
            keep_constant_groups=keep_constant_groups,
            mask_truncated=mask_truncated,
            on_failure=FailurePolicy() if on_failure is None else on_failure,
            episode_timeout=episode_timeout,
            max_episode_tokens=max_episode_tokens,
            drop_last=drop_last,
            seed=seed,
            name=name,
        )
        journal = self._runtime.journal
        return RolloutStream(
            self._policies(),
            rollout,
            tasks,
            options,
            limit=limit,
            executor=executor,
            state=state,
            agents=agents,
            recorded=None if journal is None else RecordedBatches(journal, self.run_id),
        )

    # --- saving and loading ---

    async def save_state(self, name: str, ttl_seconds: int | None = None) -> OperationFuture[SaveWeightsResponse]:
        """Save weights, optimizer and step under ``weights/<name>``, to resume training from.

        Args:
            name: one path segment; a checkpoint of the same name is replaced.
            ttl_seconds: delete the checkpoint after this many seconds; None keeps it.
        """
        body = SaveStateBody(name=check_checkpoint_name(name), ttl_seconds=_checked_ttl(ttl_seconds))
        return await self._submit("save_state", SaveWeightsResponse, body)

    async def save_weights_for_sampler(
        self, name: str, *, ttl_seconds: int | None = None, publish: bool = True
    ) -> OperationFuture[SaveWeightsForSamplerResponse]:
        """Save the adapter under ``sampler_weights/<name>`` and publish it to the paired sampler.

        Args:
            name: one path segment; a checkpoint of the same name is replaced.
            ttl_seconds: delete the checkpoint after this many seconds; only with ``publish=False``.
            publish: False only saves: the sampler continues to serve its current weights.
        """
        body = SaveWeightsForSamplerBody(name=check_checkpoint_name(name), bump_version=publish)
        if publish and ttl_seconds is not None:
            raise InputError("ttl_seconds", "needs publish=False: published weights cannot expire")
        if not publish:
            body.ttl_seconds = _checked_ttl(ttl_seconds)
        return await self._submit("save_weights_for_sampler", SaveWeightsForSamplerResponse, body)

    async def save_weights_and_get_sampling_client(self, name: str = "default") -> SamplingClient:
        """Publish the current weights and return a client that never samples older ones.

        Returns when the paired sampler serves them. The client also samples later versions; for one that always
        samples exactly these weights, use `snapshot`. A serverless sampler has no current version: there, the client
        samples exactly these weights, saved under `name` with a unique suffix.

        Raises:
            NotReadyError: the sampler did not become ready, or did not load the weights within 600 s.
        """
        return (await (await self._policies().publish(name))).sampler

    async def snapshot(self, *, ttl_seconds: int | None = None) -> SamplingClient:
        """Save the current weights and return a client that samples exactly these, whatever is trained or saved later.

        Returns when they are saved. They get a name of their own, which `SamplingClient.checkpoint_name` tells, and are
        not published: the paired sampler continues to serve its current weights to all others.

        Args:
            ttl_seconds: delete them after this many seconds; None keeps them. Each snapshot is a checkpoint, which
                takes space, so give a time where each step makes one.

        Raises:
            UnsupportedError: the run has no paired sampler.

        Example:
            ::

                reference = await trainer.snapshot()  # of DPO: stays as it is while the trainer trains
                before = await trainer.snapshot(ttl_seconds=24 * 3600)
        """
        return (await (await self._policies().freeze("snapshot", ttl_seconds=ttl_seconds))).sampler

    async def load_state(self, path: str) -> OperationFuture[LoadWeightsResponse]:
        """Load weights, with a fresh optimizer and step 0.

        Args:
            path: ``bt://loops:<run_id>/weights/<name>``, or a path that the trainer can read (``s3://``,
                ``file://`` or a directory).
        """
        return await self._load("load_state", path)

    async def load_state_with_optimizer(self, path: str) -> OperationFuture[LoadWeightsResponse]:
        """Load weights, the optimizer's moments and the step; `path` as in `load_state`."""
        return await self._load("load_state_with_optimizer", path)

    # --- sampling ---

    async def create_sampling_client(self, model_path: str, *, min_policy_version: int | None = None) -> SamplingClient:
        """Return a client that samples exactly one checkpoint on the paired sampler.

        The embedded service keeps its files for this client also when another checkpoint is saved under its name. On
        the hosted service the client then samples the new one, so save under a name that is not used again, as
        `snapshot` does.

        Args:
            model_path: ``bt://loops:<run_id>/sampler_weights/<name>``.
            min_policy_version: sample the checkpoint until the sampler serves this version of the trainer's
                weights, and the served weights from then on; None always samples the checkpoint.

        Raises:
            InputError: `model_path` is not such a URI.
            BadRequestError: the service has no such checkpoint, or cannot load it on this sampler.
        """
        CheckpointUri.parse(model_path, kind="sampler_weights", path="model_path")
        sampler = await self._sampler().get()
        if min_policy_version is not None:
            min_policy_version = check_at_least(min_policy_version, 1, "min_policy_version")
            if isinstance(sampler.deployment, ServerlessDeployment):
                raise InputError("min_policy_version", "a serverless sampler serves checkpoints, not versions")
        checkpoint_id = None
        if not isinstance(sampler.deployment, LocalDeployment):  # that has no control plane to validate with
            checkpoint_id = await self._runtime.control_plane.validate_checkpoint(model_path)
        weights = Weights(
            checkpoint_path=model_path, checkpoint_id=checkpoint_id, min_policy_version=min_policy_version
        )
        return sampling_client(sampler, weights, self._runtime)

    # --- checkpoints ---

    async def list_checkpoints(self) -> list[Checkpoint]:
        """Return the run's checkpoints."""
        return await self._runtime.control_plane.list_checkpoints(run_id=self.run_id)

    async def get_checkpoint_archive_url(
        self, checkpoint_id: str, page_size: int = 1000, page_token: int = 0
    ) -> CheckpointFilesResponse:
        """Return one page of a checkpoint's files with short-lived URLs; `page_token` is an offset."""
        return await self._runtime.control_plane.get_checkpoint_files(
            checkpoint_id, page_size=page_size, page_token=page_token
        )

    async def download_checkpoint(
        self,
        checkpoint_id: str,
        *,
        dest_dir: str | PathLike[str],
        on_progress: Callable[[DownloadProgress], object] | None = None,
    ) -> CheckpointDownload:
        """Download all files of a checkpoint; see `ServiceClient.download_checkpoint`."""
        return await download(self._runtime, checkpoint_id, dest_dir, on_progress)

    # --- the trainer itself ---

    async def health(self) -> None:
        """Return if the trainer answers that it is healthy; otherwise raise the error of its answer."""
        self._check_running()
        await self._runtime.transport.ask(health_request(self._endpoint))

    async def policy_version(self) -> int:
        """The number of optimizer steps that the trainer has applied; every use makes one request.

        Raises:
            UnsupportedError: this trainer does not report it.
        """
        self._check_running()
        request = self._endpoint.request("GET", "/policy_version", f"get the policy version of run {self.run_id}")
        transport = self._runtime.transport
        try:
            with transport.work.within("request", request.what, run_id=self.run_id):
                answer = await retry(
                    lambda: transport.fetch(request, PolicyVersion),
                    READ,
                    what="the policy version is not known yet",
                    budget=transport.retry_budget,
                )
        except ApiError as error:
            if error.status == 501:
                raise UnsupportedError(f"{error}. This trainer does not report its policy version.") from error
            raise
        return answer.policy_version or 0

    async def get_tokenizer(self) -> Any:
        """Return the Hugging Face tokenizer of the base model; needs transformers."""
        return await load_tokenizer(self._runtime, await self._sampler().get())

    async def deactivate(self) -> None:
        """Deactivate the run with its paired sampler, and close this client; training that is not saved is lost.

        Its checkpoints remain. Every client of the run and of its sampler can then do no more. Repeating the call is
        harmless. See `ServiceClient.training_run` for a block that does this at its end.

        Raises:
            UnsupportedError: the run has no control plane (`ServiceClient.local`), or the service has no such route.
        """
        if isinstance(self._endpoint.deployment, LocalDeployment):
            raise UnsupportedError(f"run {self.run_id} has no control plane, so it cannot be deactivated here")
        if not self._runtime.running.is_deactivated(self.run_id):
            await deactivate_run(self._runtime.control_plane, self._run)
            # A service without the route knows only the deployment.
            self._runtime.running.deactivated(self.run_id, "run")
        await self.close()

    async def close(self) -> None:
        """Stop the trainer's heartbeat and the logging. Operations in flight can still be waited for.

        The run keeps running; see `deactivate`.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._runtime.heartbeat.remove(self._heartbeat_name, self)
        await self._log.close()

    async def __aenter__(self) -> TrainingClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        rank = "" if self._lora_rank is None else f" rank={self._lora_rank}"
        return f"<TrainingClient run={self.run_id} base_model={self._run.base_model}{rank}>"

    # --- operations ---

    async def _forward(
        self,
        operation: str,
        data: Any,
        loss_fn: Any,
        loss_fn_config: Any,
        top_k_logprobs: int,
        resume: UnfinishedSubmission | None = None,
    ) -> ForwardBackwardFuture:
        self._check_open()
        top_k_logprobs = check_at_least(top_k_logprobs, 0, "top_k_logprobs")
        if top_k_logprobs > MAX_TOP_K_LOGPROBS:
            raise InputError("top_k_logprobs", f"must be at most {MAX_TOP_K_LOGPROBS}; got {top_k_logprobs}")
        batch = self._forward_batch(operation, data, loss_fn, loss_fn_config, top_k_logprobs)
        return await self._submitter.submit(batch, resume=resume)

    def _forward_batch(
        self, operation: str, data: Any, loss_fn: Any, loss_fn_config: Any, top_k_logprobs: int = 0
    ) -> Batch:
        config = check_config(loss_fn, loss_fn_config)
        checked = checked_data(data, loss_fn, max_seq_len=self._max_seq_len)
        return Batch(operation, checked, self._forward_body(loss_fn, config, top_k_logprobs))

    def _forward_body(self, loss_fn: str, config: Mapping[str, Any] | None, top_k_logprobs: int = 0) -> ForwardBody:
        """Return the body of a forward pass, without its datums."""
        return ForwardBody(
            data=[],
            loss_fn=loss_fn,
            loss_fn_config=None if config is None else dict(config),
            run_id=self.run_id,
            top_k_logprobs=top_k_logprobs,
            model=self._run.base_model,
        )

    async def _load(self, operation: str, path: str) -> OperationFuture[LoadWeightsResponse]:
        if not isinstance(path, str) or not path.strip():
            raise InputError("path", f"must be a bt:// URI or a path that the trainer can read; got {path!r}")
        if path.startswith("bt:"):
            CheckpointUri.parse(path, kind="weights")
        return await self._submit(operation, LoadWeightsResponse, LoadStateBody(path=path))

    async def _submit(
        self, operation: str, result: type[T], body: SmallBody, resume: UnfinishedSubmission | None = None
    ) -> OperationFuture[T]:
        """Submit an operation with a small body."""
        self._check_open()
        return await self._submitter.submit(self._small_operation(operation, result, body), resume=resume)

    def _small_operation(self, operation: str, result: type[T], body: SmallBody) -> SmallOperation[T]:
        return SmallOperation(operation, result, replace(body, run_id=self.run_id, model=self._run.base_model))

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        return self._runtime.transport.loop

    def _check_open(self) -> None:
        self._check_running()
        if self._is_closed:
            raise ClosedError(f"this training client of run {self.run_id} is closed")

    def _check_running(self) -> None:
        self._runtime.running.check(run_id=self.run_id)

    def _policies(self) -> _Policies:
        return _Policies(self, self._sampler(), self._runtime, self._max_seq_len)

    def _sampler(self) -> PairedSampler:
        self._check_running()
        self._paired.check()
        return self._paired


class _Policies:
    """The policies of a training client: its weights, as they are sampled. A stream's `_rollouts.policy.Trainer`."""

    def __init__(
        self, client: TrainingClient, sampler: PairedSampler, runtime: Runtime, max_seq_len: int | None
    ) -> None:
        self._client = client
        self._sampler = sampler
        self._runtime = runtime
        self._max_seq_len = max_seq_len

    @property
    def run_id(self) -> str:
        return self._client.run_id

    def log(self, metrics: Mapping[str, float]) -> None:
        self._client.log(metrics)

    async def max_seq_len(self) -> int | None:
        if self._max_seq_len is None and not self._is_deployed_as(LocalDeployment):
            self._max_seq_len = await self._longest_of_model()
        return self._max_seq_len

    async def publish(self, name: str) -> Awaitable[Policy[SamplingClient]]:
        if self._sampler.known is not None and not self._is_deployed_as(ServerlessDeployment):
            return self._served(await self._client.save_weights_for_sampler(name))
        # A serverless sampler has no current version: each has a checkpoint of its own. So may be one to be created.
        unique = self._unique(name)
        return self._published(unique, await self._client.save_weights_for_sampler(unique))

    async def freeze(self, name: str, *, ttl_seconds: int | None = FROZEN_SECONDS) -> Awaitable[Policy[SamplingClient]]:
        # Unique, since what samples an earlier one may still run.
        unique = self._unique(name)
        saving = await self._client.save_weights_for_sampler(unique, publish=False, ttl_seconds=ttl_seconds)
        return self._exact(unique, saving)

    async def save_state(self, name: str) -> Awaitable[str]:
        return self._path(await self._client.save_state(name))

    def _unique(self, name: str) -> str:
        """Return a name that no other checkpoint has; with a journal, the same when the program is started again."""
        name, journal = check_checkpoint_name(name), self._runtime.journal
        return f"{name}-{uuid4().hex}" if journal is None else journal.unique(name)

    def _is_deployed_as(self, kind: type[LocalDeployment | ServerlessDeployment]) -> bool:
        return self._sampler.known is not None and isinstance(self._sampler.known.deployment, kind)

    async def _published(
        self, name: str, saving: OperationFuture[SaveWeightsForSamplerResponse]
    ) -> Policy[SamplingClient]:
        await self._sampler.get()
        return await (self._exact(name, saving) if self._is_deployed_as(ServerlessDeployment) else self._served(saving))

    async def _served(self, saving: OperationFuture[SaveWeightsForSamplerResponse]) -> Policy[SamplingClient]:
        saved = await saving
        # Version 0 is the base model: nothing was trained, so there is nothing to wait for.
        weights = Weights(min_policy_version=saved.version or None)
        sampler = sampling_client(await self._sampler.get(), weights, self._runtime)
        if saved.version:
            await sampler.wait_for_version(saved.version)
        return _policy(sampler, saved.version)

    async def _exact(self, name: str, saving: OperationFuture[SaveWeightsForSamplerResponse]) -> Policy[SamplingClient]:
        saved = await saving
        prefix = f"bt://loops:{self.run_id}/sampler_weights/"
        # The service may have chosen another name, or return the location of the files instead of the URI.
        path = saved.path if saved.path.startswith(prefix) else prefix + name
        sampler = sampling_client(await self._sampler.get(), Weights(checkpoint_path=path), self._runtime)
        return _policy(sampler, saved.version)

    async def _path(self, saving: OperationFuture[SaveWeightsResponse]) -> str:
        return (await saving).path

    async def _longest_of_model(self) -> int | None:
        """Return the longest sequence of the base model, which is that of a run that was created without one."""
        name = self._client.run.base_model
        try:
            capabilities = await self._runtime.control_plane.get_capabilities(model=name)
        except ApiError:  # it only helps to end episodes in time
            return None
        model = next((each for each in capabilities.supported_models if each.model_name == name), None)
        if model is None:
            return None
        known = (model.max_enabled_seq_len, model.max_seq_len, model.max_context_length)
        return min((length for length in known if length is not None), default=None)


def _policy(sampler: SamplingClient, version: int) -> Policy[SamplingClient]:
    from ._rollouts.policy import Policy

    return Policy(sampler, version)


def training_client(
    runtime: Runtime,
    run: Run,
    *,
    timeout: float,
    ready_timeout: float,
    lora_rank: int | None = None,
    max_seq_len: int | None = None,
    steps: StepOptions,
    make_sampler: MakeSampler | None = None,
) -> TrainingClient:
    """Return a client of a run whose trainer is ready; `make_sampler` creates the sampler that the run lacks."""
    endpoint = Endpoint.of_run(run, timeout=timeout, ready_timeout=ready_timeout)
    client = TrainingClient.__new__(TrainingClient)
    client._set_up(  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - our constructor
        runtime,
        run,
        endpoint,
        lora_rank=lora_rank,
        max_seq_len=max_seq_len,
        steps=steps,
        make_sampler=make_sampler,
    )
    return client


async def logging_begun(client: TrainingClient) -> TrainingClient:
    """Return the client when the run that its steps are logged to has begun, so that `wandb_run` is there."""
    try:
        await client._log.begun()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - a part of its construction
    except BaseException:
        await client.close()
        raise
    return client


def _checked_ttl(ttl_seconds: int | None) -> int | None:
    return None if ttl_seconds is None else check_at_least(ttl_seconds, 1, "ttl_seconds")

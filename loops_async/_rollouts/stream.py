"""The stream of rollouts: groups are rolled out beside training, within the bound of their age, and handed out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Iterable, Mapping
from types import TracebackType
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from .._agents.gateway import AgentGateway, check_gateway_options
from .._arguments import check_at_least
from .._operations.future import OperationFuture
from .._sampling.adaptive import Adaptive
from .._sampling.limiter import Limiter, as_limiter
from .._tasks import TaskOwner, run_to_completion
from .._values import Value
from ..errors import ClosedError, InputError, RolloutError
from ..protocol import check_checkpoint_name
from ..sampling import SamplingClient
from .batch import RolloutBatch, RolloutGroup
from .context import Resources, Rollout
from .evaluation import EvaluationResult, evaluate
from .executor import Executor, Workers
from .gate import StalenessGate
from .metrics import Meter
from .options import Options, check_options
from .policy import Trainer
from .producer import Producer, Tasks
from .progress import Progress, gate_state
from .publisher import Publisher
from .recorded import RecordedBatch, RecordedBatches
from .rolling import Roller, is_plain_function
from .state import RolloutState
from .watch import LoopWatch, warn_of_waiting

__all__ = ["RolloutStream", "RunningGroup"]

NAMED_GROUPS: Final = 3
"""How many of the oldest groups a warning names."""


class RunningGroup(Value, Struct, frozen=True, kw_only=True):
    """A group that is being rolled out: the `index` of its task, its `age`, and its time without an answer.

    Both times are in seconds; `idle` counts from the last answer of the sampler, or of the executor, to any member.
    """

    index: int
    age: float
    idle: float


class Parts(Struct, frozen=True):
    """What a stream has while it is open."""

    meter: Meter
    watch: LoopWatch
    resources: Resources
    producer: Producer


class RolloutStream:
    """Batches of rollouts, made beside training. Created by `TrainingClient.rollouts`, which describes its options.

    Use it in a ``with`` block, which publishes the trainer's weights on entry, and on exit cancels everything that
    still runs and waits for its end. Iterating waits for one batch after the other; rollouts go on meanwhile. After
    the last batch of each step, call `publish`: rollouts then sample the new weights, and further groups may begin.

    Example:
        ::

            async with trainer.rollouts(rollout, tasks, group_size=8, groups_per_step=4) as stream:
                async for batch in stream:
                    step = await trainer.step(batch.data, "ppo", loops.AdamParams(learning_rate=1e-4))
                    await stream.publish()
                    print(batch.report(await step))
    """

    def __init__(
        self,
        trainer: Trainer,
        rollout: Rollout,
        tasks: Iterable[Any] | AsyncIterable[Any],
        options: Options,
        *,
        limit: int | Adaptive | Limiter = 256,
        executor: Executor | None = None,
        state: RolloutState | None = None,
        agents: Mapping[str, Any] | None = None,
        recorded: RecordedBatches | None = None,
    ) -> None:
        check_options(options)
        self._agents = None if agents is None else check_gateway_options(agents)
        _check_work(rollout, tasks)
        if state is not None and not isinstance(state, RolloutState):
            raise InputError("state", f"expected a RolloutState or None, got {type(state).__name__}")
        restored = RolloutState() if state is None else state
        self._trainer = trainer
        self._rollout = rollout
        self._source = tasks
        self._options = options
        self._limiter = as_limiter(limit)
        self._workers = Workers(executor)
        self._gate = StalenessGate(
            groups_per_step=options.groups_per_step,
            max_staleness=options.max_staleness,
            run_ahead=options.run_ahead,
            state=gate_state(restored),
        )
        self._progress = Progress(restored)
        self._background = TaskOwner()
        self._change = asyncio.Event()
        """Set when a batch may have become possible."""
        self._publisher = Publisher(
            trainer, self._gate, options.name, tasks=self._background, on_change=self._change.set
        )
        self._in_step = 0
        """Groups handed out of the step that is not whole yet."""
        self._is_silent = True
        """Whether the program has had no batch yet, and was not told why there is none."""
        self._parts: Parts | None = None
        self._recorded = recorded
        self._missed: RolloutBatch | None = None
        """A batch whose caller was cancelled while it was recorded."""
        self._last_state: RolloutState | None = None
        """The state when the stream was left."""

    # --- properties ---

    @property
    def version(self) -> int:
        """The steps whose weights are published."""
        return self._gate.version

    @property
    def policy_version(self) -> int:
        """The service's version of the published weights, as `Episode.versions` has it."""
        return self._publisher.policy.version

    @property
    def sampler(self) -> SamplingClient:
        """A client of the newest published weights."""
        return self._publisher.policy.sampler

    @property
    def gate(self) -> StalenessGate:
        """What bounds the age of groups, with its counters."""
        return self._gate

    @property
    def limiter(self) -> Limiter:
        """What limits the sequences in flight."""
        return self._limiter

    def running(self) -> list[RunningGroup]:
        """Return the groups that are being rolled out, the oldest first."""
        now = asyncio.get_running_loop().time()
        groups = [] if self._parts is None else self._parts.producer.running
        return [RunningGroup(index=each.index, age=now - each.began, idle=now - each.heard_at) for each in groups]

    # --- batches ---

    def __aiter__(self) -> RolloutStream:
        return self

    async def __anext__(self) -> RolloutBatch:
        parts = self._opened()
        if (missed := self._missed) is not None:
            self._missed = None
            return missed
        if self._recorded is not None and (recorded := await self._recorded.next()) is not None:
            return self._handed_out_again(self._opened(), recorded)
        with parts.meter.waiting(), warn_of_waiting(self._describe_waiting):
            while (batch := self._next_batch(parts)) is None:
                if parts.producer.has_ended:
                    self._end(parts.producer)
                    raise StopAsyncIteration
                self._check_progress(parts)
                self._change.clear()
                await self._change.wait()
                parts = self._opened()
        if self._recorded is not None:
            try:
                await self._recorded.put(batch, self.state())
            except asyncio.CancelledError:
                self._missed = batch
                raise
        return batch

    def _handed_out_again(self, parts: Parts, recorded: RecordedBatch) -> RolloutBatch:
        """Hand out a batch that the journal has, as if its groups had just ended."""
        batch, state = recorded.batch, recorded.state
        self._is_silent = False
        self._gate._skip(  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - not for programs
            len(batch.groups), is_last_of_step=batch.is_last_of_step, state=gate_state(state)
        )
        self._progress.restore(state)
        self._count_groups(batch)
        self._trainer.log(batch.metrics)
        self._start_rollouts(parts)
        return batch

    def _start_rollouts(self, parts: Parts) -> None:
        """Begin to roll out, unless there are batches to be handed out again before."""
        if self._recorded is None or self._recorded.is_over:
            parts.producer.start(self._source)

    def _count_groups(self, batch: RolloutBatch) -> None:
        self._in_step = 0 if batch.is_last_of_step else self._in_step + len(batch.groups)
        indices = [group.index for group in batch.groups]
        self._progress.handed_out(indices, is_last_of_step=batch.is_last_of_step)

    def _end(self, producer: Producer) -> None:
        """Let no program take a stream without a batch for one that was trained on."""
        if self._is_silent:
            self._is_silent = False
            # A restored stream may have only the last tasks left, which failed before, too.
            producer.end_without_batch(may_raise=self._gate.step == 0)

    def _next_batch(self, parts: Parts) -> RolloutBatch | None:
        """Return a batch if there is one."""
        self._publisher.raise_failure()
        producer, options = parts.producer, self._options
        if producer.failure is not None:
            raise producer.failure
        size, left = options.groups_per_step // options.minibatches, options.groups_per_step - self._in_step
        can_be_short = producer.has_read_all and not options.drop_last
        is_part, is_rest = size < left, can_be_short and producer.has_ended
        # What a part leaves must be certain to follow: one group, or all that the step needs if it may not be short.
        needed = left if options.drop_last else size + 1
        if is_part and not is_rest and len(producer.finished) < needed:
            return None
        step = self._gate.step
        tickets = self._gate.take(size, flush=can_be_short)
        return None if tickets is None else self._batch(parts, [producer.finished.pop(each) for each in tickets], step)

    def _batch(self, parts: Parts, groups: list[RolloutGroup], step: int) -> RolloutBatch:
        self._is_silent = False
        batch = RolloutBatch(groups=groups, step=step, is_last_of_step=self._gate.step > step)
        self._count_groups(batch)
        batch.metrics = parts.meter.read(
            batch.episodes, [group.version for group in groups], step=step, policy=self.policy_version
        )
        self._trainer.log(batch.metrics)
        return batch

    def _check_progress(self, parts: Parts) -> None:
        """Raise if no batch can come any longer, unless the program publishes."""
        if parts.producer.has_read_all or self._gate.running or self._gate.capacity > 0:
            return
        if not self._publisher.is_publishing:
            raise RolloutError(
                f"no further group can begin: {self._gate.step} steps were handed out, but only the weights of "
                f"{self._gate.version} are published. Call `publish` after the last batch of each step."
            )

    def _describe_waiting(self) -> str:
        running = self.running()
        if not running:
            return "no group is under way; the next task is waited for, or the weights are being published"
        named = [f"task {one.index} ({one.age:.0f} s, {one.idle:.0f} s without an answer)" for one in running]
        return (
            f"{len(running)} groups are under way, with {self._limiter.in_flight} sequences in flight; the oldest: "
            + ", ".join(named[:NAMED_GROUPS])
        )

    # --- weights and state ---

    async def publish(self, *, wait: bool = True) -> None:
        """Publish the trainer's weights: rollouts sample them from their next request on, and further groups may begin.

        Call it when the optimizer step of each step's last batch was submitted. If the caller is cancelled, it still
        takes effect.

        Args:
            wait: return when the sampler serves the weights. False: return when the save has its turn among the
                trainer's operations, so that training can go on; its error is then raised by the next batch or
                `publish`.

        Raises:
            ClosedError: the stream is not open.
            LoopsError: the errors of `TrainingClient.save_weights_and_get_sampling_client`.
        """
        self._opened()
        await self._publisher.publish(wait=wait)

    async def save(self, name: str) -> RolloutState:
        """Save the training state under ``weights/<name>``, and return it together with the state of the stream.

        Call it when the optimizer step of each step's last batch was submitted. To resume, create a training client
        from the state's `path`, and pass the state to `TrainingClient.rollouts` with the same tasks.

        Args:
            name: one path segment; a checkpoint of the same name is replaced. Give each save a name of its own:
                otherwise, if the program is killed before it has written the state, the older state that it has
                written names newer weights.

        Raises:
            ClosedError: the stream is not open.
            LoopsError: the errors of `TrainingClient.save_state`.
        """
        self._opened()
        state = self.state()  # before the first `await`, as the turn of the save
        path = await (await self._trainer.save_state(check_checkpoint_name(name)))
        return replace(state, path=path, run_id=self._trainer.run_id)

    def state(self) -> RolloutState:
        """Return the state after the steps handed out so far, without a training state.

        Tasks that were begun and are not part of these steps are `RolloutState.pending`.
        """
        return self._last_state or self._progress.state(self._gate.state())

    async def evaluate(
        self,
        rollout: Rollout,
        tasks: Iterable[Any] | AsyncIterable[Any],
        *,
        group_size: int = 1,
        name: str = "evaluation",
    ) -> OperationFuture[EvaluationResult]:
        """Roll out other tasks with the weights that the trainer has now, beside training.

        Returns when the save of these weights has its turn among the trainer's operations. They are saved, but not
        published, for a day. The requests share the stream's limit, and come before those of training.

        Args:
            rollout: as for `TrainingClient.rollouts`; each call returns one episode.
            tasks: what to roll out, once each.
            group_size: the number of episodes for each task.
            name: the beginning of the checkpoint's name.

        Returns:
            A future of the result, which has to be waited for before the stream is left. It raises `RolloutError` if
            every group has failed.

        Raises:
            InputError: an argument is invalid; nothing was sent.
            ClosedError: the stream is not open.
            LoopsError: the errors of `TrainingClient.save_weights_for_sampler`.
        """
        self._opened()
        _check_work(rollout, tasks)
        check_at_least(group_size, 1, "group_size")
        check_checkpoint_name(name)
        turn = asyncio.get_running_loop().create_future()
        evaluation = self._background.start(
            self._evaluate(rollout, tasks, group_size=group_size, name=name, turn=turn), name=name
        )
        try:
            await asyncio.wait([turn, evaluation], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            evaluation.cancel()
            raise
        if evaluation.done():
            await evaluation  # raises why the weights could not be saved
        return OperationFuture(
            lambda: asyncio.shield(evaluation),
            tasks=self._background,
            operation=name,
            operation_id=f"at step {self._gate.step}",
            run_id=self._trainer.run_id,
        )

    async def _evaluate(
        self, rollout: Rollout, tasks: Tasks, *, group_size: int, name: str, turn: asyncio.Future[None]
    ) -> EvaluationResult:
        parts, step = self._opened(), self._gate.step
        served = await self._trainer.freeze(name)
        turn.set_result(None)
        policy = await served
        resources = replace(parts.resources, policy=lambda: policy, group_size=group_size, has_warned=True)
        options = replace(self._options, group_size=group_size, unit="episode")
        return await evaluate(
            Roller(rollout, options, resources),
            tasks,
            resources,
            policy=policy,
            step=step,
            key=f"{self._trainer.run_id}/{name}/{policy.version}",
        )

    # --- life ---

    async def __aenter__(self) -> RolloutStream:
        if self._parts is not None or self._last_state is not None:
            raise ClosedError("a stream can be entered only once; make another one with `rollouts`")
        self._parts = parts = self._new_parts()
        try:
            parts.resources.max_episode_tokens = await self._max_episode_tokens()
            await self._publisher.publish(wait=True)
            parts.resources.agents = await self._open_gateway(parts.resources.max_episode_tokens)
            if self._recorded is not None:
                await self._recorded.open()
            self._start_rollouts(parts)
        except BaseException:
            await run_to_completion(self._close())
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await run_to_completion(self._close())

    async def _open_gateway(self, max_context: int | None) -> AgentGateway | None:
        """Serve agents, if that was asked for."""
        if self._agents is None:
            return None
        options: dict[str, Any] = {"max_context": max_context, **self._agents}
        gateway = AgentGateway(self.sampler, **options)
        return await gateway.__aenter__()

    def _new_parts(self) -> Parts:
        meter = Meter(self._gate, self._limiter)
        resources = Resources(
            policy=lambda: self._publisher.policy,
            group_size=self._options.group_size,
            seed=self._options.seed,
            limiter=self._limiter,
            workers=self._workers,
            meter=meter,
        )
        producer = Producer(
            Roller(self._rollout, self._options, resources),
            self._options,
            gate=self._gate,
            progress=self._progress,
            resources=resources,
            tasks=self._background,
            affinity=f"{self._trainer.run_id}/{self._options.name}",
            on_change=self._change.set,
        )
        return Parts(meter, LoopWatch(meter), resources, producer)

    async def _close(self) -> None:
        self._last_state = self.state()  # before the groups under way are dropped
        parts, self._parts = self._parts, None
        if parts is not None:
            parts.watch.stop()
        self._gate.close()
        await self._background.close()
        if parts is not None and parts.resources.agents is not None:
            await parts.resources.agents.__aexit__(None, None, None)
        await self._workers.close()
        self._change.set()

    def _opened(self) -> Parts:
        if self._parts is None:
            raise ClosedError("the stream is not open: use it inside its ``with`` block")
        return self._parts

    async def _max_episode_tokens(self) -> int | None:
        """Return the longest episode that can be trained."""
        given, longest = self._options.max_episode_tokens, await self._trainer.max_seq_len()
        if given is not None and longest is not None and given > longest:
            raise InputError("max_episode_tokens", f"must be at most {longest}, the run's max_seq_len; got {given}")
        return longest if given is None else given

    def __repr__(self) -> str:
        state = "open" if self._parts is not None else "not open"
        return f"<RolloutStream of run {self._trainer.run_id}, step {self._gate.step}, {state}>"


def _check_work(rollout: Any, tasks: Any) -> None:
    if not callable(rollout):
        raise InputError("rollout", f"must be a function of a context and a task; got {rollout!r}")
    if is_plain_function(rollout):
        raise InputError("rollout", f"must be `async def`; plain functions are for loops_sync; got {rollout!r}")
    if not isinstance(tasks, Iterable | AsyncIterable):
        raise InputError("tasks", f"must be an iterable, e.g. a list or a generator; got {type(tasks).__name__}")

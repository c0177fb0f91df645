"""`loops_sync` itself against the service on the echo engine: what the contract tests for both colours cannot see."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from importlib import import_module
from itertools import islice
from pathlib import Path

import msgspec
import pytest
from workshop import eventually, interrupt

import loops_async
import loops_sync
from loops_local import LocalService, serve_in_thread
from loops_sync._bridge import current
from tests.support.patience import PATIENCE_SECONDS

DATA = [
    loops_sync.Datum(model_input=[1, 2, 3], loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 1.0]})
]
PROMPT = loops_sync.ModelInput.from_ints([104, 105])
SHORT = loops_sync.SamplingParams(max_tokens=4)


@pytest.fixture
def service(echo_service: LocalService) -> Iterator[loops_sync.ServiceClient]:
    with loops_sync.ServiceClient(base_url=echo_service.base_url, api_key=echo_service.api_key) as service:
        yield service


@pytest.fixture
def trainer(service: loops_sync.ServiceClient) -> loops_sync.TrainingClient:
    return service.create_lora_training_client("echo", rank=8)


def everything_in(value: object) -> Iterator[object]:
    """Yield a result and whatever it is made of."""
    yield value
    parts: list[object] = []
    if isinstance(value, msgspec.Struct):
        parts = [getattr(value, name) for name in value.__struct_fields__]
    elif isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple):
        parts = list(value)
    for part in parts:
        yield from everything_in(part)


def assert_plain(value: object) -> None:
    for part in everything_in(value):
        assert not inspect.isawaitable(part)
        assert not hasattr(part, "__aiter__")
        module = type(part).__module__
        assert not module.startswith("loops_async") or isinstance(part, msgspec.Struct | str)


def test_the_whole_job_leaks_nothing_of_the_core(
    service: loops_sync.ServiceClient, trainer: loops_sync.TrainingClient, tmp_path: Path
) -> None:
    step = trainer.forward_backward(DATA)
    optim = trainer.optim_step(loops_sync.AdamParams())
    state = trainer.save_state("state")
    sampler = trainer.save_weights_and_get_sampling_client("weights")
    checkpoints = service.list_checkpoints(trainer.run_id)
    plane = service.control_plane
    for handle in (service, trainer, sampler, plane, step, optim, state):
        assert type(handle).__module__.startswith("loops_sync")
    results = [
        service.session_id,
        service.get_server_capabilities(),
        trainer.run_id,
        trainer.run,
        trainer.get_info(),
        trainer.health(),
        trainer.policy_version,
        step.operation_id,
        step.result(),
        step.done(),
        optim.result(timeout=PATIENCE_SECONDS),
        state.result(),
        trainer.forward(DATA).result(),
        trainer.load_state(state.result().path).result(),
        sampler.sample(PROMPT, sampling_params=SHORT),
        sampler.compute_logprobs(PROMPT),
        sampler.ensure_ready(),
        sampler.get_base_model(),
        sampler.discover_base_model_name(),
        sampler.discover_adapter_name(),
        checkpoints,
        service.get_checkpoint_archive_url(checkpoints[0].id),
        service.download_checkpoint(checkpoints[0].id, dest_dir=tmp_path / "files"),
        plane.list_runs(),
        plane.get_run(trainer.run_id),
        plane.list_samplers(),
    ]
    for result in results:
        assert_plain(result)
    assert isinstance(trainer.policy_version, int)


def test_refusals_come_from_the_constructor(echo_service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(loops_sync.AuthenticationError):
        loops_sync.ServiceClient(base_url=echo_service.base_url, api_key="wrong")
    for name in ("BASETEN_API_KEY", "LOOPS_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(loops_sync.ConfigError):
        loops_sync.ServiceClient()


def test_local_mode_opens_too(echo_service: LocalService) -> None:
    urls = {"trainer_url": echo_service.trainer_url, "sampler_url": echo_service.sampler_url}
    with loops_sync.ServiceClient.local(**urls) as service:
        assert service.session_id == "local"
        trainer = service.create_lora_training_client("echo", rank=8)
        assert trainer.save_weights_and_get_sampling_client().sample(PROMPT, sampling_params=SHORT).sequences


def test_closed_is_closed(service: loops_sync.ServiceClient, trainer: loops_sync.TrainingClient) -> None:
    service.close()
    with pytest.raises(loops_sync.ClosedError):
        trainer.forward_backward(DATA)
    with pytest.raises(loops_sync.ClosedError):
        service.get_server_capabilities()


def test_threads_share_a_client_and_operations_keep_an_order(trainer: loops_sync.TrainingClient) -> None:
    before = trainer.policy_version
    with ThreadPoolExecutor(16) as threads:
        steps = list(threads.map(lambda _: trainer.optim_step(loops_sync.AdamParams()), range(32)))
    for step in steps:
        step.result(timeout=PATIENCE_SECONDS)
    assert trainer.policy_version == before + 32


def test_a_sampler_outlives_the_names_of_what_made_it(echo_service: LocalService) -> None:
    def make() -> loops_sync.SamplingClient:
        service = loops_sync.ServiceClient(base_url=echo_service.base_url, api_key=echo_service.api_key)
        return service.create_sampling_client("echo")

    sampler = make()
    gc.collect()
    assert len(sampler.sample(PROMPT, sampling_params=SHORT).sequences[0].tokens) == 4


def test_a_sampler_works_in_another_process_without_the_key_in_its_pickle(
    trainer: loops_sync.TrainingClient, echo_service: LocalService
) -> None:
    sampler = trainer.save_weights_and_get_sampling_client("weights")
    expected = sampler.sample(PROMPT, sampling_params=SHORT).sequences[0].tokens
    pickled = pickle.dumps(sampler)
    assert echo_service.api_key.encode() not in pickled

    script = """
import pickle, sys, threading
sampler = pickle.load(sys.stdin.buffer)
import loops_sync
assert type(sampler) is loops_sync.SamplingClient
print(sampler.sample([104, 105], sampling_params=loops_sync.SamplingParams(max_tokens=4)).sequences[0].tokens)
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script],
        input=pickled,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        env={**os.environ, "BASETEN_API_KEY": echo_service.api_key},
    )
    assert (done.stdout.decode(), done.stderr.decode()) == (f"{expected}\n", "")


@pytest.mark.parametrize("name", ["TrainingClient", "ControlPlane"])
def test_what_belongs_to_a_connection_does_not_pickle(
    service: loops_sync.ServiceClient, trainer: loops_sync.TrainingClient, name: str
) -> None:
    handle = {"TrainingClient": trainer, "ControlPlane": service.control_plane}[name]
    with pytest.raises(TypeError):
        pickle.dumps(handle)


def test_one_thread_however_many_clients(echo_service: LocalService) -> None:
    clients = [loops_sync.ServiceClient(base_url=echo_service.base_url, api_key=echo_service.api_key) for _ in range(5)]
    assert [thread.name for thread in threading.enumerate()].count("loops_sync") == 1
    for client in clients:
        client.close()


def test_from_a_coroutine_of_the_core_beside_it(service: loops_sync.ServiceClient) -> None:
    """A blocking call on the loop of the facade would wait for itself for ever."""
    from loops_sync._bridge import current

    async def confused() -> None:
        service.get_server_capabilities()

    with pytest.raises(loops_async.ClosedError, match="use loops_async"):
        current().run(confused)


# --- callbacks -------------------------------------------------------------------------------------------------------


def test_a_callback_may_use_the_client(service: loops_sync.ServiceClient) -> None:
    listed: list[tuple[str, list[loops_sync.Checkpoint]]] = []

    def look(event: loops_sync.ProvisioningEvent) -> None:
        assert service.get_server_capabilities().supported_models
        listed.append((event.stage, service.list_checkpoints(event.id)))

    service.create_lora_training_client("echo", rank=8, on_progress=look)
    assert [listed[0], listed[-1]] == [("created", []), ("ready", [])]


def test_a_callback_that_sleeps_holds_up_nobody(
    service: loops_sync.ServiceClient, trainer: loops_sync.TrainingClient
) -> None:
    release, blocked = threading.Event(), threading.Event()

    def sleep(_: loops_sync.ProvisioningEvent) -> None:
        blocked.set()
        release.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(service.wait_for_run, trainer.run_id, on_progress=sleep)
        assert blocked.wait(PATIENCE_SECONDS)
        assert trainer.forward(DATA).result(timeout=PATIENCE_SECONDS).loss is not None
        assert not waiting.done()
        release.set()
        assert waiting.result().id == trainer.run_id


def test_a_callback_that_fails_fails_the_call_and_switches_the_run_off() -> None:
    events: list[loops_sync.ProvisioningEvent] = []

    def fail(event: loops_sync.ProvisioningEvent) -> None:
        events.append(event)
        raise ZeroDivisionError

    with (
        serve_in_thread(engine="echo", provisioning_seconds=0.5) as slow,
        loops_sync.ServiceClient(base_url=slow.base_url, api_key=slow.api_key) as service,
    ):
        with pytest.raises(ZeroDivisionError):
            service.create_lora_training_client("echo", rank=8, on_progress=fail)
        [run] = service.control_plane.list_runs(run_id=events[0].id)
    assert [events[0].stage, events[-2].stage, events[-1].stage] == ["created", "failed", "deactivated"]
    assert run.status.name == "INACTIVE"


def test_every_step_of_a_download_is_told_in_order(
    service: loops_sync.ServiceClient, trainer: loops_sync.TrainingClient, tmp_path: Path
) -> None:
    trainer.save_weights_for_sampler("weights").result()
    [checkpoint] = service.list_checkpoints(trainer.run_id)
    told: list[tuple[loops_sync.DownloadProgress, str]] = []
    done = service.download_checkpoint(
        checkpoint.id,
        dest_dir=tmp_path / "files",
        on_progress=lambda progress: told.append((progress, threading.current_thread().name)),
    )
    assert {name for _, name in told} == {threading.current_thread().name}
    assert [progress.bytes_done for progress, _ in told] == sorted(progress.bytes_done for progress, _ in told)
    assert (told[-1][0].files_done, told[-1][0].bytes_done) == (done.file_count, done.bytes_written)


def test_prompts_may_use_the_client(trainer: loops_sync.TrainingClient) -> None:
    sampler = trainer.save_weights_and_get_sampling_client("weights")

    def prompts() -> Iterator[list[int]]:
        for _ in range(3):
            yield list(sampler.sample(PROMPT, sampling_params=SHORT).sequences[0].tokens)

    assert len(list(sampler.sample_many(prompts(), sampling_params=SHORT))) == 3


# --- rollouts ---


class Rollout:
    """Samples one answer to a number; from `stuck_from` on, waits in a call that only its cancellation ends."""

    def __init__(self, stuck_from: int = 1000) -> None:
        self.threads: set[str] = set()
        self.ended: list[str] = []
        self.is_stuck = threading.Event()
        self._stuck_from = stuck_from
        self._full = loops_sync.StalenessGate(groups_per_step=1, max_staleness=0)
        assert self._full.admit().version == 0

    def __call__(self, ctx: loops_sync.RolloutContext, task: int) -> loops_sync.Episode:
        if task >= self._stuck_from:
            self._wait()
        self.threads.add(threading.current_thread().name)
        episode = loops_sync.Episode.start([task + 1, 20])
        ctx.sample(episode, SHORT)
        assert ctx.sampler.sample(episode.tokens, sampling_params=SHORT).sequences
        episode.reward = float(ctx.run(int, str(ctx.member)))
        return episode

    def _wait(self) -> None:
        try:
            self.is_stuck.set()
            self._full.admit()
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise


PAIRS = {"group_size": 2, "groups_per_step": 2}


def names_of_tasks() -> set[str]:
    async def names() -> set[str]:
        return {str(task.get_coro()) for task in asyncio.all_tasks() - {asyncio.current_task()}}

    return current().run(names)


def test_a_rollout_is_a_plain_function_in_a_thread_of_its_own(trainer: loops_sync.TrainingClient) -> None:
    rollout = Rollout()
    with trainer.rollouts(rollout, (number for number in range(6)), max_staleness=1, **PAIRS) as stream:
        assert stream.gate is stream.gate
        steps = []
        for batch in stream:
            step = trainer.step(batch.data, "ppo", loops_sync.AdamParams())
            stream.publish()
            assert "train/loss" in batch.report(step.result())
            steps.append((batch.step, len(batch.episodes)))
        assert (stream.version, stream.gate.accepted, stream.running()) == (3, 6, [])
    assert steps == [(0, 4), (1, 4), (2, 4)]
    assert rollout.threads == {f"loops_sync: roll out task {at}, member {no}" for at in range(6) for no in range(2)}


def test_an_evaluation_beside_it_is_plain_too(trainer: loops_sync.TrainingClient) -> None:
    with trainer.rollouts(Rollout(stuck_from=2), range(4), **PAIRS) as stream:
        evaluation = stream.evaluate(Rollout(), range(3), group_size=2)
        batch = next(stream)
        assert isinstance(evaluation, loops_sync.OperationFuture)
        assert len(evaluation.result().groups) == 3
        assert [group.index for group in batch.groups] == [0, 1]


def assert_all_ended(rollout: Rollout) -> None:
    assert set(rollout.ended) == {"CancelledError"}
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("loops_sync:")] == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_leaving_cancels_the_calls_of_rollouts(trainer: loops_sync.TrainingClient, error: type[BaseException]) -> None:
    before, rollout = names_of_tasks(), Rollout(stuck_from=2)

    def fail() -> None:
        with trainer.rollouts(rollout, range(4), **PAIRS) as stream:
            for _ in stream:
                assert rollout.is_stuck.wait(PATIENCE_SECONDS)
                raise error

    with pytest.raises(error):
        fail()
    assert_all_ended(rollout)
    assert names_of_tasks() == before


def test_an_interrupt_while_it_waits_for_a_batch_leaves(trainer: loops_sync.TrainingClient) -> None:
    stuck, is_waiting = Rollout(stuck_from=0), threading.Event()

    def rollout(ctx: loops_sync.RolloutContext, task: int) -> loops_sync.Episode:
        is_waiting.wait(PATIENCE_SECONDS)
        interrupt()
        return stuck(ctx, task)

    def wait() -> None:
        with trainer.rollouts(rollout, [0], group_size=1, groups_per_step=1) as stream:
            is_waiting.set()
            next(stream)

    with pytest.raises(KeyboardInterrupt):
        wait()
    assert_all_ended(stuck)


def test_a_stream_that_is_let_go_is_left(trainer: loops_sync.TrainingClient) -> None:
    before, rollout = names_of_tasks(), Rollout(stuck_from=0)
    stream = trainer.rollouts(rollout, range(4), **PAIRS)
    stream.__enter__()
    assert rollout.is_stuck.wait(PATIENCE_SECONDS)
    del stream
    gc.collect()
    assert eventually(lambda: names_of_tasks() == before)
    assert set(rollout.ended) == {"CancelledError"}


def test_a_gate_may_be_used_by_threads() -> None:
    gate = loops_sync.StalenessGate(groups_per_step=4, max_staleness=1)
    assert repr(gate) == "<StalenessGate version 0, step 0, 0 running>"

    def roll_out(_: int) -> None:
        gate.admit().accept()

    with ThreadPoolExecutor(16) as threads, closing(gate):
        admitted = [threads.submit(roll_out, number) for number in range(16)]
        for step in range(4):
            for one in islice(as_completed(admitted), 4 * step + 4):
                one.result(PATIENCE_SECONDS)
            # A group that is admitted and not yet accepted may be due in this step.
            assert eventually(lambda: gate.running == 0)
            assert len(gate.take(4) or []) == 4
            gate.publish()
        for one in admitted:
            one.result(PATIENCE_SECONDS)
    assert (gate.step, gate.accepted, gate.running, gate.version) == (4, 16, 0, 4)
    with pytest.raises(loops_sync.ClosedError):
        gate.admit()


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_control_plane_is_one_object(service: loops_sync.ServiceClient, echo_service: LocalService) -> None:
    assert service.control_plane is service.control_plane
    assert repr(service.control_plane) == f"<ControlPlane at {echo_service.base_url}/v1/loops>"


def test_a_public_module_has_the_names_of_the_cores() -> None:
    """Its handles and aliases are the twins, the others are the core's."""
    for name in ("training", "rollouts", "sampling"):
        module, core = import_module(f"loops_sync.{name}"), import_module(f"loops_async.{name}")
        assert sorted(module.__all__) == sorted(core.__all__)
        assert all(getattr(module, each) is getattr(loops_sync, each) for each in module.__all__)


@pytest.mark.parametrize("name", ["errors", "types", "drift"])
def test_modules_of_values_are_imported_as_from_the_core(name: str) -> None:
    module, core = import_module(f"loops_sync.{name}"), import_module(f"loops_async.{name}")
    assert getattr(loops_sync, name) is module
    assert sorted(module.__all__) == sorted(core.__all__)
    assert all(getattr(module, each) is getattr(core, each) for each in module.__all__)


@pytest.mark.parametrize(
    "name", ["TrainingClient", "ControlPlane", "OperationFuture", "RolloutStream", "RolloutContext"]
)
def test_what_others_make_has_no_constructor(name: str) -> None:
    kind = getattr(loops_sync, name)
    assert not inspect.signature(kind).parameters
    with pytest.raises(TypeError, match=f"{name} is not created directly"):
        kind()

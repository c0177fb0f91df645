"""Steps told to Weights & Biases, for which a module of the same name stands in, to other trackers and to `on_step`."""

from __future__ import annotations

import logging
import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from loops_async import (
    AdamParams,
    ApiError,
    Datum,
    Episode,
    InputError,
    RolloutContext,
    SamplingParams,
    ServiceClient,
    StepMetrics,
    TrainingClient,
    WandbConfig,
)
from loops_async._training import step_log
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.patience import PATIENCE_SECONDS

DATA = [Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3]})]
CONFIG = WandbConfig(project="loops", name="mine")


class Wandb(ModuleType):
    """What the library uses of wandb; `fail` names the call that raises."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", loader=None)
        self.fail: str | None = None
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.threads: set[int] = set()
        self.finished = threading.Event()
        self.may_begin = threading.Event()
        self.may_begin.set()

    def init(self, **options: Any) -> Wandb:
        assert self.may_begin.wait(PATIENCE_SECONDS)
        self._happens("init")
        self.begun.append(options)
        return self

    def log(self, metrics: dict[str, Any]) -> None:
        self._happens("log")
        self.logged.append(metrics)

    def finish(self) -> None:
        self._happens("finish")
        self.finished.set()

    def _happens(self, call: str) -> None:
        self.threads.add(threading.get_ident())
        if self.fail == call:
            raise OSError(f"no network in {call}")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


async def trained(service: ServiceClient, steps: int) -> TrainingClient:
    trainer = await service.create_lora_training_client("echo", 4, None, 600.0, 3600.0, CONFIG)
    for _ in range(steps):
        await trainer.forward_backward(DATA)
        await trainer.optim_step(AdamParams(learning_rate=0.5))
    return trainer


async def test_every_step_is_logged_with_the_pass_before_it_in_another_thread(
    colour: Colour, local: LocalService, wandb: Wandb
) -> None:
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
        trainer = await trained(service, steps=3)
        last = await trainer.optim_step(AdamParams())
        await last
    assert [one["step"] for one in wandb.logged] == [1.0, 2.0, 3.0, 4.0]
    assert [one["learning_rate"] for one in wandb.logged] == [0.5, 0.5, 0.5, 1e-4]
    assert all(one["loss"] > 0 for one in wandb.logged[:3])
    assert "loss" not in wandb.logged[3]
    (begun,) = wandb.begun
    assert (begun["project"], begun["name"]) == ("loops", "mine")
    assert begun["config"] == {"run_id": trainer.run_id, "base_model": "echo", "lora_rank": 4}
    assert wandb.finished.is_set()
    assert threading.get_ident() not in wandb.threads


async def test_the_passes_of_one_step_are_averaged_by_datums(service: ServiceClient, wandb: Wandb) -> None:
    trainer = await trained(service, steps=0)
    first = await (await trainer.forward_backward(DATA))
    second = await (
        await trainer.forward_backward([Datum(model_input=[40, 2], loss_fn_inputs={"target_tokens": [99, 3]})] * 3)
    )
    await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    assert first.loss != second.loss
    assert wandb.logged[0]["loss"] == pytest.approx((first.loss + 3 * second.loss) / 4)


async def test_closing_the_training_client_ends_the_run(service: ServiceClient, wandb: Wandb) -> None:
    trainer = await trained(service, steps=1)
    await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    await trainer.close()
    assert wandb.finished.is_set()
    assert len(wandb.logged) == 2


async def test_steps_are_kept_until_the_run_has_begun(
    service: ServiceClient, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_log, "BEGIN_SECONDS", 0.05)
    wandb.may_begin.clear()
    trainer = await trained(service, steps=2)
    assert trainer.wandb_run is None
    await (await trainer.optim_step(AdamParams()))
    wandb.may_begin.set()
    await trainer.close()
    assert len(wandb.logged) == 3


@pytest.mark.parametrize("call", ["init", "log", "finish"])
async def test_training_goes_on_when_logging_fails(
    service: ServiceClient, wandb: Wandb, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    wandb.fail = call
    trainer = await trained(service, steps=3)
    step = await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    assert step.metrics is not None
    assert step.metrics["step"] == 4.0
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"training continues without logging to Weights & Biases: OSError: no network in {call}"
    ]


async def test_a_failed_operation_is_not_logged_to_wandb_but_reported(
    local: LocalService, service: ServiceClient, wandb: Wandb, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = await trained(service, steps=0)
    local.faults.answer("GET */operations/*", 200, {"status": "error", "error": "out of memory"})
    await trainer.optim_step(AdamParams())
    await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    assert len(wandb.logged) == 1
    assert "out of memory" in caplog.text


async def test_a_run_that_hangs_does_not_hold_up_the_end(
    service: ServiceClient, wandb: Wandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_log, "BEGIN_SECONDS", 0.05)
    monkeypatch.setattr(step_log, "CLOSE_SECONDS", 0.05)
    wandb.may_begin.clear()
    trainer = await trained(service, steps=1)
    await trainer.close()
    assert "did not finish" in caplog.text
    wandb.may_begin.set()
    assert wandb.finished.wait(PATIENCE_SECONDS)


async def test_without_the_extra_nothing_is_provisioned(
    service: ServiceClient, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"loops-async\[wandb\]"):
        await service.create_lora_training_client(engine.name, wandb_config=CONFIG)
    assert await service.control_plane.list_runs(base_model=engine.name) == []


async def test_a_client_that_is_attached_logs_as_well(service: ServiceClient, wandb: Wandb) -> None:
    trainer = await service.create_lora_training_client("echo", rank=4)
    attached = await service.attach_training_client(trainer.run_id, wandb_config=CONFIG)
    await (await attached.optim_step(AdamParams()))
    await attached.close()
    assert [one["step"] for one in wandb.logged] == [1.0]


class Tracker:
    """A run of another tracker, which has begun and has nothing but `log`."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)

    def finish(self) -> None:
        raise AssertionError("the user's own run was ended")


async def test_the_run_is_there_when_the_training_client_is(service: ServiceClient, wandb: Wandb) -> None:
    trainer = await trained(service, steps=0)
    assert trainer.wandb_run is wandb
    await trainer.close()


async def test_a_run_that_exists_is_logged_to_and_never_ended(
    service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed, and not needed
    tracker = Tracker()
    trainer = await service.create_lora_training_client("echo", rank=4, wandb_config=WandbConfig(run=tracker))
    assert trainer.wandb_run is tracker
    await trainer.forward_backward(DATA)
    await (await trainer.optim_step(AdamParams(learning_rate=0.5)))
    await trainer.close()
    (row,) = tracker.logged
    assert (row["step"], row["learning_rate"], row["grad_norm"], row["tokens"]) == (1.0, 0.5, 1.0, 2.0)


async def test_a_client_without_a_tracker_has_no_run(service: ServiceClient) -> None:
    trainer = await service.create_lora_training_client("echo", rank=4)
    trainer.log({"reward": 1.0})
    await (await trainer.optim_step(AdamParams()))
    assert trainer.wandb_run is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"wandb_config": {"project": "p"}},
        {"wandb_config": WandbConfig()},
        {"wandb_config": WandbConfig(project="")},
        {"wandb_config": WandbConfig(project="p", run=Tracker())},
        {"wandb_config": WandbConfig(name="n", run=Tracker())},
        {"wandb_config": WandbConfig(run=object())},
        {"on_step": 3},
    ],
    ids=["no config", "nothing", "no name", "both", "a name for what exists", "no log", "no function"],
)
async def test_a_wrong_argument_provisions_nothing(
    service: ServiceClient, engine: WatchedEngine, wandb: Wandb, wrong: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        await service.create_lora_training_client(engine.name, **wrong)
    assert await service.control_plane.list_runs(base_model=engine.name) == []


async def test_own_metrics_stand_in_the_row_of_the_next_step_that_is_submitted(
    service: ServiceClient, wandb: Wandb
) -> None:
    trainer = await trained(service, steps=0)
    trainer.log({"reward": 0.5, "loss": 7.0})
    trainer.log({"reward": 0.75})
    await trainer.step(DATA, "cross_entropy", AdamParams())
    await trainer.optim_step(AdamParams())
    trainer.log({"reward": 1.0})
    await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    assert [one.get("reward") for one in wandb.logged] == [0.75, None, 1.0]
    assert wandb.logged[0]["loss"] != 7.0


async def test_own_metrics_of_a_step_that_was_refused_belong_to_the_next(
    local: LocalService, service: ServiceClient, wandb: Wandb
) -> None:
    trainer = await trained(service, steps=0)
    trainer.log({"reward": 0.5, "kept": 1.0})
    local.faults.answer("POST */optim_step", 422, {"error": "no"})
    with pytest.raises(ApiError):
        await trainer.optim_step(AdamParams())
    trainer.log({"reward": 0.75})
    await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    (row,) = wandb.logged
    assert (row["reward"], row["kept"]) == (0.75, 1.0)


@pytest.mark.parametrize("metrics", [None, [("a", 1.0)], {1: 1.0}])
async def test_own_metrics_without_names_are_refused(service: ServiceClient, metrics: Any) -> None:
    trainer = await service.create_lora_training_client("echo", rank=4)
    with pytest.raises(InputError, match="metrics"):
        trainer.log(metrics)


async def test_on_step_gets_the_rows_of_the_tracker_in_order_in_another_thread(service: ServiceClient) -> None:
    tracker, told, threads = Tracker(), list[StepMetrics](), set[int]()

    def on_step(step: StepMetrics) -> None:
        threads.add(threading.get_ident())
        told.append(step)
        if step.step == 1:
            raise OSError("full")

    trainer = await service.create_lora_training_client(
        "echo", rank=4, wandb_config=WandbConfig(run=tracker), on_step=on_step
    )
    for number in range(3):
        await trainer.forward_backward(DATA)
        trainer.log({"number": number})
        await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    assert [one.step for one in told] == [1, 2, 3]
    assert {one.run_id for one in told} == {trainer.run_id}
    assert [one.metrics for one in told] == tracker.logged
    assert [one.metrics["number"] for one in told] == [0, 1, 2]
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("kind", [OSError, SystemExit])
async def test_what_on_step_raises_is_logged_and_nothing_else(
    service: ServiceClient, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    def on_step(step: StepMetrics) -> None:
        raise kind(f"full at {step.step}")

    trainer = await service.create_lora_training_client("echo", rank=4, on_step=on_step)
    for _ in range(2):
        await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    assert [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING] == [
        f"on_step failed for step {step}, training continues: {kind.__name__}: full at {step}" for step in (1, 2)
    ]


async def test_the_batches_of_rollouts_are_in_the_rows_as_well(service: ServiceClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([task])
        await ctx.sample(episode, SamplingParams(max_tokens=2))
        episode.reward = float(ctx.member)
        return episode

    tracker = Tracker()
    trainer = await service.create_lora_training_client("echo", rank=4, wandb_config=WandbConfig(run=tracker))
    async with trainer.rollouts(rollout, [65, 66], group_size=2, groups_per_step=1) as stream:
        async for batch in stream:
            await (await trainer.step(batch.data, "ppo", AdamParams()))
            await stream.publish()
    await trainer.close()
    assert [(one["step"], one["reward/mean"]) for one in tracker.logged] == [(1.0, 0.5), (2.0, 0.5)]

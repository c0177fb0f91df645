"""Submitting in order, waiting in any, and what failures and lost connections do to both."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from loops_async import (
    AdamParams,
    OperationTimeoutError,
    RemoteOpError,
    TrainingClient,
    UnknownRequestError,
)
from loops_async._operations import batch
from loops_local import LocalService
from tests.support.engines import WatchedEngine
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import REFUSED, body_of, eventually, example


async def test_operations_run_in_the_order_of_the_calls(trainer: TrainingClient, engine: WatchedEngine) -> None:
    expected: list[tuple[str, float]] = []
    for step in range(1, 9):
        await trainer.forward_backward([example(step)])
        last = await trainer.optim_step(AdamParams(learning_rate=step))
        expected += [("forward_backward", step), ("optim_step", step)]
    await last
    assert engine.done == expected


async def test_many_are_under_way_and_awaited_in_any_order(trainer: TrainingClient, engine: WatchedEngine) -> None:
    engine.training.clear()
    futures = [await trainer.forward([example(number)]) for number in range(40)]
    assert engine.done == []  # all were accepted before the first was done
    assert not any(future.done() for future in futures)
    assert len({future.operation_id for future in futures}) == 40

    engine.training.set()
    random.shuffle(futures)
    outputs = await asyncio.gather(*futures)
    assert all(output.loss_fn_outputs for output in outputs)
    assert all(future.done() for future in futures)
    assert engine.done == [("forward", number) for number in range(40)]


async def test_an_operation_that_is_not_awaited_is_done_all_the_same(
    trainer: TrainingClient, engine: WatchedEngine
) -> None:
    await trainer.forward_backward([example()])
    await trainer.optim_step(AdamParams())
    await eventually(lambda: len(engine.done) == 2)


async def test_a_result_is_kept(trainer: TrainingClient) -> None:
    future = await trainer.forward([example()])
    assert await future == await future == await future.result(timeout=PATIENCE_SECONDS)


async def test_many_wait_for_one(trainer: TrainingClient, engine: WatchedEngine) -> None:
    engine.training.clear()
    future = await trainer.forward([example()])
    waiters = [asyncio.ensure_future(future.result()) for _ in range(20)]
    hasty = [asyncio.ensure_future(future.result(timeout=0.01)) for _ in range(5)]

    outcomes = await asyncio.gather(*hasty, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {OperationTimeoutError}
    engine.training.set()
    outputs = await asyncio.gather(*waiters)
    assert all(output == outputs[0] for output in outputs)
    assert await future == outputs[0]


async def test_a_wait_that_is_over_says_so_and_harms_nothing(trainer: TrainingClient, engine: WatchedEngine) -> None:
    engine.training.clear()
    future = await trainer.forward([example()])
    with pytest.raises(TimeoutError, match=r"no result within 0\.01 s.*operation continues") as raised:
        await future.result(timeout=0.01)

    error = raised.value
    assert isinstance(error, OperationTimeoutError)
    assert (error.operation, error.operation_id, error.run_id) == ("forward", future.operation_id, trainer.run_id)
    assert error.retryable
    engine.training.set()
    assert (await future.result(timeout=PATIENCE_SECONDS)).loss_fn_outputs


async def test_a_failure_in_the_middle_stops_nothing(trainer: TrainingClient, engine: WatchedEngine) -> None:
    futures = [
        await trainer.forward([example(1)]),
        await trainer.forward([REFUSED]),
        await trainer.forward([example(3)]),
    ]
    for _ in range(2):
        with pytest.raises(RemoteOpError, match=r"ValueError: .*token ids must be 0 or more"):
            await futures[1]
    await futures[0]
    await futures[2]
    assert engine.done == [("forward", 1), ("forward", 3)]


@pytest.mark.parametrize("fault", ["drop", "lose_answer"])
async def test_a_lost_connection_does_not_repeat_an_operation(
    trainer: TrainingClient, engine: WatchedEngine, local: LocalService, fault: str
) -> None:
    hits = getattr(local.faults, fault)(f"POST */{trainer.run_id}/optim_step", times=2)
    repeated = local.faults.watch(f"POST */{trainer.run_id}/optim_step")
    future = await trainer.optim_step(AdamParams(learning_rate=1.0))
    await trainer.forward([example(2)])
    await (await trainer.forward([example(3)]))

    await future
    assert engine.done == [("optim_step", 1.0), ("forward", 2), ("forward", 3)]
    assert len(hits) == 2
    assert len({hit.headers["Idempotency-Key"] for hit in hits + repeated}) == 1


@pytest.mark.parametrize("fault", ["drop", "lose_answer"])
async def test_a_lost_poll_is_asked_again(trainer: TrainingClient, local: LocalService, fault: str) -> None:
    hits = getattr(local.faults, fault)(f"GET */{trainer.run_id}/operations/*", times=3)
    assert (await (await trainer.forward([example()]))).loss_fn_outputs
    assert len(hits) == 3


async def test_an_operation_that_takes_long_is_asked_for_again_and_again(
    trainer: TrainingClient, local: LocalService
) -> None:
    hits = local.faults.answer(f"GET */{trainer.run_id}/operations/*", 408, {"message": "still under way"}, times=3)
    assert (await (await trainer.forward([example()]))).loss_fn_outputs
    assert len(hits) == 3


async def test_an_operation_that_the_service_forgot(trainer: TrainingClient, local: LocalService) -> None:
    local.faults.answer(f"GET */{trainer.run_id}/operations/*", 404, {"error": "there is no operation"})
    future = await trainer.forward([example()])
    with pytest.raises(UnknownRequestError, match="Submit it again"):
        await future
    assert (await (await trainer.forward([example()]))).loss_fn_outputs


async def test_operations_are_numbered_from_one_without_gaps(
    trainer: TrainingClient, engine: WatchedEngine, local: LocalService
) -> None:
    local.faults.answer(f"POST */{trainer.run_id}/save_state", 422, {"message": "not now"})
    hits = local.faults.watch(f"POST */{trainer.run_id}/*", times=3)
    await trainer.forward([example()])
    wrong: Any = {"learning_rate": 1.0}
    with pytest.raises(ValueError, match="adam_params"):
        await trainer.optim_step(wrong)
    with pytest.raises(Exception, match="not now"):
        await trainer.save_state("refused")
    await trainer.optim_step(AdamParams())
    await (await trainer.save_state("accepted"))

    # The first of all was `init_trainer_server`.
    assert [body_of(hit)["seq_id"] for hit in hits] == [2, 3, 4]


async def test_the_parts_of_a_split_call_are_all_under_way(
    trainer: TrainingClient, engine: WatchedEngine, local: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MAX_REQUEST_BYTES", 600)
    engine.training.clear()
    parts = local.faults.watch(f"POST */{trainer.run_id}/forward_backward", times=1000)
    data = [example(number) for number in range(1, 41)]
    forward = await trainer.forward_backward(data)
    optim = await trainer.optim_step(AdamParams())

    assert len(parts) >= 20  # all were accepted before the first was done
    engine.training.set()
    assert len((await forward).loss_fn_outputs) == 40
    await optim
    assert [name for name, _ in engine.done] == ["forward_backward"] * len(parts) + ["optim_step"]

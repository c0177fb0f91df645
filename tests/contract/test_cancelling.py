"""Gathered calls and their cancellation, in `loops_async`: there are no tasks in `loops_sync`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from loops_async import AdamParams, OperationFuture, ServiceClient, TrainingClient
from loops_async._http import body
from loops_local import LocalService
from tests.support.colours import Async, Colour
from tests.support.engines import WatchedEngine
from tests.support.held import Held
from tests.support.work import FEW_TOKENS, PROMPT, body_of, eventually, example, train, version_sampled


@pytest.fixture
def colour() -> Colour:
    return Async()


async def test_gathered_calls_keep_their_order(trainer: TrainingClient, engine: WatchedEngine) -> None:
    async def step(number: int) -> None:
        forward, optim = await asyncio.gather(
            trainer.forward_backward([example(number)]), trainer.optim_step(AdamParams(learning_rate=number))
        )
        await asyncio.gather(optim, forward)

    await asyncio.gather(*(step(number) for number in range(1, 17)))
    assert engine.done == [
        done for number in range(1, 17) for done in (("forward_backward", number), ("optim_step", number))
    ]


async def test_a_large_call_is_not_overtaken_while_it_is_encoded(
    trainer: TrainingClient, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "SLICE_SECONDS", 0.0)  # encoding gives others a turn after each example
    large = trainer.forward_backward([example(number) for number in range(1, 50)])
    forward, optim = await asyncio.gather(large, trainer.optim_step(AdamParams(learning_rate=9.0)))
    await asyncio.gather(forward, optim)
    assert engine.done == [("forward_backward", 1), ("optim_step", 9.0)]


async def test_a_waiter_that_is_cancelled_harms_no_other(trainer: TrainingClient, engine: WatchedEngine) -> None:
    engine.training.clear()
    future = await trainer.forward([example()])
    waiters = [asyncio.ensure_future(future.result()) for _ in range(6)]
    await asyncio.sleep(0)
    for waiter in waiters[::2]:
        waiter.cancel()
    await asyncio.wait(waiters[::2])

    assert all(waiter.cancelled() for waiter in waiters[::2])
    engine.training.set()
    outputs = await asyncio.gather(*waiters[1::2])
    assert await future == outputs[0]


async def test_a_call_that_waits_for_its_turn_can_be_cancelled(
    trainer: TrainingClient, engine: WatchedEngine, local: LocalService
) -> None:
    first = Held(local.faults, f"POST */{trainer.run_id}/forward_backward")
    coroutines: list[Coroutine[Any, Any, OperationFuture[Any]]] = [
        trainer.forward_backward([example(1)]),
        trainer.optim_step(AdamParams(learning_rate=2.0)),
        trainer.forward([example(3)]),
        trainer.forward([example(4)]),
    ]
    calls = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0)
    calls[1].cancel()
    calls[2].cancel()
    first.let_go()

    await (await calls[0])
    await (await calls[3])
    assert calls[1].cancelled()
    assert calls[2].cancelled()
    assert engine.done == [("forward_backward", 1), ("forward", 4)]


async def test_a_call_that_is_on_its_way_is_done(
    trainer: TrainingClient, engine: WatchedEngine, local: LocalService
) -> None:
    held = Held(local.faults, f"POST */{trainer.run_id}/forward_backward")
    call = asyncio.ensure_future(trainer.forward_backward([example(1)]))
    later = asyncio.ensure_future(trainer.forward([example(2)]))
    await eventually(lambda: held.arrived)
    call.cancel()
    held.let_go()

    await (await later)
    assert call.cancelled()
    assert engine.done == [("forward_backward", 1), ("forward", 2)]


async def test_a_cancelled_sample_gives_up_its_place(service: ServiceClient, engine: WatchedEngine) -> None:
    sampler = await service.create_sampling_client(engine.name)
    engine.hold_samples()
    calls = [asyncio.ensure_future(sampler.sample(PROMPT, 1, FEW_TOKENS)) for _ in range(4)]
    await eventually(lambda: engine.waiting_samples == 4)
    calls[0].cancel()
    await eventually(lambda: engine.waiting_samples == 3)
    engine.release_samples()

    assert all(answer.sequences for answer in await asyncio.gather(*calls[1:]))
    assert calls[0].cancelled()


async def test_a_cancelled_wait_for_a_sampler_harms_no_other(local: LocalService, trainer: TrainingClient) -> None:
    await train(trainer)
    local.faults.answer("GET */sync/trainers_policy_version", 200, {"policy_version": 0})
    first = asyncio.ensure_future(trainer.save_weights_and_get_sampling_client("a"))
    second = asyncio.ensure_future(trainer.save_weights_and_get_sampling_client("b"))
    await asyncio.sleep(0)
    first.cancel()
    assert await version_sampled(await second) == 1


async def test_a_time_limit_around_a_call_ends_it(trainer: TrainingClient, engine: WatchedEngine) -> None:
    engine.training.clear()
    future = await trainer.forward([example()])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await future
    engine.training.set()
    assert (await future).loss_fn_outputs


async def test_one_failure_in_a_group_cancels_the_others_cleanly(
    trainer: TrainingClient, engine: WatchedEngine, service: ServiceClient
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    engine.hold_samples()

    async def fail() -> None:
        await eventually(lambda: engine.waiting_samples == 2)
        raise ZeroDivisionError

    async def gather_or_raise() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(sampler.sample(PROMPT, 1, FEW_TOKENS))
            group.create_task(sampler.sample(PROMPT, 1, FEW_TOKENS))
            group.create_task(fail())

    with pytest.raises(ExceptionGroup) as raised:
        await gather_or_raise()
    assert [type(error) for error in raised.value.exceptions] == [ZeroDivisionError]
    engine.release_samples()
    assert (await (await trainer.forward([example()]))).loss_fn_outputs


async def test_a_creation_that_is_cancelled_before_its_answer_leaves_nothing(
    service: ServiceClient, engine: WatchedEngine, local: LocalService
) -> None:
    held = Held(local.faults, "POST */runs")
    creating = asyncio.create_task(service.create_lora_training_client(engine.name))
    await eventually(lambda: held.arrived)
    creating.cancel()
    held.let_go()
    with pytest.raises(asyncio.CancelledError):
        await creating
    (run,) = await service.control_plane.list_runs(base_model=engine.name)
    assert run.status.name == "INACTIVE"


async def test_gathered_calls_of_two_clients_of_a_run_keep_one_order(
    local: LocalService, service: ServiceClient, trainer: TrainingClient, engine: WatchedEngine
) -> None:
    sent = local.faults.watch(f"POST */{trainer.run_id}/*", times=6)
    attached = await service.attach_training_client(trainer.run_id)
    calls: list[Coroutine[Any, Any, OperationFuture[Any]]] = [
        trainer.forward([example(1)]),
        attached.optim_step(AdamParams(learning_rate=2.0)),
        trainer.forward([example(3)]),
        attached.optim_step(AdamParams(learning_rate=4.0)),
    ]
    for future in await asyncio.gather(*calls):
        await future
    assert [body_of(request)["seq_id"] for request in sent] == [2, 3, 4, 5]
    assert engine.done == [("forward", 1), ("optim_step", 2.0), ("forward", 3), ("optim_step", 4.0)]

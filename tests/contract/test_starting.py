"""Calls that are started without waiting, from any thread, and futures for all threads and event loops."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, as_completed
from functools import partial
from typing import Any

import pytest

import loops_async
import loops_sync
from loops_async import (
    AdamParams,
    BadRequestError,
    CallFuture,
    CallTimeoutError,
    ClosedError,
    InputError,
    RemoteOpError,
    ServiceClient,
    TrainingClient,
)
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.held import Held
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import FEW_TOKENS, PROMPT, REFUSED, eventually, example


class Starter:
    """Starts calls of one colour in a thread that runs no event loop."""

    def __init__(self, colour: Colour) -> None:
        self._colour = colour

    async def __call__(self, client: Any, name: str, *args: Any, **kwargs: Any) -> CallFuture[Any]:
        [future] = await self.all(client, (name, *args), **kwargs)
        return future

    async def all(self, client: Any, *calls: tuple[Any, ...], **kwargs: Any) -> list[CallFuture[Any]]:
        """Start several calls, one after the other."""
        start: Callable[..., CallFuture[Any]] = self._colour.module.start
        own = self._colour.own(client)

        def started() -> list[CallFuture[Any]]:
            return [start(getattr(own, name), *args, **kwargs) for name, *args in calls]

        return await asyncio.to_thread(started)


@pytest.fixture
def start(colour: Colour) -> Starter:
    return Starter(colour)


async def test_the_order_of_starts_is_that_of_operations(
    trainer: TrainingClient, start: Starter, engine: WatchedEngine
) -> None:
    passes = [("forward_backward", [example(number)]) for number in range(20)]
    await asyncio.gather(*await start.all(trainer, *passes))
    assert engine.done == [("forward_backward", number) for number in range(20)]


async def test_blocking_and_started_calls_of_a_thread_share_one_order(
    local: LocalService, engine: WatchedEngine
) -> None:
    def use() -> None:
        with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            trainer = service.create_lora_training_client(engine.name)
            step = loops_sync.start(trainer.forward_backward, [example(1)])
            trainer.optim_step(AdamParams(learning_rate=0.5))
            loops_sync.start(trainer.forward, [example(2)]).result(PATIENCE_SECONDS)
            assert step.result(0).loss_fn_outputs

    await asyncio.to_thread(use)
    assert engine.done == [("forward_backward", 1), ("optim_step", 0.5), ("forward", 2)]


async def test_the_result_is_that_of_the_call(trainer: TrainingClient, start: Starter) -> None:
    direct = await (await trainer.forward([example()]))
    started = await start(trainer, "forward", [example()])
    assert await started == direct == await started.result_async(1)
    assert started.done()
    assert not started.cancelled()
    assert await asyncio.to_thread(started.result) == direct


async def test_a_client_that_comes_of_a_started_call_is_of_the_colour(
    trainer: TrainingClient, start: Starter, colour: Colour
) -> None:
    sampler = await (await start(trainer, "save_weights_and_get_sampling_client", "a"))
    assert isinstance(sampler, colour.module.SamplingClient)
    answer = await (await start(colour.adopt(sampler), "sample", PROMPT, 2, FEW_TOKENS))
    assert len(answer.sequences) == 2


async def test_any_loop_and_thread_may_wait(trainer: TrainingClient, start: Starter, engine: WatchedEngine) -> None:
    engine.training.clear()
    started = await start(trainer, "forward", [example()])

    def in_a_loop() -> Any:
        async def wait() -> Any:
            return await started

        return [asyncio.run(wait()), asyncio.run(wait())]

    waiting = [asyncio.create_task(asyncio.to_thread(wait)) for wait in (in_a_loop, started.result, in_a_loop)]
    await eventually(lambda: engine.begun)
    engine.training.set()
    (first, again), plain, _ = await asyncio.gather(*waiting)
    assert first == again == plain == await started


async def test_a_wait_that_ends_early_harms_nothing(
    trainer: TrainingClient, start: Starter, engine: WatchedEngine
) -> None:
    engine.training.clear()
    started = await start(trainer, "forward", [example()])
    for wait in (started.result_async(0.01), asyncio.to_thread(started.result, 0.01)):
        with pytest.raises(CallTimeoutError, match=r"no result of forward within 0.01 s; the call continues") as ended:
            await wait
        assert ended.value.retryable
    cancelled = asyncio.ensure_future(started.result_async())
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert cancelled.cancelled()
    engine.training.set()
    assert (await started).loss_fn_outputs


async def test_what_is_cancelled_before_its_turn_is_not_sent(
    trainer: TrainingClient, start: Starter, engine: WatchedEngine, local: LocalService
) -> None:
    held = Held(local.faults, f"POST */{trainer.run_id}/forward")
    first, second, third = await start.all(trainer, *(("forward", [example(number)]) for number in range(3)))
    await eventually(lambda: held.arrived)
    assert second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    with pytest.raises(CancelledError):
        second.result()
    assert second.cancelled()
    held.let_go()
    await asyncio.gather(first, third)
    assert not first.cancel()
    assert engine.done == [("forward", 0), ("forward", 2)]


async def test_a_cancelled_sample_is_dropped(
    trainer: TrainingClient, start: Starter, engine: WatchedEngine, colour: Colour
) -> None:
    sampler = await trainer.save_weights_and_get_sampling_client("a")
    engine.hold_samples()
    started = await start(sampler, "sample", PROMPT, 1, FEW_TOKENS)
    await eventually(lambda: engine.waiting_samples)
    # What asyncio makes of the plain future passes the cancellation on.
    task = asyncio.wrap_future(started.future())
    task.cancel()
    await eventually(lambda: not engine.waiting_samples)
    assert started.cancelled()


async def test_the_plain_future(trainer: TrainingClient, start: Starter) -> None:
    started = await start.all(trainer, ("forward", [example(1)]), ("forward", [example(2)]))
    futures = [each.future() for each in started]
    done = await asyncio.to_thread(lambda: list(as_completed(futures, PATIENCE_SECONDS)))
    assert set(done) == set(futures)
    assert all(future.result().loss_fn_outputs for future in futures)


async def test_errors_are_those_of_the_call_and_of_its_operation(trainer: TrainingClient, start: Starter) -> None:
    refused, failing = await start.all(trainer, ("forward", []), ("forward", [REFUSED]))
    with pytest.raises(InputError, match="data"):
        await refused
    for _ in range(2):
        with pytest.raises(RemoteOpError):
            await failing
    missing = await start(trainer, "create_sampling_client", f"bt://loops:{trainer.run_id}/sampler_weights/none")
    with pytest.raises(BadRequestError):
        await missing


async def test_a_failure_that_nobody_sees_is_logged(
    trainer: TrainingClient, start: Starter, caplog: pytest.LogCaptureFixture
) -> None:
    def logged() -> bool:
        gc.collect()
        return any("forward failed, and its result was never waited for" in text for text in caplog.messages)

    with caplog.at_level(logging.WARNING, "loops_async"):
        failing = await start(trainer, "forward", [REFUSED])
        await eventually(failing.done)
        del failing
        await eventually(logged)


async def test_the_lists_of_a_call_may_be_changed_at_once(
    trainer: TrainingClient, colour: Colour, engine: WatchedEngine
) -> None:
    data = [example(7)]

    def started() -> CallFuture[Any]:
        future: CallFuture[Any] = colour.module.start(colour.own(trainer).forward, data)
        data.clear()
        return future

    assert (await (await asyncio.to_thread(started))).loss_fn_outputs
    assert engine.done == [("forward", 7)]


async def test_what_cannot_be_started(trainer: TrainingClient, colour: Colour) -> None:
    with pytest.raises(InputError, match=r"call: must be a .*method"):
        await asyncio.to_thread(partial(colour.module.start, print))


async def test_what_needs_a_thread_that_waits_cannot_be_started(local: LocalService, engine: WatchedEngine) -> None:
    def use() -> None:
        with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            sampler = service.create_sampling_client(engine.name)
            with pytest.raises(InputError, match=r"call: sample_many returns an iterator.*cannot be started"):
                loops_sync.start(sampler.sample_many, [PROMPT])
            with pytest.raises(InputError, match="call: close ends all calls"):
                loops_sync.start(service.close)
            with pytest.raises(InputError, match="call: training_run returns a context"):
                loops_sync.start(service.training_run, engine.name)
            with pytest.raises(InputError, match="call: create_lora_training_client has a callback"):
                loops_sync.start(service.create_lora_training_client, engine.name, on_progress=print)
            assert loops_sync.start(service.create_lora_training_client, engine.name).result().run_id

    await asyncio.to_thread(use)


async def test_closing_the_client_ends_its_calls(colour: Colour, local: LocalService, engine: WatchedEngine) -> None:
    start = Starter(colour)
    engine.training.clear()
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
        trainer = await service.create_lora_training_client(engine.name)
        started = await start(trainer, "forward", [example()])
        await eventually(lambda: engine.begun)
    with pytest.raises(ClosedError):
        await started


async def test_a_client_refuses_on_its_own_loop(local: LocalService, engine: WatchedEngine) -> None:
    async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        trainer = await service.create_lora_training_client(engine.name)
        with pytest.raises(ClosedError, match=r"forward would start after what this event loop awaits next: await"):
            loops_async.start(trainer.forward, [example()])
        engine.training.clear()
        started = await asyncio.to_thread(lambda: loops_async.start(trainer.forward, [example()]))
        with pytest.raises(ClosedError, match="waiting for forward on the event loop that runs it"):
            started.result()
        engine.training.set()
        assert (await started).loss_fn_outputs


async def test_a_loop_that_has_ended_is_told(local: LocalService, engine: WatchedEngine) -> None:
    is_open, may_end = threading.Event(), threading.Event()
    clients: list[TrainingClient] = []

    async def serve() -> None:
        async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            clients.append(await service.create_lora_training_client(engine.name))
            is_open.set()
            await asyncio.to_thread(may_end.wait, PATIENCE_SECONDS)

    serving = asyncio.create_task(asyncio.to_thread(asyncio.run, serve()))
    await asyncio.to_thread(is_open.wait, PATIENCE_SECONDS)
    engine.training.clear()
    started = loops_async.start(clients[0].forward, [example()])  # this loop is another one
    may_end.set()
    await serving
    with pytest.raises(ClosedError):
        await started
    with pytest.raises(ClosedError, match="forward cannot start"):
        loops_async.start(clients[0].forward, [example()])

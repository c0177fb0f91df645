"""Futures of calls: any thread, any event loop, any number of times."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import pickle
import threading
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest

import loops_tinker as tinker
from loops_local import LocalService, serve_in_thread
from loops_sync._bridge import current
from loops_tinker import types
from loops_tinker.futures import AwaitableConcurrentFuture, in_thread
from tests.support.patience import PATIENCE_SECONDS

PROMPT = types.ModelInput.from_ints([65, 66, 67])
PARAMS = types.SamplingParams(max_tokens=4)


def endless() -> AwaitableConcurrentFuture[int]:
    return AwaitableConcurrentFuture(Future())


def test_a_result_is_waited_for_in_many_ways(trainer: tinker.TrainingClient, datum: types.Datum) -> None:
    passed = trainer.forward_backward([datum], "cross_entropy")

    async def here() -> types.ForwardBackwardOutput:
        return await passed

    first = passed.result(timeout=PATIENCE_SECONDS)
    assert asyncio.run(here()) is first
    assert asyncio.run(here()) is first
    assert asyncio.run(passed.result_async(timeout=PATIENCE_SECONDS)) is first
    with ThreadPoolExecutor() as threads:
        assert {id(each) for each in threads.map(lambda _: passed.result(), range(4))} == {id(first)}
    assert passed.future().result() is first
    assert issubclass(type(passed), tinker.APIFuture[types.ForwardBackwardOutput].__origin__)


def test_samples_are_concurrent_futures(trainer: tinker.TrainingClient) -> None:
    sampler = trainer.save_weights_and_get_sampling_client()
    futures: list[Any] = [sampler.sample(PROMPT, 1, PARAMS) for _ in range(4)]
    assert all(isinstance(each, Future) for each in futures)
    assert {each.result().sequences[0].stop_reason for each in concurrent.futures.as_completed(futures)}
    assert not concurrent.futures.wait(futures).not_done


def test_a_client_on_its_way_is_that_client(echo: LocalService) -> None:
    trainer = tinker.ServiceClient().create_lora_training_client("echo")
    assert isinstance(trainer, tinker.TrainingClient)
    assert isinstance(trainer, tinker.APIFuture)
    sampler = trainer.save_weights_and_get_sampling_client()
    assert isinstance(sampler, tinker.SamplingClient)
    assert type(pickle.loads(pickle.dumps(sampler))) is tinker.SamplingClient
    assert type(sampler.result()) is tinker.SamplingClient
    assert repr(sampler) == "<BackcompatSamplingClientFuture done>"


async def test_many_calls_in_order_from_a_coroutine(trainer: tinker.TrainingClient, datum: types.Datum) -> None:
    steps = [
        (trainer.forward_backward([datum], "cross_entropy"), trainer.optim_step(types.AdamParams())) for _ in range(5)
    ]
    numbers = [(await stepped).metrics for _, stepped in steps]
    assert [metrics["step:mean"] for metrics in numbers if metrics] == [1, 2, 3, 4, 5]


async def test_a_time_out_harms_nothing() -> None:
    source: Future[int] = Future()
    future = AwaitableConcurrentFuture[int](source)
    for wait in (future.result_async(timeout=0.001), asyncio.wait_for(future, 0.001)):
        with pytest.raises(TimeoutError):
            await wait
    with pytest.raises(TimeoutError, match="the call continues"):
        await asyncio.to_thread(future.result, 0.001)
    source.set_result(3)
    assert await future == 3


async def test_cancelling_a_waiter_ends_a_sample_and_no_operation() -> None:
    for ends in (True, False):
        source: Future[int] = Future()
        future = AwaitableConcurrentFuture[int](source, ends_with_waiter=ends)
        waiter = asyncio.create_task(future.coroutine())
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        await asyncio.sleep(0)
        assert source.cancelled() is ends


def test_cancelling_a_future_ends_its_call() -> None:
    future = endless()
    assert future.cancel()
    assert future._source.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()


async def test_waiting_without_await_in_a_coroutine_works_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    go = threading.Event()
    future = in_thread(lambda: go.wait(PATIENCE_SECONDS))
    threading.Timer(0.05, go.set).start()
    assert future.result()
    assert [record.message for record in caplog.records if "holds the event loop" in record.message]


async def test_calls_that_end_together_wake_a_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, woken = asyncio.get_running_loop(), list[str]()
    call_soon = loop.call_soon_threadsafe

    def count(*args: Any, **kwargs: Any) -> asyncio.Handle:
        woken.append(threading.current_thread().name)
        return call_soon(*args, **kwargs)

    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    sources = [Future[int]() for _ in range(8)]
    waiting = [asyncio.create_task(AwaitableConcurrentFuture[int](source).coroutine()) for source in sources]
    await asyncio.sleep(0)

    def end() -> None:
        for number, source in enumerate(sources):
            source.set_result(number)

    current().loop.call_soon_threadsafe(end)
    assert await asyncio.gather(*waiting) == list(range(8))
    assert woken == ["loops_sync"]


def test_an_error_is_raised_to_each_waiter() -> None:
    def fails() -> None:
        raise KeyError("x")

    future = in_thread(fails)
    for _ in range(2):
        with pytest.raises(KeyError):
            future.result()


def in_worker(sampler: tinker.SamplingClient, handle: str) -> list[int]:
    """Sample in another process."""
    others = (sampler, tinker.SamplingClient.from_sampler_handle(handle))
    return [len(each.sample(PROMPT, 2, PARAMS).result().sequences) for each in others]


def test_spawned_workers_sample_with_pickled_clients(
    echo: LocalService, trainer: tinker.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BASETEN_API_KEY")
    monkeypatch.setenv("TINKER_API_KEY", echo.api_key)
    sampler = trainer.save_weights_and_get_sampling_client()
    handle = sampler.get_sampler_handle()
    assert echo.api_key not in handle
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
        assert workers.submit(in_worker, sampler, handle).result() == [2, 2]


def test_a_script_deactivates_what_it_closes() -> None:
    with serve_in_thread(engine="echo", provisioning_seconds=0.02) as local:
        with tinker.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            trainer = service.create_lora_training_client("echo").result()
        with pytest.raises(tinker.APIError, match="deactivated"):
            trainer.save_state("x").result()

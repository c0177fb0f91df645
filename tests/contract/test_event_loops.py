"""Event loops and threads: which may call a client, and that dropped clients leave neither threads nor tasks."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

import loops_async
import loops_sync
from loops_async import AdamParams, ClosedError, ServiceClient
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import FEW_TOKENS, PROMPT, example, train


async def test_another_event_loop_gets_a_clear_error(local: LocalService, engine: WatchedEngine) -> None:
    async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        trainer = await service.create_lora_training_client(engine.name)
        sampler = await service.create_sampling_client(engine.name)
        done = await trainer.forward([example(1)])
        output = await done
        engine.training.clear()
        under_way = await trainer.forward([example(2)])
        calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
            service.get_server_capabilities,
            trainer.policy_version,
            partial(trainer.forward, [example(3)]),
            partial(service.create_lora_training_client, engine.name),
            partial(sampler.sample, PROMPT),
            sampler.ensure_ready,
            under_way.result,
        ]
        for call in calls:
            with pytest.raises(ClosedError, match=r"belongs to another event loop.*loops_sync"):
                await asyncio.to_thread(_run, call)

        engine.training.set()
        assert (await under_way).loss_fn_outputs
        assert await asyncio.to_thread(_run, done.result) == output
        await train(trainer)
        assert engine.done[1:3] == [("forward", 2), ("forward_backward", 1)]


def _run(call: Callable[[], Coroutine[Any, Any, object]]) -> object:
    return asyncio.run(asyncio.wait_for(call(), PATIENCE_SECONDS))


async def test_the_blocking_client_may_be_called_from_anywhere(local: LocalService, engine: WatchedEngine) -> None:
    def use(trainer: loops_sync.TrainingClient) -> int:
        return len(trainer.forward([example()]).result().loss_fn_outputs)

    async def use_in_a_loop(trainer: loops_sync.TrainingClient) -> int:
        return use(trainer)

    with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        trainer = service.create_lora_training_client(engine.name)
        assert use(trainer) == 1
        assert await asyncio.gather(*(asyncio.to_thread(use, trainer) for _ in range(4))) == [1] * 4
        assert await asyncio.to_thread(asyncio.run, use_in_a_loop(trainer)) == 1


async def test_clients_that_are_dropped_leave_nothing(
    service: ServiceClient, colour: Colour, engine: WatchedEngine
) -> None:
    async def use() -> weakref.ref[Any]:
        trainer = await service.create_lora_training_client(engine.name)
        await train(trainer)
        sampler = await trainer.save_weights_and_get_sampling_client("one")
        await sampler.sample(PROMPT, 1, FEW_TOKENS)
        return weakref.ref(colour.own(sampler))

    await use()
    tasks = len(asyncio.all_tasks())
    dropped = [await use() for _ in range(5)]
    gc.collect()
    assert [one() for one in dropped] == [None] * 5
    assert len(asyncio.all_tasks()) <= tasks
    assert not [one for one in threading.enumerate() if "loops_async" in one.name]


def test_the_blocking_clients_of_a_process_share_one_thread(local: LocalService) -> None:
    for _ in range(5):
        loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key).get_server_capabilities()
    gc.collect()
    assert [one.name for one in threading.enumerate()].count("loops_sync") == 1


def test_several_runs_of_asyncio_each_with_its_own_client(local: LocalService, engine: WatchedEngine) -> None:
    async def use() -> int:
        async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            sampler = await service.create_sampling_client(engine.name)
            return len((await sampler.sample(PROMPT, 3, FEW_TOKENS)).sequences)

    assert [asyncio.run(use()) for _ in range(3)] == [3, 3, 3]


def test_a_client_of_an_earlier_run_says_that_it_is_over(local: LocalService, engine: WatchedEngine) -> None:
    async def make() -> loops_async.SamplingClient:
        async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            return await service.create_sampling_client(engine.name)

    sampler = asyncio.run(make())
    with pytest.raises(ClosedError, match="create a new ServiceClient"):
        asyncio.run(sampler.sample(PROMPT))


@pytest.mark.skipif(sys.platform == "win32", reason="uvloop is not for Windows")
def test_training_and_sampling_on_uvloop() -> None:
    import uvloop

    async def main() -> list[int]:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        async with (
            LocalService(engine="echo") as local,
            ServiceClient(base_url=local.base_url, api_key=local.api_key) as service,
        ):
            trainer = await service.create_lora_training_client("echo")
            step = await trainer.forward_backward([example()] * 64)
            await (await trainer.optim_step(AdamParams()))
            assert len((await step).loss_fn_outputs) == 64
            sampler = await trainer.save_weights_and_get_sampling_client("uvloop")
            answers = sampler.sample_many([[number] for number in range(100)], limit=16, ordered=True)
            return [answer.index async for answer in answers]

    assert uvloop.run(main()) == list(range(100))


async def use_everything(service: ServiceClient, model: str) -> None:
    trainer = await service.create_lora_training_client(model)
    await asyncio.gather(*(train(trainer) for _ in range(3)))
    sampler = await trainer.save_weights_and_get_sampling_client("x")
    answers = [done async for done in sampler.sample_many([PROMPT] * 20, sampling_params=FEW_TOKENS, limit=4)]
    assert len(answers) == 20
    cancelled = asyncio.create_task(trainer.forward([example()]))
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert (await (await trainer.forward([example()]))).loss_fn_outputs


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
async def test_client_and_service_in_a_loop_with_eager_tasks() -> None:
    loop = asyncio.get_running_loop()
    factory = loop.get_task_factory()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 - older Pythons lack it
    try:
        async with (
            LocalService(engine="echo", provisioning_seconds=0.0) as local,
            ServiceClient(base_url=local.base_url, api_key=local.api_key) as service,
            asyncio.timeout(PATIENCE_SECONDS),
        ):
            await use_everything(service, "echo")
    finally:
        loop.set_task_factory(factory)

"""Samplers that are created when they are needed, and samplers that many places of a program share."""

from __future__ import annotations

import asyncio

import pytest

from loops_async import AdamParams, InputError, ServiceClient, TrainingClient
from loops_local import LocalService
from tests.support.engines import WatchedEngine
from tests.support.work import FEW_TOKENS, PROMPT, eventually, example, train, version_sampled


@pytest.fixture
async def trainer(service: ServiceClient, engine: WatchedEngine) -> TrainingClient:
    return await service.create_lora_training_client(engine.name, rank=8, seed=3, with_sampler=False)


async def test_a_run_that_never_samples_has_no_sampler(
    trainer: TrainingClient, service: ServiceClient, local: LocalService
) -> None:
    created = local.faults.watch("POST */samplers", times=9)
    await train(trainer)
    await (await trainer.save_state("end"))
    assert (await service.control_plane.get_run(trainer.run_id)).sampler is None
    assert created == []
    await trainer.deactivate()


async def test_the_first_need_creates_one_for_all(
    trainer: TrainingClient, service: ServiceClient, local: LocalService
) -> None:
    created = local.faults.watch("POST */samplers", times=9)
    await train(trainer)
    live, frozen = await asyncio.gather(trainer.save_weights_and_get_sampling_client("a"), trainer.snapshot())
    await train(trainer)
    newer = await trainer.save_weights_and_get_sampling_client("b")
    assert [await version_sampled(one) for one in (live, frozen, newer)] == [2, 1, 2]
    assert len(created) == 1
    assert {one.sampler_id for one in (live, frozen, newer)} == {live.sampler_id}
    run = await service.control_plane.get_run(trainer.run_id)
    assert run.sampler is not None
    assert run.sampler.id == live.sampler_id


async def test_weights_are_published_in_the_order_of_the_calls(trainer: TrainingClient, local: LocalService) -> None:
    """The sampler is created after the operation has taken its turn."""
    creating = local.faults.delay("POST */samplers", 0.3)
    await trainer.forward_backward([example()])
    saving = asyncio.ensure_future(trainer.save_weights_and_get_sampling_client("a"))
    await eventually(lambda: bool(creating))
    await (await trainer.optim_step(AdamParams(learning_rate=0.5)))
    assert await version_sampled(await saving) == 0


async def test_replicas_of_a_sampler_that_is_left_out(service: ServiceClient, engine: WatchedEngine) -> None:
    with pytest.raises(InputError, match="sampler_num_replicas: is for the sampler that with_sampler=False leaves out"):
        await service.create_lora_training_client(engine.name, with_sampler=False, sampler_num_replicas=2)


async def test_a_block_may_go_without_a_sampler(service: ServiceClient, engine: WatchedEngine) -> None:
    async with service.training_run(engine.name, with_sampler=False) as trainer:
        assert trainer.run.sampler is None
        await train(trainer)


async def test_shared_samplers(service: ServiceClient, engine: WatchedEngine, local: LocalService) -> None:
    created = local.faults.watch("POST */samplers", times=9)
    one, two = await asyncio.gather(*(service.create_sampling_client(engine.name, shared=True) for _ in range(2)))
    own = await service.create_sampling_client(engine.name)
    longer = await service.create_sampling_client(engine.name, max_seq_len=100, shared=True)
    assert one.sampler_id == two.sampler_id
    assert len({one.sampler_id, own.sampler_id, longer.sampler_id}) == len(created) == 3
    await one.deactivate()
    again = await service.create_sampling_client(engine.name, shared=True)
    assert again.sampler_id != one.sampler_id
    assert (await again.sample(PROMPT, 1, FEW_TOKENS)).sequences


async def test_shared_samplers_of_a_checkpoint(service: ServiceClient, trainer: TrainingClient) -> None:
    """As long as the checkpoint is the same."""
    samplers = []
    for _ in range(2):
        path = (await (await trainer.save_weights_for_sampler("same", publish=False))).path
        pair = [await service.create_sampling_client_from_checkpoint(path, shared=True) for _ in range(2)]
        assert pair[0].sampler_id == pair[1].sampler_id
        samplers.append(pair[0])
        await train(trainer)
    assert [await version_sampled(one) for one in samplers] == [0, 1]

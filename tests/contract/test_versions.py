"""Which weights answer: published while training goes on, pinned, or staged."""

from __future__ import annotations

import asyncio

import pytest

from loops_async import ServiceClient, TrainingClient
from loops_local import LocalService
from tests.support.engines import WatchedEngine
from tests.support.work import FEW_TOKENS, PROMPT, eventually, train, version_behind, version_sampled

STEPS = 6
SAMPLES = 32


async def test_a_client_never_samples_older_weights_while_training_goes_on(trainer: TrainingClient) -> None:
    seen: list[tuple[int, int, int]] = []

    async def sample(floor: int) -> None:
        sampler = await trainer.save_weights_and_get_sampling_client(f"step-{floor}")
        answers = await asyncio.gather(*(sampler.sample(PROMPT, 1, FEW_TOKENS) for _ in range(SAMPLES)))
        seen.extend((floor, one.policy_version or 0, version_behind(PROMPT, one.sequences[0])) for one in answers)

    async with asyncio.TaskGroup() as samples:
        for floor in range(1, STEPS + 1):
            await train(trainer)
            samples.create_task(sample(floor))

    assert len(seen) == STEPS * SAMPLES
    assert all(floor <= claimed == true for floor, claimed, true in seen)


async def test_a_client_waits_rather_than_sample_older_weights(trainer: TrainingClient, local: LocalService) -> None:
    await train(trainer, steps=2)
    sampler = await trainer.save_weights_and_get_sampling_client("two")
    await (await trainer.init_trainer_server(8))
    await (await trainer.save_weights_for_sampler("none"))

    requests = local.faults.watch("POST */sample")
    sampling = asyncio.ensure_future(version_sampled(sampler))
    await eventually(lambda: requests)
    await train(trainer, steps=2)
    await (await trainer.save_weights_for_sampler("two again"))
    assert await sampling == 2


async def test_a_pinned_client_keeps_its_weights(trainer: TrainingClient) -> None:
    await train(trainer)
    first = await (await trainer.save_weights_for_sampler("first"))
    pinned = await trainer.create_sampling_client(first.path)
    following = await trainer.save_weights_and_get_sampling_client("again")
    await train(trainer, steps=2)
    await (await trainer.save_weights_for_sampler("third"))

    assert await version_sampled(pinned) == 1
    assert await version_sampled(following) == 3
    assert pinned.min_policy_version is None


async def test_clients_of_one_run_do_not_see_another(service: ServiceClient, engine: WatchedEngine) -> None:
    one, other = [await service.create_lora_training_client(engine.name) for _ in range(2)]
    await train(one, steps=2)
    await train(other, steps=5)
    samplers = [await each.save_weights_and_get_sampling_client("same-name") for each in (one, other)]
    assert [await version_sampled(sampler) for sampler in samplers] == [2, 5]


async def test_before_any_step_the_base_model_answers(trainer: TrainingClient) -> None:
    sampler = await trainer.save_weights_and_get_sampling_client()
    assert sampler.min_policy_version is None
    assert await version_sampled(sampler) == 0


async def test_a_sampler_that_lags_behind_is_waited_for(trainer: TrainingClient, local: LocalService) -> None:
    await train(trainer, steps=2)
    lag = local.faults.answer("GET *trainers_policy_version", 200, {"policy_version": 1}, times=2)
    refusals = local.faults.answer("POST */sample", 408, {"error": "version 2 is not served yet"}, times=2)

    sampler = await trainer.save_weights_and_get_sampling_client("two")
    assert await version_sampled(sampler) == 2
    assert len(lag) == len(refusals) == 2


async def test_a_name_that_is_used_again_means_the_newer_weights(trainer: TrainingClient) -> None:
    await train(trainer)
    older = await trainer.save_weights_and_get_sampling_client("same")
    await train(trainer)
    newer = await trainer.save_weights_and_get_sampling_client("same")
    assert (older.min_policy_version, newer.min_policy_version) == (1, 2)
    pinned = await trainer.create_sampling_client(f"bt://loops:{trainer.run_id}/sampler_weights/same")
    assert await version_sampled(pinned) == 2


async def test_a_checkpoint_serves_until_the_floor_is_reached(trainer: TrainingClient) -> None:
    await train(trainer)
    saved = await (await trainer.save_weights_for_sampler("first", publish=False))
    pinned = await trainer.create_sampling_client(saved.path)
    ahead = await trainer.create_sampling_client(saved.path, min_policy_version=2)
    assert [await version_sampled(one) for one in (pinned, ahead)] == [1, 1]
    await train(trainer)
    live = await trainer.save_weights_and_get_sampling_client("second")
    assert [await version_sampled(one) for one in (pinned, ahead, live)] == [1, 2, 2]
    assert [one.min_policy_version for one in (pinned, ahead, live)] == [None, 2, 2]


async def test_a_pinned_client_keeps_its_weights_when_the_name_is_used_again(
    trainer: TrainingClient, service: ServiceClient
) -> None:
    path, samplers = "", []
    for steps in range(3):
        path = (await (await trainer.save_weights_for_sampler("eval", publish=False))).path
        samplers.append(await trainer.create_sampling_client(path))
        samplers.append(await service.create_sampling_client_from_checkpoint(path))
        await train(trainer)
        assert await version_sampled(samplers[0]) == 0, steps
    assert [await version_sampled(sampler) for sampler in samplers] == [0, 0, 1, 1, 2, 2]
    assert [one.checkpoint_id for one in await trainer.list_checkpoints()] == ["eval"]


async def test_a_snapshot_never_moves(trainer: TrainingClient) -> None:
    before = await trainer.snapshot(ttl_seconds=3600)
    await train(trainer)
    live = await trainer.save_weights_and_get_sampling_client("live")
    after = await trainer.snapshot()
    await train(trainer, steps=2)
    await trainer.save_weights_and_get_sampling_client("live")
    assert [await version_sampled(one) for one in (before, live, after)] == [0, 3, 1]
    names = [before.checkpoint_name, after.checkpoint_name]
    assert len({*names, "live"}) == 3
    checkpoints = {one.checkpoint_id: one for one in await trainer.list_checkpoints()}
    assert checkpoints.keys() == {*names, "live"}


@pytest.mark.parametrize("colour", ["async"], indirect=True)  # gathered threads have no order
async def test_a_snapshot_takes_its_turn(trainer: TrainingClient) -> None:
    snapshot, _ = await asyncio.gather(trainer.snapshot(), train(trainer))
    assert await version_sampled(snapshot) == 0

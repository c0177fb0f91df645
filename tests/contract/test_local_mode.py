"""A trainer and a sampler without a control plane and without a key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loops_async import ConfigError, NotFoundError, ServiceClient, TrainingClient
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.work import FEW_TOKENS, PROMPT, train, version_sampled


@pytest.fixture
async def service(colour: Colour, local: LocalService) -> AsyncIterator[ServiceClient]:
    async with colour.connected_locally(trainer_url=local.trainer_url, sampler_url=local.sampler_url) as service:
        yield service


async def test_it_has_a_run(trainer: TrainingClient, service: ServiceClient, engine: WatchedEngine) -> None:
    other = await service.create_lora_training_client(engine.name)
    assert service.session_id == "local"
    assert trainer.run_id
    assert trainer.run_id != other.run_id

    await train(trainer, steps=2)
    await trainer.health()
    assert [await trainer.policy_version(), await other.policy_version()] == [2, 0]


async def test_saving_and_loading(trainer: TrainingClient) -> None:
    await train(trainer)
    saved = await (await trainer.save_state("one"))
    await train(trainer)

    assert saved.path == f"bt://loops:{trainer.run_id}/weights/one"
    assert (await (await trainer.load_state_with_optimizer(saved.path))).step == 1
    assert (await (await trainer.load_state(saved.path))).step == 0


async def test_publishing_and_sampling(trainer: TrainingClient, service: ServiceClient) -> None:
    await train(trainer, steps=2)
    sampler = await trainer.save_weights_and_get_sampling_client("two")
    await train(trainer)
    await (await trainer.save_weights_for_sampler("three"))
    pinned = await trainer.create_sampling_client(f"bt://loops:{trainer.run_id}/sampler_weights/two")

    assert await version_sampled(sampler) == 3
    assert await version_sampled(pinned) == 2
    base = await service.create_sampling_client("any")
    assert (await base.sample(PROMPT, 1, FEW_TOKENS)).policy_version == 0


async def test_listing_and_downloading(trainer: TrainingClient, service: ServiceClient, tmp_path: Path) -> None:
    await (await trainer.save_state("one"))
    (checkpoint,) = await trainer.list_checkpoints()

    assert await service.list_checkpoints(trainer.run_id) == [checkpoint]
    assert (await service.get_checkpoint_archive_url(checkpoint.id)).total_count == 3
    assert (await service.download_checkpoint(checkpoint.id, dest_dir=tmp_path)).file_count == 3


async def test_going_on_from_a_checkpoint(
    trainer: TrainingClient, engine: WatchedEngine, service: ServiceClient
) -> None:
    await train(trainer, steps=2)
    saved = await (await trainer.save_state("two"))
    other = await service.create_lora_training_client(engine.name, rank=8, path=saved.path)
    assert (await (await other.load_state_with_optimizer(saved.path))).step == 2


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://key@127.0.0.1"])
async def test_urls_are_checked(colour: Colour, local: LocalService, url: str) -> None:
    with pytest.raises(ConfigError, match="sampler_url"):
        async with colour.connected_locally(trainer_url=local.trainer_url, sampler_url=url):
            pass


async def test_a_local_sampler_of_several_models_is_asked_for_the_right_one(colour: Colour) -> None:
    async with (
        LocalService(engine="echo", models=["first", "second"]) as several,
        colour.connected_locally(trainer_url=several.trainer_url, sampler_url=several.sampler_url) as service,
    ):
        sampler = await service.create_sampling_client("second")
        await sampler.sample([1])
        with pytest.raises(NotFoundError, match="no model 'third'"):
            await (await service.create_sampling_client("third")).sample([1])

"""A second client of a run that exists."""

from __future__ import annotations

import pytest

from loops_async import AdamParams, NotFoundError, ProvisioningEvent, ServiceClient, TrainingClient
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine


async def test_it_goes_on_where_the_run_stands(
    colour: Colour, local: LocalService, trainer: TrainingClient, engine: WatchedEngine
) -> None:
    await (await trainer.optim_step(AdamParams()))
    resets = local.faults.watch("POST */init_trainer_server")
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as elsewhere:
        stages: list[ProvisioningEvent] = []
        attached = await elsewhere.attach_training_client(trainer.run_id, on_progress=stages.append)
        assert [stage.id for stage in stages] == [trainer.run_id] * len(stages)
        assert stages[-1].stage == "ready"
        assert await attached.policy_version() == 1
        step = await (await attached.optim_step(AdamParams()))
    assert step.metrics is not None
    assert step.metrics["step"] == 2.0
    assert not resets
    assert attached.get_info().model_name == engine.name
    assert attached.get_info().lora_rank is None


async def test_an_unknown_run_is_not_found(service: ServiceClient) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        await service.attach_training_client("nowhere")


async def test_it_works_in_local_mode(colour: Colour, local: LocalService) -> None:
    urls = {"trainer_url": local.trainer_url, "sampler_url": local.sampler_url}
    async with colour.connected_locally(**urls) as service, colour.connected_locally(**urls) as elsewhere:
        trainer = await service.create_lora_training_client("echo", rank=4)
        await (await trainer.optim_step(AdamParams()))
        attached = await elsewhere.attach_training_client(trainer.run_id)
        assert await attached.policy_version() == 1
        sampler = await attached.save_weights_and_get_sampling_client("step-1")
        assert (await sampler.sample([1, 2])).policy_version == 1
        assert [one.checkpoint_id for one in await attached.list_checkpoints()] == ["step-1"]

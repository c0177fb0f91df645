"""A second client of a run that exists."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from loops_async import AdamParams, Datum, NotFoundError, ServiceClient, TrainingClient
from loops_local import LocalService

DATA = [Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3]})]


async def numbers(requests: list[Any]) -> list[int]:
    return [msgspec.json.decode(await request.read())["seq_id"] for request in requests]


async def test_it_goes_on_where_the_run_stands(local: LocalService, trainer: TrainingClient) -> None:
    await (await trainer.optim_step(AdamParams())).result()
    resets = local.faults.watch("POST */init_trainer_server")
    async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as elsewhere:
        attached = await elsewhere.attach_training_client(trainer.run_id)
        assert await attached.policy_version() == 1
        step = await (await attached.optim_step(AdamParams())).result()
    assert step.metrics is not None
    assert step.metrics["step"] == 2.0
    assert not resets
    assert attached.get_info().model_name == "echo"
    assert attached.get_info().lora_rank is None


async def test_clients_of_one_service_client_share_one_order(
    local: LocalService, service: ServiceClient, trainer: TrainingClient
) -> None:
    sent = local.faults.watch("POST */trainers/*", times=6)
    attached = await service.attach_training_client(trainer.run_id)
    clients = [trainer, attached, trainer, attached, trainer]
    await asyncio.gather(
        *(
            client.optim_step(AdamParams()) if turn % 2 else client.forward_backward(DATA)
            for turn, client in enumerate(clients)
        )
    )
    assert await numbers(sent) == [2, 3, 4, 5, 6]
    assert [request.path.rsplit("/")[-1] for request in sent] == [
        "forward_backward",
        "optim_step",
        "forward_backward",
        "optim_step",
        "forward_backward",
    ]


async def test_closing_one_client_leaves_the_trainer_kept_up_for_the_other(
    service: ServiceClient, trainer: TrainingClient
) -> None:
    attached = await service.attach_training_client(trainer.run_id)
    await trainer.close()
    assert service._live.heartbeat._pings
    await attached.close()
    assert not service._live.heartbeat._pings


async def test_an_unknown_run_is_not_found(service: ServiceClient) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        await service.attach_training_client("nowhere")


async def test_it_works_in_local_mode(local: LocalService) -> None:
    urls = {"trainer_url": local.trainer_url, "sampler_url": local.sampler_url}
    async with ServiceClient.local(**urls) as service, ServiceClient.local(**urls) as elsewhere:
        trainer = await service.create_lora_training_client("echo", rank=4)
        await (await trainer.optim_step(AdamParams())).result()
        attached = await elsewhere.attach_training_client(trainer.run_id)
        assert await attached.policy_version() == 1
        sampler = await attached.save_weights_and_get_sampling_client("step-1")
        assert (await sampler.sample([1, 2])).policy_version == 1
        assert [one.checkpoint_id for one in await attached.list_checkpoints()] == ["step-1"]

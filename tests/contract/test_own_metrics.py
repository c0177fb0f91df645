"""Metrics of `trainer.log` on a service that shows them, and on others, which get nothing."""

from __future__ import annotations

import logging
import math
from typing import Any

import aiohttp
import numpy as np
import pytest
from yarl import URL

from loops_async import AdamParams, Datum, Episode, RolloutContext, SamplingParams, ServiceClient
from loops_local import LocalService
from tests.support.colours import Colour

DATA = [Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3]})]
SEND = "POST */metrics"


async def shown(local: LocalService, run_id: str) -> dict[str, Any]:
    """The points of each own curve of a run."""
    token = URL(local.dashboard_url).fragment.removeprefix("token=")
    headers = {"Authorization": f"Bearer {token}"}
    url = f"{local.base_url}/dashboard/data?run={run_id}"
    async with aiohttp.request("GET", url, headers=headers) as answer:
        curves = (await answer.json())["run"]["own"]
    return {curve["name"]: curve["points"] for curve in curves}


async def test_they_become_curves_of_the_run(local: LocalService, service: ServiceClient) -> None:
    trainer = await service.create_lora_training_client("echo", rank=4)
    for number in range(3):
        trainer.log({"reward": number / 2, "kl": np.float32(0.25)})
        trainer.log({"epoch": 1, "note": "text", "bad": math.nan, "huge": 10**400})
        await (await trainer.step(DATA, "cross_entropy", AdamParams()))
    await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    assert await shown(local, trainer.run_id) == {
        "reward": [[1, 0.0], [2, 0.5], [3, 1.0]],
        "kl": [[1, 0.25], [2, 0.25], [3, 0.25]],
        "epoch": [[1, 1.0], [2, 1.0], [3, 1.0]],
    }


async def test_what_the_last_step_has_is_sent_when_the_service_client_closes(
    colour: Colour, local: LocalService
) -> None:
    async with colour.connected(base_url=local.base_url, api_key=local.api_key, on_exit="deactivate") as service:
        trainer = await service.create_lora_training_client("echo", rank=4)
        trainer.log({"reward": 0.5})
        await (await trainer.optim_step(AdamParams()))
    assert await shown(local, trainer.run_id) == {"reward": [[1, 0.5]]}


async def test_the_metrics_of_rollouts_are_among_them(local: LocalService, service: ServiceClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([task])
        await ctx.sample(episode, SamplingParams(max_tokens=2))
        episode.reward = float(ctx.member)
        return episode

    trainer = await service.create_lora_training_client("echo", rank=4)
    async with trainer.rollouts(rollout, [65], group_size=2, groups_per_step=1) as stream:
        async for batch in stream:
            await (await trainer.step(batch.data, "ppo", AdamParams()))
    await trainer.close()
    assert (await shown(local, trainer.run_id))["reward/mean"] == [[1, 0.5]]


async def test_an_answer_that_is_lost_changes_nothing(local: LocalService, service: ServiceClient) -> None:
    lost = local.faults.lose_answer(SEND)
    trainer = await service.create_lora_training_client("echo", rank=4)
    trainer.log({"reward": 0.5})
    await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    assert len(lost) == 1
    assert await shown(local, trainer.run_id) == {"reward": [[1, 0.5]]}


@pytest.mark.parametrize(("status", "body"), [(200, {"supported_models": []}), (404, {})])
async def test_a_service_that_does_not_show_them_gets_none(
    local: LocalService, service: ServiceClient, status: int, body: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sent = local.faults.watch(SEND, times=100)
    asked = local.faults.answer("GET */capabilities", status, body, times=100)
    trainer = await service.create_lora_training_client("echo", rank=4)
    for _ in range(3):
        trainer.log({"reward": 0.5})
        await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    assert sent == []
    assert len(asked) == 1
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


async def test_without_own_metrics_nothing_is_asked(local: LocalService, service: ServiceClient) -> None:
    asked = local.faults.watch("GET */capabilities", times=100)
    trainer = await service.create_lora_training_client("echo", rank=4)
    await (await trainer.optim_step(AdamParams()))
    trainer.log({"note": "not a number"})
    await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    assert asked == []


async def test_training_goes_on_when_they_are_refused(
    local: LocalService, service: ServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    refused = local.faults.answer(SEND, 403, {"error": "not for you"}, times=100)
    trainer = await service.create_lora_training_client("echo", rank=4)
    trainer.log({"reward": 0.5})
    await (await trainer.optim_step(AdamParams()))
    await trainer.close()
    attached = await service.attach_training_client(trainer.run_id)
    await (await attached.optim_step(AdamParams()))
    assert len(refused) == 1
    (warning,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert trainer.run_id in warning
    assert "not for you" in warning


async def test_a_trainer_without_a_control_plane_sends_none(colour: Colour, local: LocalService) -> None:
    seen = local.faults.watch("* */metrics", times=100)
    async with colour.connected_locally(trainer_url=local.trainer_url, sampler_url=local.sampler_url) as service:
        trainer = await service.create_lora_training_client("echo", rank=4)
        trainer.log({"reward": 0.5})
        await (await trainer.optim_step(AdamParams()))
        await trainer.close()
    assert seen == []

"""What agents did, as the trainer sees it: the same probabilities as those that the sampler had."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from loops_async import ServiceClient
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.templates import FAMILIES

pytestmark = pytest.mark.torch

CLOSE = 1e-4


@pytest.fixture(scope="module")
def local(tiny: LocalService) -> LocalService:
    return tiny


@pytest.mark.parametrize("history", ["template", "keep"])
async def test_the_trainer_agrees_with_the_record(colour: Colour, service: ServiceClient, history: str) -> None:
    trainer = await service.create_lora_training_client("tiny", rank=8, seed=1)
    sampler = await trainer.save_weights_and_get_sampling_client("agents")
    template = FAMILIES["qwen3"][0]
    options: dict[str, Any] = {"history": history, "chat_template": template, "defaults": {"max_tokens": 12}}
    async with (
        colour.gateway(sampler, **options) as gateway,
        gateway.rollout() as rollout,
        aiohttp.ClientSession(headers={"authorization": f"Bearer {rollout.api_key}"}) as session,
    ):
        messages: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
        for turn in range(4):
            body = {"messages": messages, "seed": turn}
            async with session.post(f"{rollout.base_url}/chat/completions", json=body) as answer:
                [choice] = (await answer.json())["choices"]
            messages = [*messages, choice["message"], {"role": "user", "content": "go on"}]
            if turn == 1:
                messages = messages[:3]  # a rollback
    datums = rollout.to_datums(1.0)
    future = await trainer.forward(datums, "importance_sampling", loss_fn_config={"score_all_targets": True})
    outputs = (await future).loss_fn_outputs
    compared = 0
    for datum, output in zip(datums, outputs, strict=True):
        inputs = datum.loss_fn_inputs
        for position, trained in enumerate(inputs["mask"].data):
            if trained:
                recorded: Any = inputs["logprobs"].data[position]
                assert abs(recorded - output["logprobs"].data[position]) < CLOSE
                compared += 1
    assert compared == sum(len(call.tokens) for call in rollout.calls) > 20

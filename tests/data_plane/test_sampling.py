"""What a dedicated sampler is asked, and what it says."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from loops_async import (
    AdamParams,
    BadRequestError,
    BasetenDeployment,
    EncodedTextChunk,
    ImageChunk,
    InputError,
    LocalDeployment,
    ModelInput,
    NotReadyError,
    SamplerTerminatedError,
    SamplingClient,
    SamplingParams,
    ServerlessDeployment,
    ServiceClient,
    TrainingClient,
)
from loops_local import LocalService
from loops_local.engine.echo import logprob

FEW = SamplingParams(max_tokens=2)
IMAGE = ModelInput([EncodedTextChunk([5]), ImageChunk.from_bytes(b"\x89PNG", "png", 3), EncodedTextChunk([6])])


async def body_of(local: LocalService, sampler: SamplingClient, *args: Any, **options: Any) -> dict[str, Any]:
    """Return the body of a sample that the service does not answer in earnest."""
    asked = local.faults.watch("POST */sample")
    with suppress(BadRequestError):
        await sampler.sample(*args, **options)
    return await asked[0].json()


async def step_of(sampler: SamplingClient) -> int:
    """Tell by a logprob which weights answered."""
    answer = await sampler.sample([5, 6], sampling_params=FEW)
    found = answer.sequences[0].logprobs
    return next(step for step in range(10) if found == [logprob(6, 5, step), logprob(5, 6, step)])


async def test_every_parameter_reaches_the_sampler(local: LocalService, sampler: SamplingClient) -> None:
    params = SamplingParams(
        max_tokens=9, seed=3, stop=["a", "b"], temperature=0.5, top_k=4, top_p=0.9, structured_outputs={"regex": "x"}
    )
    body = await body_of(local, sampler, [1, 2], 3, params, True, 2, include_routed_experts=True)
    assert body == {
        "prompt": [1, 2],
        "n": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "logprobs": 0,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "prompt_logprobs": 2,
        "max_tokens": 9,
        "seed": 3,
        "top_k": 4,
        "stop": ["a", "b"],
        "structured_outputs": {"regex": "x"},
        "include_routed_experts": True,
    }


async def test_what_is_not_set_is_not_sent(local: LocalService, sampler: SamplingClient) -> None:
    body = await body_of(local, sampler, [1])
    assert set(body) == {
        "prompt",
        "n",
        "temperature",
        "top_p",
        "logprobs",
        "return_tokens_as_token_ids",
        "return_token_ids",
    }


async def test_images_travel_as_chunks(local: LocalService, sampler: SamplingClient) -> None:
    body = await body_of(local, sampler, IMAGE, sampling_params=FEW)
    assert body["prompt"] == []
    assert body["model_input_chunks"] == [
        {"type": "encoded_text", "tokens": [5]},
        {"type": "image", "data": "iVBORw==", "format": "png", "expected_tokens": 3},
        {"type": "encoded_text", "tokens": [6]},
    ]


@pytest.mark.parametrize(
    ("prompt", "params", "reason"),
    [
        (IMAGE, FEW, "images"),
        ([5], SamplingParams(structured_outputs={"json": {}}), "structured outputs"),
    ],
)
async def test_what_a_text_model_cannot_do_is_refused_with_a_reason(
    sampler: SamplingClient, prompt: Any, params: SamplingParams, reason: str
) -> None:
    with pytest.raises(BadRequestError, match=reason) as refused:
        await sampler.sample(prompt, sampling_params=params)
    assert refused.value.status == 422


async def test_the_prompt_that_images_were_expanded_to_wins(local: LocalService, sampler: SamplingClient) -> None:
    scored = [None, *({str(token): {"logprob": -float(token)}} for token in (90, 91, 92, 6))]
    expanded = [5, 90, 91, 92, 6]
    answer = {"choices": [{"token_ids": [1], "prompt_token_ids": expanded, "prompt_logprobs": scored}]}
    local.faults.answer("POST */sample", 200, answer)
    found = await sampler.sample(IMAGE, include_prompt_logprobs=True)
    assert found.prompt_token_ids == expanded
    assert found.prompt_logprobs == [None, -90.0, -91.0, -92.0, -6.0]


async def test_a_group_keeps_its_replica(local: LocalService, sampler: SamplingClient) -> None:
    asked = local.faults.watch("POST */sample", times=2)
    await sampler.sample([1], affinity_key="group-7")
    await sampler.sample([1])
    assert [request.headers.get("X-Baseten-Session-ID") for request in asked] == ["group-7", None]
    with pytest.raises(InputError, match="affinity_key"):
        await sampler.sample([1], affinity_key="")


async def test_a_checkpoint_serves_until_the_floor_is_reached(trainer: TrainingClient) -> None:
    await (await trainer.optim_step(AdamParams())).result()
    saved = await (await trainer.save_weights_for_sampler("first", publish=False)).result()
    pinned = await trainer.create_sampling_client(saved.path)
    ahead = await trainer.create_sampling_client(saved.path, min_policy_version=2)
    assert (await step_of(pinned), await step_of(ahead)) == (1, 1)
    await (await trainer.optim_step(AdamParams())).result()
    live = await trainer.save_weights_and_get_sampling_client("second")
    assert (await step_of(pinned), await step_of(ahead), await step_of(live)) == (1, 2, 2)
    assert (pinned.min_policy_version, ahead.min_policy_version, live.min_policy_version) == (None, 2, 2)


async def test_prompt_logprobs_alone(sampler: SamplingClient) -> None:
    assert await sampler.compute_logprobs([5, 6, 7]) == [None, logprob(5, 6, 0), logprob(6, 7, 0)]
    assert await sampler.compute_logprobs([5]) == [None]


async def test_a_deployment_is_waited_for_without_a_client() -> None:
    async with (
        LocalService(engine="echo", provisioning_seconds=0.3) as local,
        ServiceClient(base_url=local.base_url, api_key=local.api_key) as service,
    ):
        creating = asyncio.create_task(service.create_sampling_client("echo"))
        while not (samplers := await service.control_plane.list_samplers()):  # noqa: ASYNC110 - the service has no events
            await asyncio.sleep(0.005)
        (sampler,) = samplers
        deployment = BasetenDeployment(
            base_url=sampler.base_url,
            model_id=str(sampler.model_id),
            deployment_id=str(sampler.deployment_id),
            api_base_url=local.base_url,
        )
        common: Any = {"base_model": "echo", "deployment": deployment, "api_key": local.api_key}
        with pytest.raises(NotReadyError):
            await SamplingClient.ensure_ready_for_deployment(**common, ready_timeout=0.01)
        await SamplingClient.ensure_ready_for_deployment(**common)
        assert (await service.control_plane.get_sampler(sampler.id)).status.name == "ACTIVE"
        await creating
        await service.control_plane.deactivate_sampler(sampler.id)
        with pytest.raises(SamplerTerminatedError):
            await SamplingClient.ensure_ready_for_deployment(**common)


@pytest.mark.parametrize("kind", [LocalDeployment, ServerlessDeployment])
async def test_other_deployments_are_always_ready(kind: Any) -> None:
    nowhere = kind(base_url="http://127.0.0.1:9")
    await SamplingClient.ensure_ready_for_deployment(base_model="echo", deployment=nowhere, api_key="k")

"""Deactivating what costs money, on services that are old, slow, or do not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from loops_async import ClosedError, ServiceClient, UnsupportedError
from loops_async._session import deactivation
from tests.support.clock import Clock
from tests.support.scripted import KEY, MODEL, WHEN, Hold, Say, ScriptedService, hang_up

RUN = "/v1/loops/runs/r1/deactivate"
SAMPLER = "/v1/loops/samplers/q1/deactivate"
DEPLOYMENT = "/v1/loops/deployments/d9/deactivate"

DONE = Say(body={"id": "r1"})


async def opened(service: ScriptedService) -> ServiceClient:
    """Return a client that has a run and a standalone sampler, and deactivates them when it closes."""
    client = await ServiceClient(api_key=KEY, base_url=service.url, on_exit="deactivate").open()
    await client.create_lora_training_client(MODEL)
    await client.create_sampling_client(MODEL)
    return client


async def test_an_older_service_deactivates_the_deployment_of_a_run(
    service: ScriptedService, caplog: pytest.LogCaptureFixture
) -> None:
    deployment = {"id": "d9", "base_model": MODEL, "base_url": f"{service.url}/trainer", "created_at": WHEN}
    service.always("GET", "/v1/loops/deployments", Say(body={"deployments": [deployment]}))
    service.always("POST", DEPLOYMENT, Say(body={"id": "d9"}))
    async with ServiceClient(api_key=KEY, base_url=service.url) as client:
        trainer = await client.create_lora_training_client(MODEL)
        await trainer.deactivate()
        with pytest.raises(ClosedError, match="run r1 was deactivated"):
            await trainer.health()
        sampler = await client.create_sampling_client(MODEL)
        with pytest.raises(UnsupportedError, match="no route to deactivate sampler q1"):
            await sampler.deactivate()
        async with client.training_run(MODEL):
            pass
    assert len(service.seen_at("POST", DEPLOYMENT)) == 2
    assert [message.partition(". ")[0] for message in caplog.messages] == [
        f"still running, and may cost money: sampler q1 ({MODEL})"
    ]


async def test_a_lost_answer_is_asked_for_again(
    service: ScriptedService, quick: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    service.always("POST", RUN, DONE)
    service.always("POST", SAMPLER, DONE)
    service.answer("POST", RUN, hang_up)
    service.answer("POST", SAMPLER, Say(503, {"message": "busy"}))
    await (await opened(service)).close()
    assert (len(service.seen_at("POST", RUN)), len(service.seen_at("POST", SAMPLER))) == (2, 2)
    assert not any("still running" in message for message in caplog.messages)


async def test_closing_waits_only_so_long(
    service: ScriptedService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deactivation, "END_SECONDS", 0.01)
    for path in (RUN, SAMPLER):
        service.always("POST", path, Hold(DONE))
    await (await opened(service)).close()
    *failures, left = caplog.messages
    assert sorted(failures) == [
        "run r1 could not be deactivated: the service did not answer within 0.01 s",
        "sampler q1 could not be deactivated: the service did not answer within 0.01 s",
    ]
    assert left.endswith(f"To stop: loops --base-url {service.url} down r1 q1")


async def close_twice(client: ServiceClient) -> None:
    closing = asyncio.ensure_future(client.close())
    await asyncio.gather(closing, client.close())


async def close_and_cancel(client: ServiceClient) -> None:
    closing = asyncio.ensure_future(client.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing


@pytest.mark.parametrize("close", [close_twice, close_and_cancel])
async def test_all_is_deactivated_at_once_and_to_the_end(
    service: ScriptedService, caplog: pytest.LogCaptureFixture, close: Callable[[ServiceClient], Awaitable[None]]
) -> None:
    held = [Hold(DONE), Hold(DONE)]
    for path, each in zip((RUN, SAMPLER), held, strict=True):
        service.always("POST", path, each)
    closing = asyncio.ensure_future(close(await opened(service)))
    for each in held:
        await each.arrived.wait()
    assert not closing.done()
    for each in held:
        each.go.set()
    await closing
    assert (len(service.seen_at("POST", RUN)), len(service.seen_at("POST", SAMPLER))) == (1, 1)
    assert not caplog.messages

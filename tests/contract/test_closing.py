"""What is left when a client is closed, whatever was going on: nothing."""

from __future__ import annotations

import asyncio
import gc
import socket
import warnings
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest

from loops_async import AdamParams, ClosedError, ServiceClient
from loops_local import LocalService, serve_in_thread
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.held import Held
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import FEW_TOKENS, PROMPT, eventually, example, train


@pytest.fixture(scope="module")
def endless() -> Iterator[LocalService]:
    """A service that is never done with provisioning."""
    with serve_in_thread(engine="echo", provisioning_seconds=3600.0) as local:
        yield local


def sockets_to(local: LocalService) -> list[socket.socket]:
    """Return the open sockets of this process that are connected to the service."""
    port = int(local.base_url.rpartition(":")[2])
    # Not `isinstance`, which asks objects of other libraries, some of which answer with a warning.
    sockets = [one for one in gc.get_objects() if issubclass(type(one), socket.socket)]
    return [one for one in sockets if _peer_port(one) == port]


def _peer_port(one: socket.socket) -> int | None:
    try:
        return int(one.getpeername()[1])
    except (OSError, IndexError):
        return None


@asynccontextmanager
async def leaving_nothing(local: LocalService) -> AsyncIterator[None]:
    """Fail if the block leaves a task or a socket; what is let go of unclosed warns, and warnings are errors."""
    tasks, sockets = asyncio.all_tasks(), sockets_to(local)
    yield
    assert asyncio.all_tasks() == tasks
    assert [one for one in sockets_to(local) if one not in sockets] == []
    gc.collect()


@pytest.fixture
def client(local: LocalService) -> ServiceClient:
    return ServiceClient(base_url=local.base_url, api_key=local.api_key)


async def test_after_use(local: LocalService, client: ServiceClient, engine: WatchedEngine) -> None:
    async with leaving_nothing(local), client as service:
        trainer = await service.create_lora_training_client(engine.name)
        await train(trainer)
        sampler = await trainer.save_weights_and_get_sampling_client("one")
        await asyncio.gather(*(sampler.sample(PROMPT, 1, FEW_TOKENS) for _ in range(20)))
        assert len(sockets_to(local)) >= 10


async def test_after_use_without_a_context(local: LocalService, client: ServiceClient) -> None:
    async with leaving_nothing(local):
        assert await client.open() is client
        await client.get_server_capabilities()
        await client.close()
        await client.close()


async def test_with_operations_under_way(local: LocalService, client: ServiceClient, engine: WatchedEngine) -> None:
    engine.training.clear()
    async with leaving_nothing(local):
        async with client as service:
            trainer = await service.create_lora_training_client(engine.name)
            futures = [await trainer.forward_backward([example()]) for _ in range(20)]
            waiter = asyncio.ensure_future(futures[0].result())
            await asyncio.sleep(0)
        for waiting in [waiter, *(future.result() for future in futures)]:
            with pytest.raises(ClosedError, match="closed before forward_backward"):
                await waiting


async def test_with_calls_on_their_way(local: LocalService, client: ServiceClient, engine: WatchedEngine) -> None:
    async with leaving_nothing(local):
        async with client as service:
            trainer = await service.create_lora_training_client(engine.name)
            hits = local.faults.delay(f"POST */{trainer.run_id}/*", 30.0, times=3)
            calls = [asyncio.ensure_future(trainer.forward([example()])) for _ in range(3)]
            await eventually(lambda: hits)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {str(outcome) for outcome in outcomes} == {"the client was closed before forward was submitted"}
    assert len(hits) == 1
    assert engine.done == []


async def test_with_samples_under_way(local: LocalService, client: ServiceClient, engine: WatchedEngine) -> None:
    engine.hold_samples()
    async with leaving_nothing(local):
        async with client as service:
            sampler = await service.create_sampling_client(engine.name)
            samples = [asyncio.ensure_future(sampler.sample(PROMPT)) for _ in range(20)]
            await eventually(lambda: engine.waiting_samples == 20)
        outcomes = await asyncio.gather(*samples, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ClosedError}
    await eventually(lambda: engine.waiting_samples == 0)


@pytest.mark.parametrize("what", ["provisioning", "sampling", "waiting"])
async def test_after_cancellation(local: LocalService, endless: LocalService, engine: WatchedEngine, what: str) -> None:
    """The task that owns the client is cancelled in the middle of a call."""
    arrived = asyncio.Event()
    at = endless if what == "provisioning" else local
    probes = at.faults.watch("GET */health")

    async def work() -> None:
        async with ServiceClient(base_url=at.base_url, api_key=at.api_key) as service:
            if what == "provisioning":
                await service.create_lora_training_client(engine.name)
            trainer = await service.create_lora_training_client(engine.name)
            engine.training.clear()
            engine.hold_samples()
            future = await trainer.forward([example()])
            sampler = await service.create_sampling_client(engine.name)
            arrived.set()
            await (future if what == "waiting" else sampler.sample(PROMPT))

    async with leaving_nothing(at):
        task = asyncio.ensure_future(work())
        await eventually(lambda: probes if what == "provisioning" else arrived.is_set())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def status_of(local: LocalService, base_model: str) -> str | None:
    async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        (run,) = await service.control_plane.list_runs(base_model=base_model)
        return run.status.name


async def test_a_run_whose_provisioning_is_cancelled_is_deactivated(endless: LocalService) -> None:
    name = f"cancelled-{uuid4()}"
    probes = endless.faults.watch("GET */health")
    async with ServiceClient(base_url=endless.base_url, api_key=endless.api_key) as service:
        creating = asyncio.ensure_future(service.create_lora_training_client(name))
        await eventually(lambda: probes)
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert await status_of(endless, name) == "INACTIVE"


async def test_a_run_that_is_made_too_late_is_deactivated(local: LocalService) -> None:
    name = f"late-{uuid4()}"
    held = Held(local.faults, "POST */runs")
    async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        creating = asyncio.ensure_future(service.create_lora_training_client(name))
        await eventually(lambda: held.arrived)
        creating.cancel()
        held.let_go()
        with pytest.raises(asyncio.CancelledError):
            await creating
    assert await status_of(local, name) == "INACTIVE"


async def test_a_sampler_whose_provisioning_is_cancelled_is_deactivated(endless: LocalService) -> None:
    name = f"sampler-{uuid4()}"
    probes = endless.faults.watch("GET */v1/models/*")
    async with ServiceClient(base_url=endless.base_url, api_key=endless.api_key) as service:
        creating = asyncio.ensure_future(service.create_sampling_client(name))
        await eventually(lambda: probes)
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        (sampler,) = [one for one in await service.control_plane.list_samplers() if one.base_model == name]
        assert sampler.status.name == "INACTIVE"


async def test_a_run_is_deactivated_when_its_client_is_closed_meanwhile(colour: Colour, endless: LocalService) -> None:
    name = f"closed-{uuid4()}"
    probes = endless.faults.watch("GET */health")
    async with colour.connected(base_url=endless.base_url, api_key=endless.api_key) as service:
        creating = asyncio.ensure_future(service.create_lora_training_client(name))
        await eventually(lambda: probes)
    with pytest.raises(ClosedError, match="closed"):
        await creating
    assert await status_of(endless, name) == "INACTIVE"


async def test_a_wait_for_a_version_ends(service: ServiceClient, local: LocalService, engine: WatchedEngine) -> None:
    trainer = await service.create_lora_training_client(engine.name)
    await train(trainer)
    lag = local.faults.answer("GET *trainers_policy_version", 200, {"policy_version": 0}, times=10_000)
    waiting = asyncio.ensure_future(trainer.save_weights_and_get_sampling_client("one"))
    await eventually(lambda: lag)
    await service.close()
    with pytest.raises(ClosedError, match="closed"):
        await asyncio.wait_for(waiting, PATIENCE_SECONDS)


async def test_waiters_are_told(service: ServiceClient, engine: WatchedEngine) -> None:
    trainer = await service.create_lora_training_client(engine.name)
    sampler = await service.create_sampling_client(engine.name)
    engine.training.clear()
    engine.hold_samples()
    future = await trainer.forward([example()])
    calls: list[Awaitable[Any]] = [future.result(), future.result(60.0), sampler.sample(PROMPT)]
    waiting = [asyncio.ensure_future(call) for call in calls]
    await eventually(lambda: engine.waiting_samples == 1)
    await service.close()
    for one in waiting:
        with pytest.raises(ClosedError, match="closed"):
            await one


async def test_what_came_from_a_closed_client_says_so(service: ServiceClient, engine: WatchedEngine) -> None:
    trainer = await service.create_lora_training_client(engine.name)
    sampler = await service.create_sampling_client(engine.name)
    done = await trainer.forward([example()])
    output = await done
    await service.close()
    await service.close()

    calls: list[Awaitable[Any]] = [
        trainer.forward([example()]),
        trainer.optim_step(AdamParams()),
        trainer.health(),
        sampler.sample(PROMPT),
        sampler.ensure_ready(),
        service.create_lora_training_client(engine.name),
        service.get_server_capabilities(),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="closed; create a new ServiceClient"):
            await call
    assert await done == output


async def test_opening_is_cancelled(local: LocalService) -> None:
    hits = local.faults.delay("POST */sessions", 30.0)
    async with leaving_nothing(local):
        opening = asyncio.ensure_future(ServiceClient(base_url=local.base_url, api_key=local.api_key).open())
        await eventually(lambda: hits)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening


async def test_opening_twice_at_once_opens_once(local: LocalService, client: ServiceClient) -> None:
    sessions = local.faults.watch("POST */sessions", times=2)
    async with leaving_nothing(local):
        await asyncio.gather(client.open(), client.open())
        assert await client.open() is client
        await client.close()
    assert len(sessions) == 1


async def test_closing_while_it_opens(local: LocalService, client: ServiceClient) -> None:
    held = Held(local.faults, "POST */sessions")
    async with leaving_nothing(local):
        opening = asyncio.ensure_future(client.open())
        await eventually(lambda: held.arrived)
        closing = asyncio.ensure_future(client.close())
        await asyncio.sleep(0)
        held.let_go()
        await closing
        with pytest.raises(ClosedError, match="closed"):
            await opening


async def test_opening_fails(local: LocalService) -> None:
    async with leaving_nothing(local):
        with pytest.raises(Exception, match="key"):
            await ServiceClient(base_url=local.base_url, api_key="wrong").open()


async def test_a_client_must_be_opened_first(client: ServiceClient) -> None:
    with pytest.raises(ClosedError, match="async with"):
        await client.get_server_capabilities()
    with pytest.raises(ClosedError, match="async with"):
        _ = client.session_id


# --- clients that are not closed -------------------------------------------------------------------------------------


async def test_a_client_that_is_dropped_unclosed_is_closed_and_named(
    local: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    async with leaving_nothing(local):
        client = await ServiceClient(base_url=local.base_url, api_key=local.api_key).open()
        name = repr(client)
        trainer = await client.create_lora_training_client("echo")
        run_id = trainer.run_id
        del client
        await train(trainer)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            del trainer
            await eventually(lambda: len(caplog.records) == 2)
        assert [(one.category, str(one.message)) for one in warned] == [(ResourceWarning, caplog.messages[1])]
    assert f"still running, and may cost money: run {run_id} (echo)" in caplog.messages[0]
    assert caplog.messages[1].startswith(f"{name} was not closed: use it in a with block")


def test_a_client_that_is_unclosed_when_its_loop_ends_is_closed_and_named(
    local: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    clients: list[ServiceClient] = []

    async def forget(*, keeps: bool) -> None:
        client = await ServiceClient(base_url=local.base_url, api_key=local.api_key).open()
        await client.create_lora_training_client("echo")
        if keeps:
            clients.append(client)

    for keeps in (True, False):
        with pytest.warns(ResourceWarning, match="was not closed"):
            asyncio.run(forget(keeps=keeps))
        assert [message[:15] for message in caplog.messages] == ["still running, ", "<ServiceClient "]
        assert sockets_to(local) == []
        caplog.clear()


async def test_a_client_that_was_closed_says_nothing_when_it_is_dropped(
    client: ServiceClient, local: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    async with leaving_nothing(local):
        async with client:
            await train(await client.create_lora_training_client("echo"))
        await client.close()
        caplog.clear()
        del client
    assert not caplog.records

"""What a client created: how to attach to it, how it ends, and what is said about what still runs."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from loops_async import (
    AdamParams,
    BadRequestError,
    ClosedError,
    ConfigError,
    InputError,
    NotFoundError,
    ProvisioningEvent,
    SamplerTerminatedError,
    SamplingClient,
    ServiceClient,
    TrainingClient,
    UnsupportedError,
)
from loops_async._http.settings import DEFAULT_BASE_URL
from loops_async._tasks import TaskOwner
from loops_local import LocalService
from tests.support.colours import Blocking, Colour
from tests.support.engines import WatchedEngine
from tests.support.patience import PATIENCE_SECONDS
from tests.support.warnings import WARNINGS
from tests.support.work import FEW_TOKENS, PROMPT, example, train


@pytest.fixture
async def other(local: LocalService) -> AsyncIterator[ServiceClient]:
    """Another client, which sees what the one under test did."""
    async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as other:
        yield other


async def status_of(other: ServiceClient, client: TrainingClient | SamplingClient | str) -> str | None:
    """Return the status of a run, or of a sampler."""
    id_ = client if isinstance(client, str) else client.run_id or str(client.sampler_id)
    try:
        return (await other.control_plane.get_run(id_)).status.name
    except NotFoundError:
        return (await other.control_plane.get_sampler(id_)).status.name


# --- attaching -------------------------------------------------------------------------------------------------------


async def test_a_second_program_samples_a_standalone_sampler(
    colour: Colour, local: LocalService, service: ServiceClient, engine: WatchedEngine
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    assert sampler.run_id is None
    events: list[ProvisioningEvent] = []
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as elsewhere:
        attached = await elsewhere.attach_sampling_client(sampler_id=sampler.sampler_id, on_progress=events.append)
        assert (attached.sampler_id, attached.run_id) == (sampler.sampler_id, None)
        assert attached.get_base_model() == engine.name
        answers = [await client.sample(PROMPT, 1, FEW_TOKENS) for client in (attached, sampler)]
        assert answers[0].sequences == answers[1].sequences
    assert [event.id for event in events if event.stage == "ready"] == [sampler.sampler_id]


async def test_a_second_program_samples_what_a_run_publishes(
    colour: Colour, local: LocalService, trainer: TrainingClient
) -> None:
    await train(trainer)
    published = await trainer.save_weights_and_get_sampling_client("one")
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as elsewhere:
        attached = await elsewhere.attach_sampling_client(run_id=trainer.run_id, timeout=30.0)
        assert (await attached.sample(PROMPT, 1, FEW_TOKENS)).policy_version == 1
        assert attached.run_id == published.run_id == trainer.run_id
        assert attached.sampler_id == published.sampler_id == (trainer.run.sampler and trainer.run.sampler.id)
        by_its_id = await elsewhere.attach_sampling_client(sampler_id=attached.sampler_id)
        assert (await by_its_id.sample(PROMPT, 1, FEW_TOKENS)).policy_version == 1
        assert by_its_id.run_id is None
        with pytest.raises(BadRequestError, match="deactivate the run"):  # only the service knows that it is paired
            await by_its_id.deactivate()


async def test_ids_are_known_after_pickling(colour: Colour, service: ServiceClient, trainer: TrainingClient) -> None:
    for sampler in (
        await service.create_sampling_client("echo"),
        await trainer.save_weights_and_get_sampling_client("one"),
    ):
        copy = pickle.loads(pickle.dumps(colour.own(sampler)))
        assert (copy.sampler_id, copy.run_id) == (sampler.sampler_id, sampler.run_id)


@pytest.mark.parametrize("ids", [{}, {"sampler_id": "s", "run_id": "r"}])
async def test_attaching_needs_exactly_one_id(service: ServiceClient, local: LocalService, ids: dict[str, str]) -> None:
    requests = local.faults.watch("GET */loops/*")
    with pytest.raises(InputError, match="exactly one of `sampler_id` and `run_id`"):
        await service.attach_sampling_client(**ids)
    assert not requests


@pytest.mark.parametrize("ids", [{"sampler_id": "nowhere"}, {"run_id": "nowhere"}])
async def test_attaching_to_nothing(service: ServiceClient, ids: dict[str, str]) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        await service.attach_sampling_client(**ids)


async def test_attaching_in_local_mode(colour: Colour, local: LocalService) -> None:
    urls = {"trainer_url": local.trainer_url, "sampler_url": local.sampler_url}
    async with colour.connected_locally(**urls) as service:
        trainer = await service.create_lora_training_client("echo", rank=4)
        attached = await service.attach_sampling_client(run_id=trainer.run_id)
        assert (attached.sampler_id, attached.run_id) == (None, trainer.run_id)
        assert (await attached.sample(PROMPT, 1, FEW_TOKENS)).sequences
        with pytest.raises(UnsupportedError, match="give the `run_id` instead"):
            await service.attach_sampling_client(sampler_id="any")
        with pytest.raises(UnsupportedError, match="cannot be deactivated here"):
            await trainer.deactivate()
        with pytest.raises(UnsupportedError, match="cannot be deactivated here"):
            await (await service.create_sampling_client("echo")).deactivate()


# --- deactivating ----------------------------------------------------------------------------------------------------


async def test_a_run_is_deactivated_with_its_sampler(
    service: ServiceClient, trainer: TrainingClient, other: ServiceClient
) -> None:
    sampler = await trainer.save_weights_and_get_sampling_client("one")
    with pytest.raises(UnsupportedError, match=f"belongs to run {trainer.run_id} and ends with it"):
        await sampler.deactivate()
    assert await status_of(other, trainer) == "ACTIVE"
    await trainer.deactivate()
    await trainer.deactivate()
    assert await status_of(other, trainer) == "INACTIVE"
    assert [one.checkpoint_id for one in await trainer.list_checkpoints()] == ["one"]
    calls: list[Awaitable[Any]] = [
        trainer.forward([example()]),
        trainer.optim_step(AdamParams()),
        trainer.health(),
        trainer.save_weights_and_get_sampling_client("two"),
        trainer.create_sampling_client(f"bt://loops:{trainer.run_id}/sampler_weights/one"),
        sampler.sample(PROMPT),
        sampler.ensure_ready(),
        service.attach_sampling_client(run_id=trainer.run_id),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match=f"run {trainer.run_id} was deactivated through this client"):
            await call


async def test_a_standalone_sampler_is_deactivated(service: ServiceClient, other: ServiceClient) -> None:
    sampler = await service.create_sampling_client("echo")
    attached = await other.attach_sampling_client(sampler_id=sampler.sampler_id)
    await attached.deactivate()
    await attached.deactivate()
    assert await status_of(other, sampler) == "INACTIVE"
    with pytest.raises(ClosedError, match=f"sampler {sampler.sampler_id} was deactivated through this client"):
        await attached.sample(PROMPT)
    with pytest.raises(SamplerTerminatedError):  # of another client, which the service tells
        await sampler.sample(PROMPT)


async def test_an_unpickled_client_deactivates_its_sampler(
    local: LocalService, other: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", local.api_key)
    sampler: SamplingClient = pickle.loads(pickle.dumps(await other.create_sampling_client("echo")))
    await sampler.deactivate()
    assert await status_of(other, sampler) == "INACTIVE"


# --- scopes ----------------------------------------------------------------------------------------------------------


def scope(service: ServiceClient, kind: str, **options: Any) -> AbstractAsyncContextManager[Any]:
    if kind == "run":
        return service.training_run("echo", rank=4, **options)
    return service.standalone_sampler("echo", **options)


kinds = pytest.mark.parametrize("kind", ["run", "sampler"])


@kinds
async def test_a_scope_ends_what_it_began(service: ServiceClient, other: ServiceClient, kind: str) -> None:
    events: list[ProvisioningEvent] = []
    async with scope(service, kind, on_progress=events.append) as client:
        assert await status_of(other, client) == "ACTIVE"
        assert {event.stage for event in events} >= {"created", "ready"}
        await (train(client) if kind == "run" else client.sample(PROMPT, 1, FEW_TOKENS))
    assert await status_of(other, client) == "INACTIVE"
    with pytest.raises(ClosedError, match="was deactivated"):
        await (train(client) if kind == "run" else client.sample(PROMPT))


@kinds
async def test_a_scope_ends_what_it_began_also_when_it_fails(
    service: ServiceClient, other: ServiceClient, kind: str
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with scope(service, kind) as client:
            raise ZeroDivisionError
    assert await status_of(other, client) == "INACTIVE"


@kinds
async def test_a_scope_ends_what_it_began_also_when_it_is_cancelled(
    local: LocalService, other: ServiceClient, kind: str
) -> None:
    begun: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        async with (
            ServiceClient(base_url=local.base_url, api_key=local.api_key) as service,
            scope(service, kind) as client,
        ):
            begun.set_result(client)
            await asyncio.Event().wait()

    task = asyncio.ensure_future(work())
    client = await begun
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await status_of(other, client) == "INACTIVE"


@kinds
async def test_what_becomes_ready_in_the_moment_of_a_cancellation_is_ended(
    local: LocalService, other: ServiceClient, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[str] = []
    run = TaskOwner.run

    async def run_and_cancel(owner: TaskOwner, work: Any, **options: Any) -> Any:
        async def then_cancel() -> Any:
            made = await work
            created.append(getattr(made, "run_id", None) or made.id)
            asyncio.get_running_loop().call_soon(beginning.cancel)
            return made

        return await run(owner, then_cancel(), **options)

    async with ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="leave") as service:
        monkeypatch.setattr(TaskOwner, "run", run_and_cancel)
        beginning = asyncio.ensure_future(scope(service, kind).__aenter__())
        with pytest.raises(asyncio.CancelledError):
            await beginning
    assert await status_of(other, created[0]) == "INACTIVE"


@kinds
async def test_a_callback_that_fails_ends_the_provisioning_of_a_scope(
    service: ServiceClient, other: ServiceClient, kind: str
) -> None:
    created: list[str] = []

    def fail(event: ProvisioningEvent) -> None:
        created.append(event.id)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with scope(service, kind, on_progress=fail):
            raise AssertionError("it was entered")
    assert await status_of(other, created[0]) == "INACTIVE"


async def test_a_scope_of_a_checkpoint(service: ServiceClient, trainer: TrainingClient, other: ServiceClient) -> None:
    path = (await (await trainer.save_weights_for_sampler("one"))).path
    async with service.standalone_sampler(model_path=path) as sampler:
        assert sampler.checkpoint_path == path
        assert sampler.run_id is None
        assert (await sampler.sample(PROMPT, 1, FEW_TOKENS)).sequences
    assert await status_of(other, str(sampler.sampler_id)) == "INACTIVE"
    with pytest.raises(InputError, match="exactly one of `base_model` and `model_path`"):
        async with service.standalone_sampler():
            pass


async def test_what_a_scope_ended_already_is_not_ended_twice(
    service: ServiceClient, local: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    async with service.training_run("echo") as trainer:
        await trainer.deactivate()
        again = local.faults.watch("POST */deactivate")
    assert not again
    assert not caplog.messages


async def test_a_scope_that_cannot_end_says_so_and_keeps_the_error(
    service: ServiceClient, local: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    local.faults.answer("POST */deactivate", 403, {"error": "not allowed"})
    with pytest.raises(ZeroDivisionError):
        async with service.training_run("echo") as trainer:
            raise ZeroDivisionError
    failure, left = caplog.messages
    assert f"run {trainer.run_id} could not be deactivated: " in failure
    assert "not allowed" in failure
    assert left.endswith(f"down {trainer.run_id}")
    await trainer.deactivate()


# --- at the end ------------------------------------------------------------------------------------------------------


async def create_some(service: ServiceClient, other: ServiceClient) -> list[str]:
    """Create a run and a sampler that stay, and attach to two of another client; return the ids of those that stay."""
    trainer = await service.create_lora_training_client("echo")
    await trainer.save_weights_and_get_sampling_client("one")  # the paired sampler, which has no line of its own
    sampler = await service.create_sampling_client("echo")
    async with service.training_run("echo"), service.standalone_sampler("echo"):
        pass
    ended = await service.create_sampling_client("echo")
    await service.control_plane.deactivate_sampler(str(ended.sampler_id))
    theirs = await other.create_lora_training_client("echo")
    await service.attach_training_client(theirs.run_id)
    await service.attach_sampling_client(run_id=theirs.run_id)
    return [trainer.run_id, str(sampler.sampler_id)]


async def test_by_default_one_line_says_what_still_runs(
    colour: Colour, local: LocalService, other: ServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
        run, sampler = await create_some(service, other)
    what = f"still running, and may cost money: run {run} (echo), sampler {sampler} (echo)"
    assert caplog.messages == [f"{what}. To stop: loops --base-url {local.base_url} down {run} {sampler}"]
    assert [await status_of(other, one) for one in (run, sampler)] == ["ACTIVE"] * 2


async def test_all_of_it_is_deactivated_on_exit(
    colour: Colour, local: LocalService, other: ServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"base_url": local.base_url, "api_key": local.api_key}
    async with colour.connected(**settings, on_exit="deactivate") as service:
        ids = await create_some(service, other)
    assert [await status_of(other, one) for one in ids] == ["INACTIVE"] * 2
    theirs = await other.control_plane.list_runs()
    assert any(run.status.name == "ACTIVE" for run in theirs if run.session_id == other.session_id)
    assert not caplog.messages


async def test_what_cannot_be_deactivated_on_exit_is_named(
    colour: Colour, local: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"base_url": local.base_url, "api_key": local.api_key}
    async with colour.connected(**settings, on_exit="deactivate") as service:
        trainer = await service.create_lora_training_client("echo")
        await service.create_sampling_client("echo")
        local.faults.answer("POST */runs/*/deactivate", 403, {"error": "not allowed"})
    failure, left = caplog.messages
    assert "not allowed" in failure
    assert left.endswith(f"down {trainer.run_id}")


async def test_it_is_left_without_a_word(
    colour: Colour, local: LocalService, other: ServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    async with colour.connected(base_url=local.base_url, api_key=local.api_key, on_exit="leave") as service:
        ids = await create_some(service, other)
    assert [await status_of(other, one) for one in ids] == ["ACTIVE"] * 2
    assert not caplog.messages


async def test_the_command_names_the_service_only_if_it_must(
    local: LocalService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPS_BASE_URL", f"{local.base_url}/")
    async with ServiceClient(api_key=local.api_key) as service:
        trainer = await service.create_lora_training_client("echo")
    assert caplog.messages[0].endswith(f"To stop: loops down {trainer.run_id}")
    assert DEFAULT_BASE_URL not in caplog.messages[0]


async def test_many_are_counted_and_all_of_them_are_in_the_command(
    local: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        creations = [service.create_sampling_client("echo") for _ in range(5)]
        ids = [one.sampler_id for one in await asyncio.gather(*creations)]
        ids.append((await service.create_lora_training_client("echo")).run_id)
    [line] = caplog.messages
    what, command = line.split(". To stop: ")
    assert what == "still running, and may cost money: 1 run and 5 samplers"
    assert set(ids) < set(command.split())


async def test_another_word_is_refused(colour: Colour) -> None:
    with pytest.raises(ConfigError, match="on_exit must be 'deactivate', 'warn' or 'leave'; got 'stop'"):
        async with colour.connected(base_url=DEFAULT_BASE_URL, api_key="key", on_exit="stop"):
            pass


async def test_what_clients_are_at_a_glance(
    colour: Colour, local: LocalService, service: ServiceClient, trainer: TrainingClient
) -> None:
    sampler = await service.create_sampling_client("echo")
    session = service.session_id
    assert repr(colour.own(service)) == f"<ServiceClient session={session} base_url={local.base_url} open>"
    model = trainer.run.base_model
    assert repr(colour.own(trainer)) == f"<TrainingClient run={trainer.run_id} base_model={model} rank=8>"
    assert repr(colour.own(sampler)) == f"<SamplingClient sampler={sampler.sampler_id} base_model=echo>"


# --- programs that end -----------------------------------------------------------------------------------------------

BLOCKING = """
import signal, loops_sync as loops
with loops.ServiceClient() as service, service.training_run(MODEL) as trainer, service.standalone_sampler(MODEL):
    print(trainer.run_id, flush=True)
    signal.pause()
"""
ASYNC = """
import asyncio, loops_async as loops
async def main():
    async with (
        loops.ServiceClient() as service,
        service.training_run(MODEL) as trainer,
        service.standalone_sampler(MODEL),
    ):
        print(trainer.run_id, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
UNCLOSED_BLOCKING = """
import loops_sync as loops
service = loops.ServiceClient()
trainer = service.create_lora_training_client(MODEL)
print(trainer.run_id)
"""
UNCLOSED_ASYNC = """
import asyncio, loops_async as loops
async def main():
    service = await loops.ServiceClient().open()
    trainer = await service.create_lora_training_client(MODEL)
    print(trainer.run_id)
asyncio.run(main())
"""


def program(colour: Colour, local: LocalService, blocking: str, other: str, model: str) -> subprocess.Popen[str]:
    script = f"MODEL = {model!r}\n" + (blocking if isinstance(colour, Blocking) else other)
    environment = os.environ | {"LOOPS_BASE_URL": local.base_url, "BASETEN_API_KEY": local.api_key}
    command = [sys.executable, *WARNINGS[:2], "-W", "default::ResourceWarning", *WARNINGS[2:], "-c", script]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


async def test_ctrl_c_in_a_scope(colour: Colour, local: LocalService, other: ServiceClient) -> None:
    model = f"interrupted-{id(colour)}"
    with program(colour, local, BLOCKING, ASYNC, model) as running:
        assert running.stdout is not None
        run_id = (await asyncio.to_thread(running.stdout.readline)).strip()
        running.send_signal(signal.SIGINT)
        _, said = await asyncio.to_thread(running.communicate, timeout=PATIENCE_SECONDS)
    assert said.strip().endswith("KeyboardInterrupt")
    assert "still running" not in said
    assert await status_of(other, run_id) == "INACTIVE"
    samplers = [one for one in await other.control_plane.list_samplers() if one.base_model == model]
    assert [one.status.name for one in samplers] == ["INACTIVE"] * 2


async def test_a_program_that_ends_without_closing_says_what_still_runs(
    colour: Colour, local: LocalService, other: ServiceClient
) -> None:
    with program(colour, local, UNCLOSED_BLOCKING, UNCLOSED_ASYNC, "echo") as ended:
        run_id, said = await asyncio.to_thread(ended.communicate, timeout=PATIENCE_SECONDS)
    run_id = run_id.strip()
    assert [line for line in said.splitlines() if line.startswith("still running")] == [
        f"still running, and may cost money: run {run_id} (echo). To stop: loops down {run_id}"
    ]
    assert await status_of(other, run_id) == "ACTIVE"

"""What is under way, as `inflight` and `dump` show it, also while nothing else answers."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

import loops_async as loops
from loops_async import InFlight, ServiceClient, TrainingClient
from loops_async._http import retry
from loops_local import LocalService, serve_in_thread
from loops_sync._bridge import current
from tests.support.colours import Colour
from tests.support.engines import Engines, WatchedEngine
from tests.support.held import Held
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import FEW_TOKENS, PROMPT, eventually, example


@asynccontextmanager
async def running(*calls: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Make calls beside the block, whose errors count for nothing: the block ends what they wait for."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        yield
    finally:
        await asyncio.wait(tasks, timeout=PATIENCE_SECONDS)
        for task in tasks:
            task.exception()


async def shown(service: ServiceClient, is_wanted: Callable[[InFlight], object], count: int = 1) -> list[InFlight]:
    """Return the entries that are wanted, as soon as there are so many."""

    def wanted() -> list[InFlight]:
        return [each for each in service.inflight() if is_wanted(each)]

    await eventually(lambda: len(wanted()) == count)
    return wanted()


def waiting_for(state: str) -> Callable[[InFlight], bool]:
    return lambda each: each.waiting_for == state


async def test_nothing_is_under_way_before_and_after(service: ServiceClient, engine: WatchedEngine) -> None:
    assert service.inflight() == []
    sampler = await service.create_sampling_client(engine.name)
    await sampler.sample(PROMPT, 1, FEW_TOKENS)
    await eventually(lambda: service.inflight() == [])
    await service.close()
    assert service.inflight() == []


async def test_a_sample_is_one_entry_with_its_requests(service: ServiceClient, engine: WatchedEngine) -> None:
    sampler = await service.create_sampling_client(engine.name)
    engine.hold_samples()
    async with running(sampler.sample(PROMPT, 1, FEW_TOKENS)):
        await eventually(lambda: engine.waiting_samples == 1)
        (sample,) = service.inflight()
        assert (sample.kind, sample.what, sample.waiting_for) == ("sample", "sample", "answer")
        assert (sample.sampler_id, sample.run_id, sample.attempt) == (sampler.sampler_id, None, 1)
        assert sample.id
        assert sample.next_try_in is None
        later = service.inflight()[0]
        assert (later.id, later.age > sample.age) == (sample.id, True)
        engine.release_samples()


async def test_a_retry_says_what_went_wrong_and_when_it_comes(
    service: ServiceClient, local: LocalService, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    monkeypatch.setattr(retry, "pause_before", lambda attempt, *_: 300.0 if attempt else 0.01)
    busy = {"error": {"code": "busy", "message": "come back"}}
    local.faults.answer("POST */sample", 503, busy, headers={"Retry-After": "0"}, times=2)
    async with running(sampler.sample(PROMPT, 1, FEW_TOKENS)):
        (entry,) = await shown(service, lambda each: each.waiting_for == "retry" and each.attempt == 2)
        assert (entry.kind, entry.last_status) == ("sample", 503)
        assert "come back" in str(entry.last_error)
        assert entry.next_try_in is not None
        assert 0 < entry.next_try_in <= 300
        await service.close()


async def test_samples_beyond_the_limit_wait_for_admission(
    colour: Colour, local: LocalService, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BT_LOOPS_MAX_CONNECTIONS", "1")
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
        sampler = await service.create_sampling_client(engine.name)
        engine.hold_samples()
        async with running(*[sampler.sample(PROMPT, 1, FEW_TOKENS) for _ in range(3)]):
            assert len(await shown(service, waiting_for("admission"), 2)) == 2
            await eventually(lambda: engine.waiting_samples == 1)
            text = service.dump()
            assert "2 sample, waiting for admission" in text
            assert "samples in flight: 1 of 1" in text
            engine.release_samples()


async def test_operations_wait_for_their_turn_and_then_for_their_outcome(
    service: ServiceClient, trainer: TrainingClient, local: LocalService, engine: WatchedEngine
) -> None:
    engine.training.clear()
    held = Held(local.faults, f"POST */{trainer.run_id}/forward_backward")
    first = asyncio.ensure_future(trainer.forward_backward([example()]))
    await eventually(lambda: len(held.arrived) == 1)
    second = asyncio.ensure_future(trainer.optim_step(loops.AdamParams()))
    (turn,) = await shown(service, waiting_for("turn"))
    (sent,) = await shown(service, waiting_for("answer"))
    assert (sent.kind, sent.what, sent.run_id) == ("operation", "forward_backward", trainer.run_id)
    assert (turn.what, turn.run_id) == ("optim_step", trainer.run_id)
    held.let_go()
    futures = await asyncio.gather(first, second)
    entries = await shown(service, waiting_for("outcome"), 2)
    assert [(each.what, each.id) for each in entries] == [
        ("forward_backward", futures[0].operation_id),
        ("optim_step", futures[1].operation_id),
    ]
    engine.training.set()
    await futures[1]
    await eventually(lambda: service.inflight() == [])


async def test_an_operation_that_is_refused_ends(service: ServiceClient, trainer: TrainingClient) -> None:
    with pytest.raises(loops.LoopsError):
        await (await trainer.load_state("bt://loops:none/weights/none"))
    with pytest.raises(loops.InputError):
        await trainer.forward_backward([])
    await eventually(lambda: service.inflight() == [])


async def test_provisioning_shows_the_state_of_the_deployment(
    service: ServiceClient, local: LocalService, engine: WatchedEngine
) -> None:
    creation = Held(local.faults, "POST */runs")
    health = Held(local.faults, "GET */health")
    async with running(service.create_lora_training_client(engine.name)):
        await eventually(lambda: len(creation.arrived) == 1)
        (created,) = service.inflight()
        assert (created.kind, created.what, created.id) == ("provisioning", f"run of {engine.name}", None)
        assert created.waiting_for == "answer"
        creation.let_go()
        await eventually(lambda: len(health.arrived) == 1)
        (entry,) = service.inflight()
        assert (entry.kind, entry.waiting_for) == ("provisioning", "ready")
        assert entry.id == entry.run_id is not None
        assert isinstance(entry.last_status, str)
        health.let_go()


async def test_a_wait_for_what_exists_is_a_readiness(
    service: ServiceClient, trainer: TrainingClient, local: LocalService
) -> None:
    health = Held(local.faults, "GET */health")
    async with running(service.wait_for_run(trainer.run_id)):
        await eventually(lambda: len(health.arrived) == 1)
        (entry,) = await shown(service, lambda each: each.kind == "readiness")
        assert (entry.run_id, entry.waiting_for) == (trainer.run_id, "ready")
        health.let_go()


async def test_samples_that_wait_for_a_sampler_share_one_readiness(
    service: ServiceClient, engine: WatchedEngine, local: LocalService
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    found = await service.attach_sampling_client(sampler_id=sampler.sampler_id)
    local.faults.answer("POST */sample", 404, {"error": "not there"}, times=1)
    asleep = local.faults.answer("GET */v1/models/*", 200, {"status": "DEPLOYING"}, times=2)
    state = Held(local.faults, "GET */v1/models/*")
    async with running(found.sample(PROMPT, 1, FEW_TOKENS)):
        await eventually(lambda: len(state.arrived) == 1)
        assert len(asleep) == 2
        by_kind = {each.kind: each for each in service.inflight()}
        assert by_kind["sample"].waiting_for == by_kind["readiness"].waiting_for == "ready"
        assert by_kind["readiness"].last_status == "DEPLOYING"
        state.let_go()


async def test_a_call_of_the_control_plane_is_a_request(service: ServiceClient, local: LocalService) -> None:
    held = Held(local.faults, "GET */runs*")
    async with running(service.control_plane.list_runs()):
        await eventually(lambda: len(held.arrived) == 1)
        (entry,) = service.inflight()
        assert (entry.kind, entry.waiting_for, entry.attempt) == ("request", "answer", 1)
        assert "runs" in entry.what
        held.let_go()


async def test_a_download_is_one_entry(
    service: ServiceClient, trainer: TrainingClient, local: LocalService, tmp_path: Any
) -> None:
    await (await trainer.save_state("here"))
    (checkpoint,) = await service.list_checkpoints(trainer.run_id)
    held = Held(local.faults, "GET */files/*")
    async with running(service.download_checkpoint(checkpoint.id, dest_dir=tmp_path)):
        await eventually(lambda: len(held.arrived) == 1)
        (entry,) = service.inflight()
        assert (entry.kind, entry.id) == ("download", checkpoint.id)
        held.let_go()


async def test_a_sample_in_a_queue_waits_for_its_outcome(colour: Colour, engines: Engines) -> None:
    engine = engines("queued")
    with serve_in_thread(engine=engines, serverless=True, provisioning_seconds=0.0, poll_hold_seconds=0.05) as local:
        async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
            sampler = await service.create_sampling_client(engine.name)
            engine.hold_samples()
            async with running(sampler.sample(PROMPT, 1, FEW_TOKENS)):
                (entry,) = await shown(service, waiting_for("outcome"))
                assert (entry.kind, entry.sampler_id) == ("sample", sampler.sampler_id)
                engine.release_samples()


async def test_a_connection_that_is_being_made_is_shown(colour: Colour) -> None:
    """The other side accepts, and never begins TLS."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        async with (
            colour.connected_locally(trainer_url=url, sampler_url=url) as service,
            running(service.attach_sampling_client(run_id="run")),
        ):
            await shown(service, waiting_for("connection"))
            await service.close()


# --- while nothing else answers ---


@pytest.fixture
def threads() -> Any:
    with ThreadPoolExecutor(1) as threads:
        yield threads


async def test_any_thread_can_read_while_the_event_loop_is_held(
    colour: Colour, service: ServiceClient, engine: WatchedEngine, threads: ThreadPoolExecutor
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    engine.hold_samples()
    async with running(sampler.sample(PROMPT, 1, FEW_TOKENS)):
        await eventually(lambda: engine.waiting_samples == 1)

        def read() -> tuple[list[InFlight], str, str]:
            return service.inflight(), service.dump(), loops.dump_all()

        def read_elsewhere() -> tuple[list[InFlight], str, str]:
            return threads.submit(read).result(PATIENCE_SECONDS)  # holds the loop that it is called on

        is_async = colour.module is loops
        entries, text, everything = read_elsewhere() if is_async else current().call(read_elsewhere)
        engine.release_samples()
    assert [(each.kind, each.waiting_for) for each in entries] == [("sample", "answer")]
    assert f"{colour.own(service)!r}: 1 under way" in text
    assert text.splitlines()[:2] == [line for line in everything.splitlines() if line in text.splitlines()[:2]]


async def test_a_dump_is_also_written_to_a_file(service: ServiceClient) -> None:
    file = io.StringIO()
    assert service.dump(file) == file.getvalue()
    assert "0 under way" in file.getvalue()


PROGRAM = """
import asyncio, signal, sys, time
import loops_async, loops_sync
signal.signal(signal.SIGUSR1, lambda *_: loops_async.dump_all(sys.stderr))

async def of_async():
    async with loops_async.ServiceClient() as service:
        sampler = await service.create_sampling_client("watched")
        await asyncio.gather(sampler.sample([1, 2]), held())

async def held():
    await asyncio.sleep(0.2)
    print("held", flush=True)
    time.sleep(1000)

def of_sync():
    with loops_sync.ServiceClient() as service:
        sampler = service.create_sampling_client("watched")
        print("held", flush=True)
        sampler.sample([1, 2])

asyncio.run(of_async()) if sys.argv[1] == "async" else of_sync()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signal")
async def test_a_signal_handler_dumps_what_a_process_waits_for(
    colour: Colour, local: LocalService, engines: Engines
) -> None:
    engine = engines("watched")
    engine.hold_samples()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        "async" if colour.module is loops else "sync",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LOOPS_BASE_URL": local.base_url, "BASETEN_API_KEY": local.api_key},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await process.stdout.readline() == b"held\n"
            await eventually(lambda: engine.waiting_samples == 1)
            process.send_signal(signal.SIGUSR1)
            lines = [(await process.stderr.readline()).decode() for _ in range(5)]
    finally:
        process.kill()
        await process.wait()
        engine.release_samples()
    assert "1 under way" in lines[0]
    assert lines[1].strip() == "1 sample, waiting for answer"

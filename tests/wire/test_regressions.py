"""The twelve defects that the published client was seen to have, none of which we may have.

Numbered as in the list they come from; several have more tests elsewhere, which are named.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from loops_async import (
    AdamParams,
    ApiError,
    ClosedError,
    InputError,
    OperationTimeoutError,
    ProtocolError,
    SamplingClient,
    ServiceClient,
    TrainingClient,
)
from tests.clock import Clock
from tests.wire.conftest import KEY
from tests.wire.scripted import COMPLETIONS, MODEL, Hold, Say, ScriptedService


async def test_1_a_download_stays_in_its_directory(
    client: ServiceClient, service: ScriptedService, tmp_path: Path
) -> None:
    """See test_downloads."""
    file = {"url": f"{service.url}/x", "relative_file_name": "../escaped", "node_rank": 0, "size_bytes": 1}
    service.always("GET", "/v1/loops/checkpoints/c1/files", Say(body={"presigned_urls": [file], "total_count": 1}))
    with pytest.raises(ProtocolError, match="unsafe file name"):
        await client.download_checkpoint("c1", dest_dir=tmp_path / "dest")
    assert not (tmp_path / "escaped").exists()


async def test_2_a_wrong_type_takes_no_turn(service: ScriptedService, trainer: TrainingClient) -> None:
    """See test_submitting."""
    wrong: Any = {"learning_rate": 1e-4}
    with pytest.raises(InputError, match="adam_params: expected AdamParams, got dict"):
        await trainer.optim_step(wrong)
    async with asyncio.timeout(5):
        await (await trainer.optim_step(AdamParams()))
    assert [seen.json["seq_id"] for seen in service.submitted()] == [2]


async def test_3_cancelling_a_queued_operation_harms_no_other(
    service: ScriptedService, trainer: TrainingClient
) -> None:
    """See test_submitting and the property in unit/test_turns."""
    held = Hold(Say(202, {"operation_id": "first"}))
    service.answer("POST", "/trainer/optim_step", held)
    tasks = [asyncio.create_task(trainer.optim_step(AdamParams())) for _ in range(5)]
    await held.arrived.wait()
    tasks[2].cancel()
    await asyncio.wait([tasks[2]])
    held.go.set()
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "OperationFuture",
        "OperationFuture",
        "CancelledError",
        "OperationFuture",
        "OperationFuture",
    ]
    assert [seen.json["seq_id"] for seen in service.submitted()] == [2, 3, 4, 5]


async def test_4_two_event_loops_do_not_deadlock(client: ServiceClient) -> None:
    """See test_life."""

    def elsewhere() -> None:
        with pytest.raises(ClosedError, match="another event loop"):
            asyncio.run(client.get_server_capabilities())

    async with asyncio.timeout(5):
        await asyncio.to_thread(elsewhere)


async def test_5_a_time_out_or_cancellation_does_not_poison_a_future(
    service: ScriptedService, trainer: TrainingClient
) -> None:
    """See unit/test_futures."""
    held = Hold(Say(body={"status": "done", "result": {"metrics": {"step": 9.0}}}))
    service.answer("POST", "/trainer/optim_step", Say(202, {"operation_id": "o"}))
    service.answer("GET", "/trainer/operations/o", held)
    future = await trainer.optim_step(AdamParams())
    with pytest.raises(OperationTimeoutError):
        await future.result(timeout=0.01)
    waiting = asyncio.create_task(future.result())
    await held.arrived.wait()
    waiting.cancel()
    await asyncio.wait([waiting])
    held.go.set()
    assert (await future).metrics == {"step": 9.0}


async def test_6_many_are_in_flight_without_threads(service: ScriptedService, sampler: SamplingClient) -> None:
    threads = threading.active_count()
    held = Hold(Say(body=COMPLETIONS))
    service.always("POST", "/sampler/sample", held)
    tasks = [asyncio.create_task(sampler.sample([1])) for _ in range(100)]
    await service.until_seen("POST", "/sampler/sample", 100)
    assert threading.active_count() == threads
    held.go.set()
    assert len(await asyncio.gather(*tasks)) == 100


async def test_7_dropped_clients_leave_neither_threads_nor_tasks(
    client: ServiceClient, service: ScriptedService
) -> None:
    threads = threading.active_count()
    for _ in range(5):
        trainer = await client.create_lora_training_client(MODEL)
        await (await trainer.save_weights_and_get_sampling_client("x")).sample([1])
        del trainer
    assert threading.active_count() == threads
    await client.close()
    assert not {task for task in asyncio.all_tasks() if task.get_name().startswith("loops_async")}


def test_8_a_client_of_an_earlier_run_of_the_loop_does_not_connect_anew() -> None:
    """See contract/regressions."""
    nowhere = "http://127.0.0.1:9"

    async def once() -> ServiceClient:
        async with ServiceClient.local(trainer_url=nowhere, sampler_url=nowhere) as client:
            return client

    client = asyncio.run(once())
    with pytest.raises(ClosedError):
        asyncio.run(client.get_server_capabilities())


@pytest.mark.parametrize("status", [400, 404])
async def test_9_a_bad_request_is_not_repeated(
    service: ScriptedService, trainer: TrainingClient, quick: Clock, status: int
) -> None:
    """See test_submitting."""
    service.always("POST", "/trainer/optim_step", Say(status, {"detail": "bad"}))
    with pytest.raises(ApiError, match="bad"):
        await trainer.optim_step(AdamParams())
    assert len(service.submitted()) == 1
    assert quick.pauses == []


async def test_10_a_paid_completion_is_kept_whatever_it_looks_like(
    service: ScriptedService, sampler: SamplingClient
) -> None:
    """See test_sample_answers."""
    odd = {"finish_reason": "odd", "token_ids": [5, 6], "logprobs": {"tokens": [], "token_logprobs": [None, -1.0]}}
    service.answer("POST", "/sampler/sample", Say(body={"choices": [odd]}))
    [sequence] = (await sampler.sample([5])).sequences
    assert (sequence.tokens, sequence.stop_reason) == ([5, 6], "odd")


async def test_11_logs_hold_no_secret(
    client: ServiceClient, service: ScriptedService, quick: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """See test_wrong_service and test_downloads."""
    caplog.set_level(logging.DEBUG)
    signed = f"{service.url}/file?X-Signature=5ecret"
    service.answer("GET", "/v1/loops/capabilities", Say(502, f"see {signed} Bearer {KEY}"))
    service.always("GET", "/v1/loops/capabilities", Say(body={"supported_models": []}))
    await client.get_server_capabilities()
    assert "trying again" in caplog.text
    assert "5ecret" not in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("checkpoint_id", "path"),
    [
        ("a/b", "/v1/loops/checkpoints/a%2Fb/files"),
        ("a?b#d", "/v1/loops/checkpoints/a%3Fb%23d/files"),
        ("a b%2Fc", "/v1/loops/checkpoints/a%20b%252Fc/files"),
        ("../sessions", "/v1/loops/checkpoints/..%2Fsessions/files"),
    ],
)
async def test_12_ids_are_escaped_in_urls(
    client: ServiceClient, service: ScriptedService, checkpoint_id: str, path: str
) -> None:
    service.seen.clear()
    with pytest.raises(ApiError):
        await client.get_checkpoint_archive_url(checkpoint_id)
    [seen] = service.seen
    assert seen.path == path


@pytest.mark.parametrize("checkpoint_id", ["", ".", "..", None, 5])
async def test_12_ids_that_no_url_can_hold_are_refused(
    client: ServiceClient, service: ScriptedService, checkpoint_id: Any
) -> None:
    service.seen.clear()
    with pytest.raises(InputError, match="checkpoint_id"):
        await client.get_checkpoint_archive_url(checkpoint_id)
    assert not service.seen


async def test_12_the_id_of_an_operation_is_escaped(service: ScriptedService, trainer: TrainingClient) -> None:
    service.answer("POST", "/trainer/optim_step", Say(202, {"operation_id": "a/b?c"}))
    service.always("GET", "/trainer/operations/a%2Fb%3Fc", Say(body={"status": "done", "result": {}}))
    await (await trainer.optim_step(AdamParams()))

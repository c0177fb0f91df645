"""Defects of a published client of this API that this one must not have.

Two of the list are met elsewhere: whether a cancelled call holds up others (`test_cancelling`), and what a log of
requests may hold, which this client does not write.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import loops_async
import loops_sync
from loops_async import (
    AdamParams,
    ApiError,
    ClosedError,
    Datum,
    OperationTimeoutError,
    ProtocolError,
    SamplingParams,
    ServiceClient,
    TrainingClient,
)
from loops_async._operations import batch
from loops_local import LocalService
from tests.contract._colours import Colour
from tests.contract._engine import WatchedEngine
from tests.contract._helpers import FEW_TOKENS, PROMPT, example, train


def files_below(directory: Path) -> dict[str, int]:
    """Return the size of each file by its name."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "..\\escaped", "C:escaped", "a/../../escaped", "."])
async def test_1_a_download_stays_in_its_directory(
    service: ServiceClient, local: LocalService, tmp_path: Path, name: str
) -> None:
    url = f"{local.base_url}/files/x"
    file = {"url": url, "relative_file_name": name, "node_rank": 0, "size_bytes": 2}
    local.faults.answer("GET */checkpoints/evil/files", 200, {"presigned_urls": [file], "total_count": 1})
    requests = local.faults.watch("GET /files/*")

    with pytest.raises(ProtocolError, match="unsafe file name"):
        await service.download_checkpoint("evil", dest_dir=tmp_path / "inside")
    assert not requests
    assert files_below(tmp_path) == {}


async def test_1_equal_names_of_two_nodes_do_not_overwrite_each_other(
    service: ServiceClient, trainer: TrainingClient, local: LocalService, tmp_path: Path
) -> None:
    await (await trainer.save_state("one"))
    (checkpoint,) = await trainer.list_checkpoints()
    page = await service.get_checkpoint_archive_url(checkpoint.id)
    first, second = page.presigned_urls[:2]
    files = [
        {"url": one.url, "relative_file_name": "same", "node_rank": rank, "size_bytes": one.size_bytes}
        for rank, one in enumerate([first, second])
    ]
    local.faults.answer(f"GET */checkpoints/{checkpoint.id}/files", 200, {"presigned_urls": files})

    await service.download_checkpoint(checkpoint.id, dest_dir=tmp_path)
    assert files_below(tmp_path) == {"node-0/same": first.size_bytes, "node-1/same": second.size_bytes}


async def test_1_a_file_of_another_size_is_refused(
    service: ServiceClient, trainer: TrainingClient, local: LocalService, tmp_path: Path
) -> None:
    await (await trainer.save_state("one"))
    (checkpoint,) = await trainer.list_checkpoints()
    (file, *_) = (await service.get_checkpoint_archive_url(checkpoint.id)).presigned_urls
    listed = {"url": file.url, "relative_file_name": "a", "node_rank": 0, "size_bytes": file.size_bytes - 1}
    local.faults.answer(f"GET */checkpoints/{checkpoint.id}/files", 200, {"presigned_urls": [listed]})

    with pytest.raises(ProtocolError, match=f"{file.size_bytes:,} bytes; the listing says {file.size_bytes - 1:,}"):
        await service.download_checkpoint(checkpoint.id, dest_dir=tmp_path)
    assert "a" not in files_below(tmp_path)


async def test_2_a_call_that_is_refused_here_takes_no_turn(trainer: TrainingClient, engine: WatchedEngine) -> None:
    wrong: list[Any] = [None, {"learning_rate": 1e-4}, AdamParams(learning_rate=-1.0)]
    for params in wrong:
        with pytest.raises(ValueError, match="adam_params"):
            await trainer.optim_step(params)
    with pytest.raises(ValueError, match=r"data\[0\]\.loss_fn_inputs\['weights'\]"):
        await trainer.forward([Datum(model_input=[1, 2], loss_fn_inputs={"weights": [1.0]})])
    await train(trainer)
    assert [name for name, _ in engine.done] == ["forward_backward", "optim_step"]


async def test_4_another_event_loop_gets_a_clear_error(local: LocalService, engine: WatchedEngine) -> None:
    async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        trainer = await service.create_lora_training_client(engine.name)
        sampler = await service.create_sampling_client(engine.name)
        done = await trainer.forward([example(1)])
        output = await done
        engine.training.clear()
        under_way = await trainer.forward([example(2)])
        calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
            service.get_server_capabilities,
            trainer.policy_version,
            partial(trainer.forward, [example(3)]),
            partial(service.create_lora_training_client, engine.name),
            partial(sampler.sample, PROMPT),
            sampler.ensure_ready,
            under_way.result,
        ]
        for call in calls:
            with pytest.raises(ClosedError, match=r"belongs to another event loop.*loops_sync"):
                await asyncio.to_thread(_run, call)

        engine.training.set()
        assert (await under_way).loss_fn_outputs
        assert await asyncio.to_thread(_run, done.result) == output
        await train(trainer)
        assert engine.done[1:3] == [("forward", 2), ("forward_backward", 1)]


def _run(call: Callable[[], Coroutine[Any, Any, object]]) -> object:
    return asyncio.run(asyncio.wait_for(call(), 5.0))


async def test_4_the_blocking_client_may_be_called_from_anywhere(local: LocalService, engine: WatchedEngine) -> None:
    def use(trainer: loops_sync.TrainingClient) -> int:
        return len(trainer.forward([example()]).result().loss_fn_outputs)

    async def use_in_a_loop(trainer: loops_sync.TrainingClient) -> int:
        return use(trainer)

    with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        trainer = service.create_lora_training_client(engine.name)
        assert use(trainer) == 1
        assert await asyncio.gather(*(asyncio.to_thread(use, trainer) for _ in range(4))) == [1] * 4
        assert await asyncio.to_thread(asyncio.run, use_in_a_loop(trainer)) == 1


async def test_5_a_wait_that_is_over_does_not_poison_the_future(trainer: TrainingClient, engine: WatchedEngine) -> None:
    engine.training.clear()
    future = await trainer.forward([example()])
    for _ in range(2):
        with pytest.raises(OperationTimeoutError):
            await future.result(timeout=0.01)
    engine.training.set()
    assert (await future).loss_fn_outputs


async def test_6_the_parts_of_a_split_call_are_all_under_way(
    trainer: TrainingClient, engine: WatchedEngine, local: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MAX_REQUEST_BYTES", 600)
    engine.training.clear()
    parts = local.faults.watch(f"POST */{trainer.run_id}/forward_backward", times=1000)
    data = [example(number) for number in range(1, 41)]
    forward = await trainer.forward_backward(data)
    optim = await trainer.optim_step(AdamParams())

    assert len(parts) >= 20  # all were accepted before the first was done
    engine.training.set()
    assert len((await forward).loss_fn_outputs) == 40
    await optim
    assert [name for name, _ in engine.done] == ["forward_backward"] * len(parts) + ["optim_step"]


async def test_7_clients_that_are_dropped_leave_nothing(
    service: ServiceClient, colour: Colour, engine: WatchedEngine
) -> None:
    async def use() -> weakref.ref[Any]:
        trainer = await service.create_lora_training_client(engine.name)
        await train(trainer)
        sampler = await trainer.save_weights_and_get_sampling_client("one")
        await sampler.sample(PROMPT, 1, FEW_TOKENS)
        return weakref.ref(colour.own(sampler))

    await use()
    tasks = len(asyncio.all_tasks())
    dropped = [await use() for _ in range(5)]
    gc.collect()
    assert [one() for one in dropped] == [None] * 5
    assert len(asyncio.all_tasks()) <= tasks
    assert not [one for one in threading.enumerate() if "loops_async" in one.name]


def test_7_the_blocking_clients_of_a_process_share_one_thread(local: LocalService) -> None:
    for _ in range(5):
        loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key).get_server_capabilities()
    gc.collect()
    assert [one.name for one in threading.enumerate()].count("loops_sync") == 1


def test_8_several_runs_of_asyncio_each_with_its_own_client(local: LocalService, engine: WatchedEngine) -> None:
    async def use() -> int:
        async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            sampler = await service.create_sampling_client(engine.name)
            return len((await sampler.sample(PROMPT, 3, FEW_TOKENS)).sequences)

    assert [asyncio.run(use()) for _ in range(3)] == [3, 3, 3]


def test_8_a_client_of_an_earlier_run_says_that_it_is_over(local: LocalService, engine: WatchedEngine) -> None:
    async def make() -> loops_async.SamplingClient:
        async with ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            return await service.create_sampling_client(engine.name)

    sampler = asyncio.run(make())
    with pytest.raises(ClosedError, match="make a new ServiceClient"):
        asyncio.run(sampler.sample(PROMPT))


@pytest.mark.parametrize("status", [400, 404])
async def test_9_what_is_refused_is_asked_once(trainer: TrainingClient, local: LocalService, status: int) -> None:
    refusals = local.faults.answer(f"POST */{trainer.run_id}/*", status, {"error": "no"}, times=100)
    with pytest.raises(ApiError) as raised:
        await trainer.forward([example()])
    assert (raised.value.status, raised.value.retryable, len(refusals)) == (status, False, 1)


@pytest.mark.parametrize("status", [400, 404])
async def test_9_a_refused_sample_is_asked_once(
    service: ServiceClient, engine: WatchedEngine, local: LocalService, status: int
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    refusals = local.faults.answer("POST */sample", status, {"error": "no"}, times=100)
    with pytest.raises(ApiError) as raised:
        await sampler.sample(PROMPT)
    assert (raised.value.status, len(refusals)) == (status, 1)


async def test_10_a_completion_may_repeat_the_prompt(service: ServiceClient, engine: WatchedEngine) -> None:
    sampler = await service.create_sampling_client(engine.name)
    (sequence,) = (await sampler.sample([5], 1, SamplingParams(max_tokens=3))).sequences
    assert sequence.tokens == [5, 5, 5]
    assert sequence.logprobs is not None
    assert len(sequence.logprobs) == 3


async def test_10_an_odd_answer_is_not_thrown_away(
    service: ServiceClient, engine: WatchedEngine, local: LocalService
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    choice = {
        "text": "hi",
        "finish_reason": "content_filter",
        "logprobs": {"tokens": ["token_id:104", "token_id:105"], "token_logprobs": [-0.5, None]},
    }
    local.faults.answer("POST */sample", 200, {"choices": [choice]})
    (sequence,) = (await sampler.sample(PROMPT)).sequences
    assert (sequence.tokens, sequence.text, sequence.stop_reason) == ([104, 105], "hi", "content_filter")
    assert sequence.logprobs == pytest.approx([-0.5, float("nan")], nan_ok=True)


@pytest.mark.parametrize("name", ["../runs", "a/b", "a?b=c", "a#b", "a%2Fb", "é"])
async def test_12_ids_are_escaped(service: ServiceClient, local: LocalService, name: str) -> None:
    control = service.control_plane
    calls = {
        "/v1/loops/runs/": control.get_run,
        "/v1/loops/samplers/": control.get_sampler,
        "/v1/loops/deployments/": control.get_deployment,
        "/v1/loops/sessions/": control.get_session,
        "/v1/loops/checkpoints/": service.get_checkpoint_archive_url,
    }
    for root, call in calls.items():
        requests = local.faults.answer("GET *", 404, {"error": "no such thing"})
        with pytest.raises(ApiError, match="no such thing"):
            await call(name)
        (request,) = requests
        assert request.path.removesuffix("/files") == root + name
        assert request.query_string in ("", "page_size=1000&page_token=0")

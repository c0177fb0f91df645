from __future__ import annotations

import asyncio
import threading
from io import BytesIO
from typing import Any

import pytest

from tests.service.api import MODEL, Api, Gate, datum
from tests.support.patience import PATIENCE_SECONDS


async def test_a_training_step_end_to_end(api: Api) -> None:
    run = await api.run(lora_rank=8)
    assert await api.operate(run, "init_trainer_server", {"lora_rank": 4, "base_model": MODEL, "seq_id": 1}) == {
        "step": 0,
        "lora_rank": 4,
    }
    result = await api.operate(run, "forward_backward", {"data": [datum(1, 2, 3), datum(4, 5)], "seq_id": 2})
    assert [output["logprobs"]["shape"] for output in result["loss_fn_outputs"]] == [[3], [2]]
    assert result["loss_fn_outputs"][0]["logprobs"]["data"][2] is None, "a masked position travels as null"
    assert result["loss"] > 0
    metrics = (await api.operate(run, "optim_step", {"adam_params": {"learning_rate": 0.5}}))["metrics"]
    assert metrics["step"] == 1
    assert metrics["lr"] == 0.5
    assert await api.get(f"{run['base_url']}/policy_version") == {"policy_version": 1}
    await api.operate(run, "init_trainer_server", {"lora_rank": 4, "base_model": MODEL})
    assert await api.get(f"{run['base_url']}/policy_version") == {"policy_version": 0}


async def test_an_operation_without_init_uses_the_rank_of_the_run(api: Api) -> None:
    run = await api.run(lora_rank=8)
    assert (await api.operate(run, "forward", {"data": [datum(1, 2)]}))["metrics"]
    await api.publish(run)
    assert (await api.checkpoints(run["id"]))[0]["lora_adapter_config"] == {"r": 8}


async def test_operations_of_a_run_keep_their_order_and_runs_take_turns(serve: Any) -> None:
    gate = Gate()
    api = await serve(engine=gate)
    one, two = await api.run(lora_rank=1), await api.run(lora_rank=2)
    ids: list[tuple[str, str]] = []
    for run in (one, two):
        for token in (1, 2, 3):
            operation = await api.submit(run["base_url"], "forward_backward", {"data": [datum(token, 9)]})
            ids.append((run["base_url"], operation))
        ids.append((run["base_url"], await api.submit(run["base_url"], "optim_step", {"adam_params": {}})))
    gate.open()
    answers = await asyncio.gather(*(api.poll(*at) for at in reversed(ids)))
    assert {answer["status"] for answer in answers} == {"done"}
    of_one, of_two = ([p for p in gate.passed if p.startswith(f"rank {rank}")] for rank in (1, 2))
    assert of_one == ["rank 1 forward 1", "rank 1 forward 2", "rank 1 forward 3", "rank 1 optim"]
    assert len(of_two) == 4
    # No more than this: after each operation, the run whose outcome is stored sooner comes next.
    assert gate.passed.index(of_two[0]) < gate.passed.index(of_one[-1]), (
        "the second run did not wait for all of the first"
    )


async def test_the_same_key_is_done_once_while_pending_and_afterwards(serve: Any) -> None:
    gate = Gate()
    api = await serve(engine=gate)
    run = await api.run()
    key = {"Idempotency-Key": "k" * 32}
    body = {"adam_params": {}}
    first = await api.submit(run["base_url"], "optim_step", body, headers=key)
    assert await api.submit(run["base_url"], "optim_step", body, headers=key) == first == "k" * 32
    gate.open()
    answer = await api.poll(run["base_url"], first)
    assert await api.submit(run["base_url"], "optim_step", body, headers=key) == first
    assert await api.poll(run["base_url"], first) == answer
    assert gate.passed == ["rank 64 optim"]


async def test_keys_of_different_runs_do_not_meet(api: Api) -> None:
    key = {"Idempotency-Key": "same"}
    runs = [await api.run(), await api.run()]
    for run in runs:
        await api.poll(
            run["base_url"], await api.submit(run["base_url"], "optim_step", {"adam_params": {}}, headers=key)
        )
    for run in runs:
        assert await api.get(f"{run['base_url']}/policy_version") == {"policy_version": 1}


async def test_a_key_is_made_up_when_none_is_sent_and_escaped_in_urls(api: Api) -> None:
    run = await api.run()
    made_up = {await api.submit(run["base_url"], "optim_step", {"adam_params": {}}) for _ in range(2)}
    assert len(made_up) == 2
    odd = await api.ask(
        "POST",
        f"{run['base_url']}/optim_step",
        json={"adam_params": {}},
        headers={"Idempotency-Key": "a/b c"},
        status=202,
    )
    assert odd.headers["Location"] == "/operations/a%2Fb%20c"
    assert (await api.poll(run["base_url"], "a%2Fb%20c"))["status"] == "done"


async def test_a_poll_is_held_then_408_and_answered_as_soon_as_there_is_an_answer(serve: Any) -> None:
    gate = Gate()
    api = await serve(engine=gate, poll_hold_seconds=0.1)
    run = await api.run()
    operation = await api.submit(run["base_url"], "optim_step", {"adam_params": {}})
    started = asyncio.get_running_loop().time()
    await api.ask("GET", f"{run['base_url']}/operations/{operation}", status=408)
    assert asyncio.get_running_loop().time() - started > 0.09
    gate.open()

    async def is_answered() -> bool:
        async with api.http.get(
            f"{run['base_url']}/operations/{operation}", headers={"Authorization": f"Bearer {api.local.api_key}"}
        ) as response:
            return response.status == 200

    await api.until(is_answered)


async def test_a_held_poll_hears_the_answer_at_once(serve: Any) -> None:
    gate = Gate()
    api = await serve(engine=gate)
    run = await api.run()
    operation = await api.submit(run["base_url"], "optim_step", {"adam_params": {}})
    polls = [asyncio.create_task(api.poll(run["base_url"], operation)) for _ in range(3)]
    await asyncio.to_thread(gate.waiting.wait, PATIENCE_SECONDS)
    polls[0].cancel()
    gate.open()
    async with asyncio.timeout(PATIENCE_SECONDS):
        answers = await asyncio.gather(*polls[1:])
    assert all(answer["status"] == "done" for answer in answers)


async def test_answers_are_forgotten_after_a_while(serve: Any) -> None:
    api = await serve(result_retention_seconds=0.05)
    run = await api.run()
    operation = await api.submit(run["base_url"], "optim_step", {"adam_params": {}})
    assert (await api.poll(run["base_url"], operation))["status"] == "done"

    async def is_forgotten() -> bool:
        async with api.http.get(
            f"{run['base_url']}/operations/{operation}", headers={"Authorization": f"Bearer {api.local.api_key}"}
        ) as response:
            return response.status == 404

    await api.until(is_forgotten)


@pytest.mark.parametrize(
    ("name", "body", "field"),
    [
        ("forward", {}, "data"),
        ("forward", {"data": []}, "data"),
        ("forward", {"data": [{"model_input": {"chunks": []}}]}, "data[0].model_input"),
        ("forward", {"data": [datum(1, 2)], "loss_fn": "huber"}, "loss_fn"),
        ("forward", {"data": [datum(1, 2)], "top_k_logprobs": 21}, "top_k_logprobs"),
        ("forward", {"data": [datum(1, 2)], "run_id": "other"}, "X-Run-Id"),
        ("optim_step", {}, "adam_params"),
        ("optim_step", {"adam_params": {"beta1": 1.5}}, "adam_params.beta1"),
        ("save_state", {"name": "a/b"}, "name"),
        ("save_state", {"name": ".."}, "name"),
        ("save_state", {"name": "x", "ttl_seconds": 0}, "ttl_seconds"),
        ("save_weights_for_sampler", {"name": "a\nb"}, "name"),
        ("load_state", {"path": 7}, "path"),
        ("init_trainer_server", {"lora_rank": 8, "base_model": "other"}, "base_model"),
        ("init_trainer_server", {"lora_rank": 0, "base_model": MODEL}, "lora_rank"),
    ],
)
async def test_bad_body_is_422_and_named(api: Api, name: str, body: dict[str, Any], field: str) -> None:
    run = await api.run()
    error = await api.post(f"{run['base_url']}/{name}", body, status=422)
    assert error["code"] == "VALIDATION_ERROR"
    assert error["details"] == {"field": field}
    assert error["message"]


async def test_a_sequence_longer_than_the_run_allows_is_422(api: Api) -> None:
    run = await api.run(max_seq_len=4)
    await api.operate(run, "forward", {"data": [datum(1, 2, 3, 4)]})
    error = await api.post(f"{run['base_url']}/forward", {"data": [datum(1, 2), datum(1, 2, 3, 4, 5)]}, status=422)
    assert error["details"] == {"field": "data[1].model_input"}
    assert "at most 4" in error["message"]


async def test_too_large_a_body_is_413(api: Api) -> None:
    run = await api.run()
    await api.ask("POST", f"{run['base_url']}/forward", data=BytesIO(bytes(33 * 1024 * 1024)), status=413)


async def test_what_the_engine_refuses_is_a_failed_operation_and_the_next_one_runs(api: Api) -> None:
    run = await api.run()
    short = datum(1, 2, 3)
    short["loss_fn_inputs"]["target_tokens"] = {"data": [2], "dtype": "int64", "shape": [1]}
    assert (await api.refused(run, "forward", {"data": [short]})).startswith("ValueError: data[0].loss_fn_inputs")
    await api.train(run)


async def test_a_broken_engine_is_a_failed_operation_with_its_class(serve: Any, caplog: Any) -> None:
    class Broken(Gate):
        def __call__(self, name: str) -> Any:
            engine = super().__call__(name)

            def trainer(rank: int, seed: int | None = None) -> Any:
                raise ZeroDivisionError("no such luck")

            engine.trainer = trainer  # type: ignore[method-assign]  # the point of the test
            return engine

    api = await serve(engine=Broken())
    run = await api.run()
    assert await api.refused(run, "optim_step", {"adam_params": {}}) == "ZeroDivisionError: no such luck"
    assert "no such luck" in caplog.text


async def test_a_run_header_of_another_run_is_refused(api: Api) -> None:
    one, two = await api.run(), await api.run()
    header = {"X-Run-Id": two["id"]}
    await api.post(f"{one['base_url']}/optim_step", {"adam_params": {}}, headers=header, status=422)
    await api.ask("GET", f"{one['base_url']}/health", headers={"X-Run-Id": one["id"]})


async def test_trainers_share_one_thread_that_ends_with_the_service(serve: Any) -> None:
    before = set(threading.enumerate())
    api = await serve()
    for _ in range(3):
        await api.train(await api.run())
    threads = {thread for thread in threading.enumerate() if thread.name.startswith("loops-")} - before
    assert sorted(thread.name.split("_")[0] for thread in threads) == ["loops-store", f"loops-train-{MODEL}"]
    await api.local.__aexit__(None, None, None)
    assert not any(thread.is_alive() for thread in threads)


async def test_closing_finishes_what_is_at_work_and_drops_the_rest(serve: Any, tmp_path: Any) -> None:
    gate = Gate()
    api = await serve(engine=gate, data_dir=tmp_path)
    run = await api.run()
    root = run["base_url"]
    at_work, behind = [await api.submit(root, "optim_step", {"adam_params": {}}) for _ in range(2)]
    answered = asyncio.create_task(api.poll(root, at_work))
    dropped = asyncio.create_task(api.ask("GET", f"{root}/operations/{behind}", status=503))
    await asyncio.to_thread(gate.waiting.wait, PATIENCE_SECONDS)
    closing = asyncio.create_task(api.local.__aexit__(None, None, None))
    await dropped
    await api.ask("POST", f"{root}/optim_step", json={"adam_params": {}}, status=503)
    gate.open()
    assert (await answered)["result"]["metrics"]["step"] == 1
    await closing
    again = await serve(engine=gate, data_dir=tmp_path)
    root = f"{again.local.base_url}/trainers/{run['id']}"
    assert await again.get(f"{root}/policy_version") == {"policy_version": 1}
    assert await again.poll(root, at_work) == await answered
    await again.ask("GET", f"{root}/operations/{behind}", status=404)


async def test_closing_does_not_wait_for_provisioning(serve: Any, tmp_path: Any) -> None:
    api = await serve(data_dir=tmp_path)
    run = await api.run()
    await api.local.__aexit__(None, None, None)
    api = await serve(data_dir=tmp_path, provisioning_seconds=2 * PATIENCE_SECONDS)
    root = f"{api.local.base_url}/trainers/{run['id']}"
    operation = await api.submit(root, "optim_step", {"adam_params": {}})
    poll = asyncio.create_task(api.ask("GET", f"{root}/operations/{operation}", status=503))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await api.until(lambda: is_waking(api, run))
        await api.local.__aexit__(None, None, None)
        await poll


async def is_waking(api: Api, run: dict[str, Any]) -> bool:
    return await api.trainer_status(run) == "DEPLOYING"


async def test_a_strange_key_is_refused(api: Api) -> None:
    run = await api.run()
    for key in ("x" * 256, "a\tb"):
        headers = {"Idempotency-Key": key}
        body = {"adam_params": {}}
        error = await api.post(f"{run['base_url']}/optim_step", body, headers=headers, status=422)
        assert error["details"] == {"field": "Idempotency-Key"}


async def test_a_run_begins_and_resets_with_the_weights_of_its_path(api: Api) -> None:
    parent = await api.run(lora_rank=8)
    await api.train(parent, 2)
    path = (await api.operate(parent, "save_state", {"name": "two"}))["path"]
    child = await api.run(path=path, lora_rank=8)
    assert await api.operate(child, "init_trainer_server", {"lora_rank": 8, "base_model": MODEL}) == {
        "step": 0,
        "lora_rank": 8,
    }
    assert await api.operate(child, "load_state_with_optimizer", {"path": path}) == {"step": 2}
    assert await api.operate(child, "load_state", {"path": path}) == {"step": 0}
    session = await api.session()
    other = {"session_id": session, "base_model": "other", "path": path}
    assert (await api.post("/v1/loops/runs", other, status=400))["details"] == {"field": "path"}

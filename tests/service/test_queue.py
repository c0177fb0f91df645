"""The serverless form: no deployments, and samples in a queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.service.api import MODEL, Api

KEY = {"Idempotency-Key": "one"}


@pytest.fixture
async def api(serve: Callable[..., Any]) -> Api:
    return await serve(serverless=True, poll_hold_seconds=0.02)


async def standalone(api: Api) -> tuple[str, dict[str, str]]:
    """Return the root of a sampler and the headers that name it."""
    body = {"session_id": await api.session(), "base_model": MODEL}
    sampler = (await api.post("/v1/loops/samplers", body))["sampler"]
    assert sampler["model_id"] is sampler["deployment_id"] is None
    return sampler["base_url"], {"X-Sampler-Id": sampler["id"]}


async def new_run(api: Api) -> dict[str, Any]:
    body = {"session_id": await api.session(), "base_model": MODEL}
    return (await api.post("/v1/loops/runs", body))["run"]


async def test_a_run_has_no_deployments(api: Api) -> None:
    run = await new_run(api)
    assert run["deployment_id"] is run["sampler"]["model_id"] is run["sampler"]["deployment_id"] is None
    await api.until(lambda: api.is_healthy(run["base_url"]))
    await api.ask("GET", f"{run['base_url']}/policy_version", status=501)


async def test_a_trainer_wants_a_key_for_each_operation(api: Api) -> None:
    root = (await new_run(api))["base_url"]
    body = {"lora_rank": 4, "base_model": MODEL}
    refused = await api.post(f"{root}/init_trainer_server", body, status=422)
    assert "Idempotency-Key" in refused["message"]
    await api.post(f"{root}/init_trainer_server", body, status=202, headers=KEY)


async def test_a_sample_is_generated_once_however_often_it_is_handed_in(api: Api) -> None:
    root, name = await standalone(api)
    accepted = await api.post(f"{root}/sample", {"prompt": [5], "max_tokens": 2}, status=202, headers=name | KEY)
    assert accepted == {"operation_id": "one", "schema_version": 1}
    await api.post(f"{root}/sample", {"prompt": [9], "max_tokens": 2}, status=202, headers=name | KEY)
    done = await api.get(f"{root}/operations/one", headers=name)
    assert done["status"] == "done"
    assert done["result"]["choices"][0]["token_ids"] == [5, 5]


async def test_each_sampler_has_samples_of_its_own(api: Api) -> None:
    root, name = await standalone(api)
    await api.post(f"{root}/sample", {"prompt": [5]}, status=202, headers=name | KEY)
    other, other_name = await standalone(api)
    await api.ask("GET", f"{other}/operations/one", status=404, headers=other_name)


async def test_what_is_done_cannot_be_cancelled(api: Api) -> None:
    root, name = await standalone(api)
    await api.post(f"{root}/sample", {"prompt": [5]}, status=202, headers=name | KEY)
    await api.get(f"{root}/operations/one", headers=name)
    await api.post(f"{root}/operations/one/cancel", status=409, headers=name)
    await api.post(f"{root}/operations/two/cancel", status=404, headers=name)


async def test_a_sampler_that_rises_takes_samples_and_gives_them_up(serve: Callable[..., Any]) -> None:
    api = await serve(serverless=True, poll_hold_seconds=0.02, provisioning_seconds=30.0)
    root, name = await standalone(api)
    await api.post(f"{root}/sample", {"prompt": [5]}, status=202, headers=name | KEY)
    await api.ask("GET", f"{root}/operations/one", status=408, headers=name)
    await api.post(f"{root}/operations/one/cancel", headers=name)
    await api.ask("GET", f"{root}/operations/one", status=404, headers=name)


async def test_what_was_done_is_forgotten_after_a_while(serve: Callable[..., Any]) -> None:
    api = await serve(serverless=True, result_retention_seconds=0.0)
    root, name = await standalone(api)
    await api.post(f"{root}/sample", {"prompt": [5]}, status=202, headers=name | KEY)

    async def is_forgotten() -> bool:
        async with api.http.get(
            f"{root}/operations/one", headers=name | {"Authorization": f"Bearer {api.local.api_key}"}
        ) as response:
            return response.status == 404

    await api.until(is_forgotten)


async def test_a_request_names_the_run_or_the_sampler_and_not_both(api: Api) -> None:
    run = await new_run(api)
    root, sampler_id = run["sampler"]["base_url"], run["sampler"]["id"]
    path = f"bt://loops:{run['id']}/sampler_weights/x"
    for headers in (
        {},
        {"X-Run-Id": run["id"], "X-Sampler-Id": sampler_id},
        {"X-Checkpoint-Path": path, "X-Sampler-Id": sampler_id},
    ):
        for ask in (
            api.ask("POST", f"{root}/sample", json={"prompt": [5]}, status=400, headers=headers | KEY),
            api.ask("GET", f"{root}/operations/one", status=400, headers=headers),
        ):
            refused = await ask
            assert refused.json()["code"] == "run_or_sampler_required"
            assert refused.headers["X-Baseten-Error-Source"] == "06"
    for headers in (
        {"X-Run-Id": "other"},
        {"X-Sampler-Id": "other"},
        {"X-Run-Id": run["id"], "X-Checkpoint-Path": "bt://loops:other/sampler_weights/x"},
        {"X-Checkpoint-Path": "somewhere"},
    ):
        refused = await api.ask("POST", f"{root}/sample", json={"prompt": [5]}, status=400, headers=headers | KEY)
        assert refused.json()["code"] == "BAD_REQUEST"
    named = {"X-Run-Id": run["id"], "X-Checkpoint-Path": path}
    await api.post(f"{root}/sample", {"prompt": [5]}, status=202, headers=named | KEY)
    failed = await api.get(f"{root}/operations/one", headers={"X-Run-Id": run["id"]})
    assert failed["status"] == "error"
    assert path in failed["error"]


async def test_what_cannot_be_queued_is_refused_at_once(api: Api) -> None:
    root, name = await standalone(api)
    await api.post(f"{root}/sample", {"prompt": [5]}, status=400, headers=name)
    await api.post(f"{root}/sample", {"prompt": "words"}, status=400, headers=name | KEY)
    await api.post(f"{root}/sample", {"prompt": [5], "model": "other"}, status=404, headers=name | KEY)


async def test_a_sampler_that_was_switched_off_takes_nothing(api: Api) -> None:
    root, name = await standalone(api)
    await api.post(f"/v1/loops/samplers/{name['X-Sampler-Id']}/deactivate")
    refused = await api.ask("POST", f"{root}/sample", json={"prompt": [5]}, status=400, headers=name | KEY)
    assert refused.headers["X-Baseten-Error-Code"] == "631"


async def test_models_and_tokenizer_are_there_as_well(api: Api) -> None:
    root, name = await standalone(api)
    assert (await api.get(f"{root}/v1/models", headers=name))["data"][0]["id"] == MODEL
    assert "tokenizer.json" in (await api.get(f"{root}/tokenizer", headers=name))["files"]

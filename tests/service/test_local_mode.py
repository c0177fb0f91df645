from __future__ import annotations

from typing import Any

import pytest

from tests.service.api import MODEL, Api


async def begin(api: Api, run_id: str | None = None, base_model: str = MODEL) -> None:
    body = {"lora_rank": 8, "base_model": base_model}
    headers = {"X-Run-Id": run_id} if run_id else {}
    root = api.local.trainer_url
    operation = await api.submit(root, "init_trainer_server", body, headers=headers, key=None)
    assert (await api.poll(root, operation, headers=headers, key=None))["status"] == "done"


async def operate(api: Api, name: str, body: dict[str, Any], run_id: str | None = None) -> Any:
    headers = {"X-Run-Id": run_id} if run_id else {}
    operation = await api.submit(api.local.trainer_url, name, body, headers=headers, key=None)
    answer = await api.poll(api.local.trainer_url, operation, headers=headers, key=None)
    assert answer["status"] == "done", answer
    return answer["result"]


async def test_a_whole_run_without_a_key_or_a_control_plane(serve: Any) -> None:
    api = await serve(provisioning_seconds=30)
    await api.ask("GET", f"{api.local.trainer_url}/health", key=None)
    await begin(api)
    await operate(api, "optim_step", {"adam_params": {}})
    assert await operate(api, "save_weights_for_sampler", {"name": "s"}) == {
        "version": 1,
        "path": "bt://loops:local/sampler_weights/s",
    }
    _, version = await api.sample(
        api.local.sampler_url, key=None, headers={"X-Run-Id": "local", "X-Min-Policy-Version": "1"}
    )
    assert version == "1"
    _, version = await api.sample(api.local.sampler_url, key=None)
    assert version == "0"


async def test_runs_are_told_apart_by_header(api: Api) -> None:
    await begin(api, "one")
    await begin(api, "two")
    await operate(api, "optim_step", {"adam_params": {}}, "one")
    for run_id, step in (("one", 1), ("two", 0)):
        headers = {"X-Run-Id": run_id}
        url = f"{api.local.trainer_url}/policy_version"
        assert await api.get(url, headers=headers, key=None) == {"policy_version": step}


async def test_a_run_may_be_named_in_the_body_only(api: Api) -> None:
    root = api.local.trainer_url
    body = {"lora_rank": 8, "base_model": MODEL, "run_id": "mine"}
    operation = await api.submit(root, "init_trainer_server", body, key=None)
    assert (await api.poll(root, operation, headers={"X-Run-Id": "mine"}, key=None))["status"] == "done"
    clash = {"X-Run-Id": "other"}
    await api.ask("POST", f"{root}/init_trainer_server", json=body, headers=clash, key=None, status=422)


async def test_its_checkpoints_are_listed_and_downloaded_without_a_key_and_no_others(api: Api) -> None:
    await begin(api, "one")
    await operate(api, "save_state", {"name": "s"}, "one")
    (checkpoint,) = await api.checkpoints("one", key=None)
    page = await api.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files", key=None)
    await api.ask("GET", page["presigned_urls"][0]["url"], key=None)
    run = await api.run()
    await api.operate(run, "save_state", {"name": "s"})
    (private,) = await api.checkpoints(run["id"])
    for url in (
        f"/v1/loops/checkpoints?run_id={run['id']}",
        f"/v1/loops/checkpoints/{private['id']}/files",
        "/v1/loops/checkpoints?run_id=nobody",
        f"/v1/loops/checkpoints?base_model={MODEL}",
        f"/v1/loops/checkpoints?run_id=one&base_model={MODEL}",
        "/v1/loops/checkpoints/x/files",
        "/v1/loops/runs",
    ):
        await api.ask("GET", url, key=None, status=401)


async def test_runs_of_the_control_plane_are_out_of_reach(api: Api) -> None:
    run = await api.run()
    headers = {"X-Run-Id": run["id"]}
    root = api.local.trainer_url
    await api.ask("GET", f"{root}/policy_version", headers=headers, key=None, status=404)
    body = {"lora_rank": 8, "base_model": MODEL}
    await api.ask("POST", f"{root}/init_trainer_server", json=body, headers=headers, key=None, status=422)
    await api.ask(
        "POST", f"{api.local.sampler_url}/sample", json={"prompt": [1]}, headers=headers, key=None, status=404
    )
    await begin(api, "mine")
    assert (await api.get("/v1/loops/runs"))["runs"] == [await shown(api, run)]
    path = (await api.operate(run, "save_state", {"name": "s"}))["path"]
    operation = await api.submit(root, "load_state", {"path": path}, headers={"X-Run-Id": "mine"}, key=None)
    answer = await api.poll(root, operation, headers={"X-Run-Id": "mine"}, key=None)
    assert answer["status"] == "error"
    served = (await api.publish(run))["path"]
    pinned = {"X-Checkpoint-Path": served, "X-Run-Id": "mine"}
    await api.ask("POST", f"{api.local.sampler_url}/sample", json={"prompt": [1]}, headers=pinned, key=None, status=400)


async def shown(api: Api, run: dict[str, Any]) -> dict[str, Any]:
    return (await api.get(f"/v1/loops/runs/{run['id']}"))["run"]


async def test_another_model_begins_the_run_again(api: Api) -> None:
    await begin(api)
    await operate(api, "optim_step", {"adam_params": {}})
    await begin(api, base_model="other")
    models = (await api.get(f"{api.local.sampler_url}/v1/models", headers={"X-Run-Id": "local"}, key=None))["data"]
    assert models[0]["id"] == "other"
    assert await api.get(f"{api.local.trainer_url}/policy_version", key=None) == {"policy_version": 0}


@pytest.mark.parametrize("run_id", ["a/b", "a b", "..", "x" * 65])
async def test_a_strange_run_id_is_refused(api: Api, run_id: str) -> None:
    body = {"lora_rank": 8, "base_model": MODEL, "run_id": run_id}
    await api.ask("POST", f"{api.local.trainer_url}/init_trainer_server", json=body, key=None, status=422)


async def test_nothing_runs_before_init(api: Api) -> None:
    await api.ask("POST", f"{api.local.trainer_url}/optim_step", json={"adam_params": {}}, key=None, status=404)


async def test_a_sample_may_name_its_model(serve: Any) -> None:
    api = await serve(models=["a", "b"])
    root = api.local.sampler_url
    served = (await api.get(f"{root}/v1/models", key=None))["data"]
    assert [model["id"] for model in served] == ["a", "b"]
    for model in served:
        listing = await api.get(f"{root}/{model['tokenizer']}", key=None)
        await api.ask("GET", f"{root}/{model['tokenizer']}/{listing['files'][0]}", key=None)
        await api.sample(root, {"model": model["id"]}, key=None)
    await api.post(f"{root}/sample", {"prompt": [1], "model": "c"}, key=None, status=404)


async def test_only_this_machine_needs_no_key(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from aiohttp import web

    await begin(api)
    monkeypatch.setattr(web.BaseRequest, "remote", "192.0.2.1")
    for url in (f"{api.local.trainer_url}/health", "/v1/loops/checkpoints?run_id=local"):
        await api.ask("GET", url, key=None, status=401)
        await api.ask("GET", url)


@pytest.mark.parametrize("header", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}])
async def test_a_page_in_a_browser_here_needs_a_key(api: Api, header: dict[str, str]) -> None:
    url = f"{api.local.trainer_url}/health"
    await api.ask("GET", url, key=None, headers={"Host": "localhost"})
    await api.ask("GET", url, key=None, headers=header, status=401)

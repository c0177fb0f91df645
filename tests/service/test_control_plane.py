from __future__ import annotations

import asyncio
from typing import Any

import pytest

from loops_local.engine.echo import EchoEngine
from tests.service.api import MODEL, Api
from tests.service.conftest import TimePasses


async def test_session_is_made_from_no_body_an_empty_one_or_a_project(api: Api) -> None:
    made = [
        await api.post("/v1/loops/sessions", status=200, data=b""),
        await api.post("/v1/loops/sessions", {}),
        await api.post("/v1/loops/sessions", {"training_project_id": "p"}),
    ]
    ids = [answer["session"]["id"] for answer in made]
    assert len(set(ids)) == 3
    assert await api.get(f"/v1/loops/sessions/{ids[0]}") == {"session": {"id": ids[0]}}


async def test_run_has_the_seed_fields_and_the_newer_ones(api: Api) -> None:
    session = await api.session()
    run = await api.run(session_id=session)
    sampler = run["sampler"]
    assert run["session_id"] == session
    assert run["base_model"] == sampler["base_model"] == MODEL
    assert run["base_url"].startswith(api.local.base_url)
    assert run["created_at"].endswith("Z")
    assert run["name"] == MODEL
    assert run["status"] == {"name": "ACTIVE"}
    assert run["deployment_id"]
    assert sampler["base_url"].endswith("/sync")
    assert sampler["model_id"]
    assert sampler["deployment_id"]
    assert (await api.get(f"/v1/loops/runs/{run['id']}"))["run"] == run | {
        "sampler": sampler | {"status": {"name": "ACTIVE"}}
    }
    assert (await api.get(f"/v1/loops/samplers/{sampler['id']}"))["sampler"]["id"] == sampler["id"]


async def test_lists_are_newest_first_and_filtered(api: Api) -> None:
    first = await api.run()
    second = await api.run(base_model="other")

    async def listed(**query: str) -> list[str]:
        return [run["id"] for run in (await api.get("/v1/loops/runs", params=query))["runs"]]

    assert await listed() == [second["id"], first["id"]]
    assert await listed(base_model=MODEL) == [first["id"]]
    assert await listed(run_id=second["id"]) == [second["id"]]
    samplers = (await api.get("/v1/loops/samplers"))["samplers"]
    assert [sampler["id"] for sampler in samplers] == [second["sampler"]["id"], first["sampler"]["id"]]
    deployments = (await api.get("/v1/loops/deployments"))["deployments"]
    assert [deployment["id"] for deployment in deployments] == [second["deployment_id"], first["deployment_id"]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("session_id", None),
        ("base_model", ""),
        ("lora_rank", 0),
        ("replicas", 0),
        ("scale_down_delay_seconds", 0),
        ("max_seq_len", 0),
        ("seed", "x"),
        ("path", "bt://loops:x/weights/../y"),
        ("path", "bt://loops:nobody/weights/x"),
        ("path", "bt://loops:nobody/sampler_weights/x"),
        ("name", ""),
    ],
)
async def test_bad_run_field_is_named(api: Api, field: str, value: Any) -> None:
    body = {"session_id": await api.session(), "base_model": MODEL, field: value}
    error = await api.post("/v1/loops/runs", body, status=400)
    assert error["code"] == "VALIDATION_ERROR"
    assert error["message"]
    assert error["details"] == {"field": field}


async def test_missing_field_and_broken_json_are_named(api: Api) -> None:
    assert (await api.post("/v1/loops/runs", {"session_id": "x"}, status=400))["details"] == {"field": "base_model"}
    assert (await api.post("/v1/loops/runs", status=400, data=b"{"))["details"] == {"field": "body"}


async def test_unknown_model_is_refused_with_what_there_is(serve: Any) -> None:
    api = await serve(models=["a", "b"])
    body = {"session_id": await api.session(), "base_model": "c"}
    error = await api.post("/v1/loops/runs", body, status=400)
    assert "a, b" in error["message"]
    assert error["details"] == {"field": "base_model"}
    assert (await api.post("/v1/loops/samplers", body, status=400))["details"] == {"field": "base_model"}


async def test_sequence_longer_than_the_model_is_refused(serve: Any) -> None:
    api = await serve(model="a")
    await api.local.load()
    body = {"session_id": await api.session(), "base_model": "a", "max_seq_len": 10**6}
    assert "32768" in (await api.post("/v1/loops/runs", body, status=400))["message"]


@pytest.mark.parametrize(
    "url",
    [
        "/v1/loops/sessions/x",
        "/v1/loops/runs/x",
        "/v1/loops/samplers/x",
        "/v1/loops/deployments/x",
        "/v1/loops/checkpoints/x/files",
        "/v1/loops/checkpoints?run_id=x",
        "/v1/loops/checkpoints?checkpoint_path=bt://loops:x/weights/y",
        "/v1/models/x/deployments/y",
        "/trainers/x/health",
        "/trainers/x/operations/y",
        "/samplers/x/sync/v1/models",
        "/nothing/here",
    ],
)
async def test_unknown_id_is_404(api: Api, url: str) -> None:
    error = await api.get(url, status=404)
    assert error["message"]
    assert error["code"]


async def test_a_method_that_there_is_not_is_told_with_those_that_there_are(api: Api) -> None:
    error = await api.ask("DELETE", "/v1/loops/runs", status=405)
    assert error.json()["code"] == "METHOD_NOT_ALLOWED"
    assert {"GET", "POST"} <= set(error.headers["Allow"].split(","))


async def test_run_of_an_unknown_session_is_404(api: Api) -> None:
    await api.post("/v1/loops/runs", {"session_id": "x", "base_model": MODEL}, status=404)


async def test_capabilities_tell_the_models_and_their_length(serve: Any) -> None:
    api = await serve(models=["a", "b"])
    await api.local.load()

    async def told(**query: Any) -> list[tuple[str, int | None, bool]]:
        models = (await api.get("/v1/loops/capabilities", params=query))["supported_models"]
        return [(model["model_name"], model["max_context_length"], model["enabled"]) for model in models]

    assert await told() == [("a", 32768, True), ("b", 32768, True)]
    assert await told(model="b") == [("b", 32768, True)]
    assert await told(model="c") == []
    assert await told(model="a", max_seq_len=40000) == [("a", 32768, False)]
    for query in ({"use_case": "fun"}, {"max_seq_len": "0"}):
        error = await api.get("/v1/loops/capabilities", params=query, status=400)
        assert error["details"] == {"field": next(iter(query))}


async def test_the_length_of_a_model_is_a_number_before_it_is_loaded(serve: Any) -> None:
    api = await serve(engine=EchoEngine, models=["a"])
    [model] = (await api.get("/v1/loops/capabilities"))["supported_models"]
    assert (model["max_context_length"], model["max_seq_len"]) == (0, None)


async def test_checkpoint_list_wants_exactly_one_filter(api: Api) -> None:
    for query in ({}, {"run_id": "a", "base_model": "b"}):
        error = await api.get("/v1/loops/checkpoints", params=query, status=400)
        assert "exactly one of run_id, base_model, checkpoint_path" in error["message"]
    await api.get("/v1/loops/checkpoints", params={"checkpoint_path": "s3://x"}, status=400)


async def test_checkpoints_are_found_by_run_model_and_path(api: Api) -> None:
    run = await api.run(lora_rank=8)
    path = (await api.publish(run, "first"))["path"]
    await api.operate(run, "save_state", {"name": "first"})
    by_run = await api.checkpoints(run["id"])
    assert [(c["checkpoint_id"], c["target"]) for c in by_run] == [("first", "sampler"), ("first", "trainer")]
    assert by_run[0]["lora_adapter_config"] == {"r": 8}
    assert by_run[0]["size_bytes"] > 0
    assert by_run[0]["base_model"] == MODEL
    by_model = (await api.get("/v1/loops/checkpoints", params={"base_model": MODEL}))["checkpoints"]
    assert by_model == by_run
    by_path = (await api.get("/v1/loops/checkpoints", params={"checkpoint_path": path}))["checkpoints"]
    assert by_path == by_run[:1]
    assert (await api.get("/v1/loops/checkpoints", params={"base_model": "none"}))["checkpoints"] == []


async def test_validate_accepts_a_sampler_checkpoint_only(api: Api) -> None:
    run = await api.run()
    path = (await api.publish(run))["path"]
    [checkpoint] = (await api.get(f"/v1/loops/checkpoints?checkpoint_path={path}"))["checkpoints"]
    assert await api.post("/v1/loops/checkpoints/validate", {"checkpoint_path": path}) == {"id": checkpoint["id"]}
    for bad in (path + "x", "nonsense", path.replace("sampler_weights", "weights")):
        error = await api.post("/v1/loops/checkpoints/validate", {"checkpoint_path": bad}, status=400)
        assert error["details"] == {"field": "checkpoint_path"}


async def test_standalone_sampler_of_a_model_and_of_a_checkpoint(api: Api) -> None:
    run = await api.run()
    await api.train(run, 3)
    path = (await api.publish(run))["path"]
    base = {"session_id": run["session_id"]}
    plain = (await api.post("/v1/loops/samplers", base | {"base_model": MODEL}))["sampler"]
    pinned = (await api.post("/v1/loops/samplers", base | {"model_path": path}))["sampler"]
    assert pinned["base_model"] == MODEL
    await api.sampler_ready(plain)
    await api.sampler_ready(pinned)
    of_plain, version = await api.sample(plain["base_url"])
    of_pinned, no_version = await api.sample(pinned["base_url"])
    assert (version, no_version) == ("0", None)
    assert of_plain["logprobs"] != of_pinned["logprobs"]
    assert (await api.sample(run["sampler"]["base_url"]))[0]["logprobs"] == of_pinned["logprobs"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "base_model"),
        ({"model_path": "bt://loops:x/weights/y"}, "model_path"),
        ({"model_path": "bt://loops:x/sampler_weights/y"}, "model_path"),
        ({"base_model": MODEL, "max_seq_length": 0}, "max_seq_length"),
    ],
)
async def test_bad_sampler_field_is_named(api: Api, fields: dict[str, Any], field: str) -> None:
    body = {"session_id": await api.session(), **fields}
    assert (await api.post("/v1/loops/samplers", body, status=400))["details"] == {"field": field}


async def test_sampler_of_a_checkpoint_of_another_model_is_refused(api: Api) -> None:
    run = await api.run()
    path = (await api.publish(run))["path"]
    body = {"session_id": run["session_id"], "base_model": "other", "model_path": path}
    assert MODEL in (await api.post("/v1/loops/samplers", body, status=400))["message"]


async def test_both_schemes_authorize_and_nothing_else_does(api: Api) -> None:
    run = await api.run()
    key = api.local.api_key
    for scheme in ("Bearer", "Api-Key", "bearer"):
        await api.ask("GET", "/v1/loops/runs", key=None, headers={"Authorization": f"{scheme} {key}"})
    for header in (f"Basic {key}", key, "Bearer", f"Bearer {key}x", "Bearer \u00e9", ""):
        error = await api.ask("GET", "/v1/loops/runs", key=None, headers={"Authorization": header}, status=401)
        assert error.json()["code"] == "UNAUTHORIZED"
        assert error.headers["WWW-Authenticate"] == "Bearer"
    for url in (run["base_url"] + "/health", run["sampler"]["base_url"] + "/v1/models", "/v1/loops/capabilities"):
        await api.ask("GET", url, key=None, status=401)


async def test_deactivated_deployment_stops_for_good(api: Api) -> None:
    run = await api.run()
    url = f"/v1/loops/deployments/{run['deployment_id']}"
    answer = await api.post(f"{url}/deactivate")
    assert answer == {"id": run["deployment_id"], "base_model": MODEL, "user": {"email": None}}
    shown = (await api.get(url))["deployment"]
    assert shown["status"] == {"name": "STOPPED"}
    assert shown["active_run_id"] is None
    assert (await api.get(f"/v1/loops/runs/{run['id']}"))["run"]["status"] == {"name": "INACTIVE"}
    assert await api.sampler_status(run["sampler"]) == "INACTIVE"
    response = await api.ask("POST", f"{run['base_url']}/optim_step", json={"adam_params": {}}, status=400)
    assert response.headers["X-Baseten-Error-Source"] == "01"
    assert response.headers["X-Baseten-Error-Code"] == "631"
    await api.ask("POST", f"{run['sampler']['base_url']}/sample", json={"prompt": [1]}, status=400)


async def test_hundreds_of_runs_come_up_together(serve: Any, time_passes: TimePasses) -> None:
    api = await serve(provisioning_seconds=600.0)
    session = await api.session()
    body = {"session_id": session, "base_model": MODEL}
    runs = [answer["run"] for answer in await asyncio.gather(*(api.post("/v1/loops/runs", body) for _ in range(256)))]
    assert len({run["id"] for run in runs}) == 256
    assert await api.trainer_status(runs[-1]) in ("CREATED", "DEPLOYING")
    time_passes(600.0)
    await asyncio.gather(*(api.until(lambda run=run: api.is_healthy(run["base_url"])) for run in runs[::16]))

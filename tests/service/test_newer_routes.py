"""Routes, fields and rules that came after the seed."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.service.api import MODEL, Api


async def create(api: Api, what: str, **fields: Any) -> dict[str, Any]:
    """Make a run, trainer or sampler, ready to use."""
    body = {"session_id": fields.pop("session_id", None) or await api.session()} | fields
    (made,) = (await api.post(f"/v1/loops/{what}", body)).values()
    return made


# Trainers without samplers, and pairing.


async def test_a_trainer_has_no_sampler_until_one_is_paired(api: Api) -> None:
    run = await create(api, "trainers", base_model=MODEL, lora_rank=8, name="mine")
    assert run["sampler"] is None
    assert run["name"] == "mine"
    assert run["deployment_id"]
    await api.train(run, 2)
    await api.publish(run)
    sampler = await create(api, "samplers", session_id=run["session_id"], run_id=run["id"])
    assert sampler["base_model"] == MODEL
    assert (await api.get(f"/v1/loops/runs/{run['id']}"))["run"]["sampler"]["id"] == sampler["id"]
    assert (await api.sample(sampler["base_url"]))[1] == "2"
    again = await create(api, "samplers", session_id=run["session_id"], run_id=run["id"], base_model=MODEL)
    assert again["id"] == sampler["id"], "a run has one sampler, however often it is asked for"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"base_model": "other"}, "base_model"),
        ({"model_path": "bt://loops:x/sampler_weights/y"}, "model_path"),
        ({"availability_model": "spot"}, "availability_model"),
        ({"availability_model": "owned"}, "availability_model"),
    ],
)
async def test_a_paired_sampler_is_as_its_run(api: Api, fields: dict[str, str], field: str) -> None:
    run = await create(api, "trainers", base_model=MODEL)
    body = {"session_id": run["session_id"], "run_id": run["id"], **fields}
    assert (await api.post("/v1/loops/samplers", body, status=400))["details"] == {"field": field}


async def test_a_sampler_of_an_unknown_or_ended_run_is_refused(api: Api) -> None:
    run = await create(api, "trainers", base_model=MODEL)
    body = {"session_id": run["session_id"], "run_id": "nobody"}
    await api.post("/v1/loops/samplers", body, status=404)
    await api.post(f"/v1/loops/runs/{run['id']}/deactivate", {})
    await api.post("/v1/loops/samplers", body | {"run_id": run["id"]}, status=400)


async def test_a_base_checkpoint_is_refused(api: Api) -> None:
    body = {"session_id": await api.session(), "base_model": MODEL, "base_checkpoint": "hf://org/repo"}
    assert (await api.post("/v1/loops/trainers", body, status=400))["details"] == {"field": "base_checkpoint"}


# Switching off.


async def test_a_run_is_deactivated_with_its_deployments(api: Api) -> None:
    run = await api.run()
    answer = await api.post(f"/v1/loops/runs/{run['id']}/deactivate", {})
    assert answer == {"id": run["id"], "base_model": MODEL, "user": {"email": None}}
    assert await api.post(f"/v1/loops/runs/{run['id']}/deactivate", {}) == answer, "twice is the same as once"
    assert await api.trainer_status(run) == "STOPPED"
    assert await api.sampler_status(run["sampler"]) == "INACTIVE"
    await api.ask("GET", f"{run['base_url']}/health", status=400)


async def test_only_a_sampler_of_its_own_is_deactivated(api: Api) -> None:
    run = await api.run()
    sampler = await create(api, "samplers", base_model=MODEL)
    url = "/v1/loops/samplers/{}/deactivate"
    assert (await api.post(url.format(sampler["id"])))["id"] == sampler["id"]
    assert await api.sampler_status(sampler) == "INACTIVE"
    assert run["id"] in (await api.post(url.format(run["sampler"]["id"]), status=400))["message"]
    assert await api.sampler_status(run["sampler"]) == "ACTIVE"


# Reuse.


@pytest.mark.parametrize("what", ["runs", "trainers"])
@pytest.mark.parametrize("by", ["reuse_from_run_id", "reuse_from_session_id"])
async def test_a_new_run_takes_over_what_an_older_one_ran_on(serve: Any, what: str, by: str) -> None:
    api = await serve(provisioning_seconds=0.05)
    first = await api.run()
    await api.train(first, 2)
    again = {by: first["id"] if by == "reuse_from_run_id" else first["session_id"]}
    second = await create(api, what, base_model=MODEL, lora_rank=4, **again)
    assert second["deployment_id"] == first["deployment_id"]
    assert second["id"] != first["id"]
    if what == "runs":
        assert second["sampler"]["deployment_id"] == first["sampler"]["deployment_id"]
    assert await api.is_healthy(second["base_url"]), "it is up already"
    await api.train(second)
    assert await api.get(f"{second['base_url']}/policy_version") == {"policy_version": 1}
    assert (await api.get(f"/v1/loops/runs/{first['id']}"))["run"]["status"] == {"name": "INACTIVE"}
    deployment = (await api.get(f"/v1/loops/deployments/{first['deployment_id']}"))["deployment"]
    assert (deployment["active_run_id"], deployment["latest_run_id"]) == (second["id"], second["id"])
    assert len((await api.get("/v1/loops/deployments"))["deployments"]) == 1
    await api.ask("POST", f"{first['base_url']}/optim_step", json={"adam_params": {}}, status=400)


@pytest.mark.parametrize("why_not", ["stopped", "replicas", "model", "unknown"])
async def test_what_cannot_be_reused_is_made_afresh(api: Api, why_not: str) -> None:
    first = await api.run()
    fields: dict[str, Any] = {"base_model": MODEL, "reuse_from_run_id": first["id"]}
    if why_not == "stopped":
        await api.post(f"/v1/loops/deployments/{first['deployment_id']}/deactivate")
    fields |= {
        "replicas": {"replicas": 2},
        "model": {"base_model": "other"},
        "unknown": {"reuse_from_run_id": "nobody"},
    }.get(why_not, {})
    second = await create(api, "runs", **fields)
    assert second["deployment_id"] != first["deployment_id"]
    assert (await api.get(f"/v1/loops/runs/{second['id']}"))["run"]["status"] == {"name": "ACTIVE"}


# Checkpoints.


async def test_source_and_lora_config_of_a_checkpoint(api: Api) -> None:
    run = await api.run()
    await api.publish(run)
    (checkpoint,) = await api.checkpoints(run["id"])
    assert checkpoint["lora_config"] == {"config_version": "v1", "targets": ["echo"], "expert_layout": None}
    source = (await api.get(f"/v1/loops/checkpoints/{checkpoint['id']}/source"))["source"]
    assert source["kind"] == "s3"
    await api.get("/v1/loops/checkpoints/nobody/source", status=404)


async def test_validation_for_a_run_wants_the_run_s_model(api: Api) -> None:
    run, other = await api.run(), await api.run(base_model="other")
    body = {"checkpoint_path": (await api.publish(run))["path"]}
    (checkpoint,) = await api.checkpoints(run["id"])
    validated = await api.post("/v1/loops/checkpoints/validate", body | {"run_id": run["id"]})
    assert validated == {"id": checkpoint["id"]}
    await api.post("/v1/loops/checkpoints/validate", body | {"run_id": other["id"]}, status=400)
    await api.post("/v1/loops/checkpoints/validate", body | {"run_id": "nobody"}, status=404)


async def test_checkpoints_are_deployed_and_serve(api: Api) -> None:
    run = await api.run()
    await api.train(run, 3)
    await api.publish(run)
    await api.operate(run, "save_state", {"name": "s"})
    served, resumed = await api.checkpoints(run["id"])
    body = {"checkpoint_ids": [served["id"]], "model_name": "m", "instance_type_id": "i", "hf_secret_name": "h"}
    made = await api.post("/v1/loops/checkpoints/deploy", body)
    await api.until(lambda: is_active(api, made))
    (sampler,) = [
        s for s in (await api.get("/v1/loops/samplers"))["samplers"] if s["deployment_id"] == made["deployment_id"]
    ]
    choice, _ = await api.sample(sampler["base_url"])
    assert choice["logprobs"] == (await api.sample(run["sampler"]["base_url"]))[0]["logprobs"]
    for wrong in ([], [resumed["id"]]):
        error = await api.post("/v1/loops/checkpoints/deploy", body | {"checkpoint_ids": wrong}, status=400)
        assert error["details"] == {"field": "checkpoint_ids"}
    await api.post("/v1/loops/checkpoints/deploy", body | {"checkpoint_ids": ["nobody"]}, status=404)


async def is_active(api: Api, deployed: dict[str, Any]) -> bool:
    return await api.sampler_status(deployed) == "ACTIVE"


# Logs, measurements, archive.


async def test_logs_tell_what_happened(api: Api) -> None:
    run = await api.run()
    url = f"/v1/loops/deployments/{run['deployment_id']}/logs"
    await api.train(run)
    await api.refused(run, "load_state", {"path": "/etc"})

    async def lines(**query: Any) -> list[dict[str, Any]]:
        return (await api.get(url, params=query))["logs"]

    told = await lines(direction="asc")
    messages = [line["message"] for line in told]
    assert messages[0] == f"deploying a trainer of {MODEL}"
    assert messages[1] == f"loaded {MODEL} (echo, 32768 tokens at most)"
    assert messages[2].startswith("forward_backward done in ")
    assert messages[3].startswith("optim_step done in ")
    assert messages[4].startswith("load_state refused: path: files can only be read")
    assert [line["level"] for line in told] == ["INFO"] * 4 + ["WARNING"]
    assert told[2]["request_id"]
    assert abs(int(told[0]["timestamp"]) / 1e9 - time.time()) < 60
    assert await lines() == told[::-1]
    assert await lines(min_level="WARNING") == told[4:]
    assert await lines(direction="asc", limit=2) == told[:2]
    middle = int(told[0]["timestamp"]) // 10**6
    assert await lines(end_epoch_millis=middle) == []
    assert len(await lines(start_epoch_millis=middle)) == 5
    sampler = f"/v1/loops/deployments/{run['sampler']['deployment_id']}/logs"
    assert (await api.get(sampler))["logs"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"min_level": "LOUD"}, "min_level"),
        ({"direction": "up"}, "direction"),
        ({"start_epoch_millis": 5, "end_epoch_millis": 4}, "start_epoch_millis"),
        ({"start_epoch_millis": 0}, "start_epoch_millis"),
    ],
)
async def test_bad_log_query_is_named(api: Api, query: dict[str, Any], field: str) -> None:
    run = await api.run()
    url = f"/v1/loops/deployments/{run['deployment_id']}/logs"
    assert (await api.get(url, params=query, status=400))["details"] == {"field": field}


async def test_a_failed_load_is_in_the_log(serve: Any) -> None:
    def failing(_name: str) -> Any:
        raise RuntimeError("no memory")

    api = await serve(engine=failing)
    run = await create(api, "runs", base_model=MODEL)

    async def is_told() -> bool:
        logs = await api.get(f"/v1/loops/deployments/{run['deployment_id']}/logs", params={"min_level": "ERROR"})
        return [line["message"] for line in logs["logs"]] == [f"cannot load {MODEL}: no memory"]

    await api.until(is_told)


async def test_measurements_count_requests_and_their_answers(api: Api) -> None:
    run = await api.run()
    root = run["sampler"]["base_url"]
    for _ in range(3):
        await api.sample(root)
    await api.post(f"{root}/sample", {"prompt": []}, status=400)
    now = time.time_ns() // 10**6
    body = {"start_epoch_millis": now - 60_000, "end_epoch_millis": now + 60_000, "step_seconds": 120}
    url = f"/v1/loops/deployments/{run['sampler']['deployment_id']}/metrics"
    answer = await api.post(url, body)
    assert answer["deployment_id"] == run["sampler"]["deployment_id"]
    metrics = answer["metrics"]
    assert [point["value"] for point in metrics["inference_volume"]] == [4]
    (statuses,) = metrics["inference_volume_by_status"]
    assert (statuses["status_2xx"], statuses["status_4xx"], statuses["status_5xx"]) == (3, 1, 0)
    (latency,) = metrics["response_time_stats"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] < 5000
    assert metrics["concurrent_requests"][0]["value"] >= 1
    assert metrics["gpu_utilization"] == {}
    per_second = (await api.post(url, body | {"time_divisor_seconds": 60}))["metrics"]
    assert per_second["inference_volume"][0]["value"] == 2
    assert len((await api.post(url))["metrics"]["inference_volume"]) == 30, "half an hour in minutes"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"step_seconds": 0}, "step_seconds"),
        ({"start_epoch_millis": 5, "end_epoch_millis": 5}, "start_epoch_millis"),
        ({"start_epoch_millis": 0, "step_seconds": 1}, "step_seconds"),
    ],
)
async def test_bad_measurement_window_is_named(api: Api, body: dict[str, Any], field: str) -> None:
    run = await api.run()
    url = f"/v1/loops/deployments/{run['deployment_id']}/metrics"
    assert (await api.post(url, body, status=400))["details"] == {"field": field}


async def test_the_debug_archive_is_the_whole_log(api: Api) -> None:
    run = await api.run()
    await api.train(run)
    url = f"/v1/loops/deployments/{run['deployment_id']}/debug_archive/files"
    page = await api.get(url, params={"page_size": 1})
    assert page["next_page_token"] is None
    (file,) = page["presigned_urls"]
    reply = await api.ask("GET", file["url"], key=None)
    lines = [json.loads(line) for line in reply.body.splitlines()]
    assert lines[0]["message"] == f"deploying a trainer of {MODEL}"
    assert len(lines) == 4
    await api.ask("GET", file["url"].replace("log.jsonl", "log2.jsonl"), key=None, status=403)
    await api.get(url, params={"page_token": "zzz"}, status=400)
    await api.get(url, params={"page_size": 1001}, status=400)


# The account.


async def test_user_config_is_patched_field_by_field(api: Api) -> None:
    url = "/v1/loops/user_config"
    empty = {"trainer_accelerator_priority": None, "sampler_accelerator_priority": None}
    assert await api.get(url) == {"user_config": empty}

    async def patch(body: Any, status: int = 200) -> Any:
        return (await api.ask("PATCH", url, json=body, status=status)).json()

    both = {"trainer_accelerator_priority": ["H100"], "sampler_accelerator_priority": ["L4"]}
    assert await patch(both) == {"user_config": both}
    assert await patch({"trainer_accelerator_priority": None}) == {
        "user_config": both | {"trainer_accelerator_priority": None}
    }
    assert await patch({}) == await api.get(url)
    error = await patch({"sampler_accelerator_priority": []}, status=400)
    assert error["details"] == {"field": "sampler_accelerator_priority"}
    await patch({"colour": "red"}, status=400)


async def test_team_forms_do_the_same_for_the_team_that_there_is(api: Api) -> None:
    (team,) = (await api.get("/v1/teams"))["teams"]
    assert team["default"] is True
    root = f"/v1/teams/{team['id']}/loops"
    session = (await api.post(f"{root}/sessions"))["session"]["id"]
    body = {"session_id": session, "base_model": MODEL}
    run = (await api.post(f"{root}/runs", body))["run"]
    trainer = (await api.post(f"{root}/trainers", body))["run"]
    await api.post(f"{root}/samplers", body)
    assert [run["id"] for run in (await api.get(f"{root}/runs"))["runs"]] == [trainer["id"], run["id"]]
    assert len((await api.get(f"{root}/samplers"))["samplers"]) == 2
    assert (await api.post("/v1/teams/nobody/loops/sessions", status=404))["message"] == "there is no team 'nobody'"


@pytest.mark.parametrize("what", ["runs", "samplers", "deployments"])
async def test_scope_is_own_or_org(api: Api, what: str) -> None:
    await api.run()
    own = await api.get(f"/v1/loops/{what}")
    assert len(own[what]) == 1
    assert await api.get(f"/v1/loops/{what}", params={"scope": "org"}) == own
    error = await api.get(f"/v1/loops/{what}", params={"scope": "world"}, status=400)
    assert error["details"] == {"field": "scope"}


async def test_the_account_survives_a_restart(serve: Any, tmp_path: Any) -> None:
    api = await serve(data_dir=tmp_path)
    teams = await api.get("/v1/teams")
    config = {"trainer_accelerator_priority": ["A"], "sampler_accelerator_priority": None}
    await api.ask("PATCH", "/v1/loops/user_config", json=config)
    run = await api.run()
    await api.local.__aexit__(None, None, None)
    again = await serve(data_dir=tmp_path)
    assert await again.get("/v1/teams") == teams
    assert await again.get("/v1/loops/user_config") == {"user_config": config}
    logs = await again.get(f"/v1/loops/deployments/{run['deployment_id']}/logs")
    assert logs["logs"]

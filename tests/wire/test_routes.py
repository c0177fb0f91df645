"""Every route: what goes out, and what is made of the answers of both generations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import pytest

import loops_async
from loops_async import ServiceClient, types
from tests.support.colours import Colour
from tests.support.scripted import KEY, WHEN, Say, ScriptedService

DEV = {"email": "dev@example.com"}

SEED_SAMPLER = {
    "id": "q9",
    "base_url": "https://model-w.example.com/deployment/qr/sync",
    "base_model": "Qwen/Q",
    "created_at": WHEN,
    "model_id": "w",
    "deployment_id": "qr",
    "status": {"name": "DEPLOYING"},
}
NEWER_SAMPLER = SEED_SAMPLER | {
    "model_id": None,
    "deployment_id": None,
    "status": {"name": "A_WORD_OF_TOMORROW"},
    "user": {"email": None},
    "instance_type": {"id": "i", "name": "H100", "gpu_count": 1, "gpu_type": None, "watts": 700},
    "node_count": 1,
}
SEED_RUN = {
    "id": "e3",
    "session_id": "s1",
    "base_model": "Qwen/Q",
    "base_url": "https://trainer-e3.example.com/trainer",
    "created_at": WHEN,
    "sampler": SEED_SAMPLER,
}
NEWER_RUN = SEED_RUN | {
    "sampler": None,
    "name": "sft",
    "deployment_id": "7w",
    "lora_config_version": "v1",
    "status": {"name": "ACTIVE"},
    "user": DEV,
    "of_tomorrow": [1],
}
OFF = {"id": "x", "base_model": "Qwen/Q", "user": DEV}
SEED_DEPLOYMENT = {
    "id": "7w",
    "base_model": "Qwen/Q",
    "base_url": "https://trainer-e3.example.com/trainer",
    "status": {"name": "RUNNING"},
    "sampler": None,
}
NEWER_DEPLOYMENT = SEED_DEPLOYMENT | {
    "user": DEV,
    "active_run_id": None,
    "latest_run_id": "e3",
    "created_at": WHEN,
    "availability_model": "spot",
    "instance_type": None,
    "node_count": 2,
}
CHECKPOINT = {
    "checkpoint_id": "step-1",
    "created_at": "2026-06-24T18:20:39.854Z",
    "checkpoint_type": "lora",
    "base_model": None,
    "lora_adapter_config": None,
    "size_bytes": 33638400,
    "sync_status": None,
    "id": "Vq",
    "run_id": "e3",
    "target": "sampler",
    "lora_config": {"config_version": "v1", "targets": ["q_proj"], "expert_layout": "of_tomorrow"},
}
FILE = {
    "url": "https://storage.example.com/o/a?sig=secret",
    "relative_file_name": "a",
    "node_rank": 0,
    "size_bytes": 812,
    "last_modified": WHEN,
}
POINT = {"value": 1.5, "timestamp": WHEN}
STORAGE = {"usage_bytes": [POINT], "utilization": []}
METRICS = {
    "inference_volume": [POINT],
    "concurrent_requests": [],
    "response_time_stats": [{"timestamp": WHEN, "p50": 12.0, "p95": None, "p99": None}],
    "inference_volume_by_status": [{"timestamp": WHEN, "status_2xx": 3, "status_4xx": 0, "status_5xx": 1}],
    "gpu_memory_usage_bytes": {"0": [POINT]},
    "gpu_utilization": {},
    "cpu_usage": [],
    "cpu_memory_usage_bytes": [],
    "ephemeral_storage": STORAGE,
    "per_node_metrics": [
        {
            "node_id": "n",
            "gpu_memory_usage_bytes": {},
            "gpu_utilization": {},
            "cpu_usage": [POINT],
            "cpu_memory_usage_bytes": [],
            "ephemeral_storage": STORAGE,
        }
    ],
}
RUN_BODY = {
    "session_id": "s1",
    "base_model": "Qwen/Q",
    "max_seq_len": None,
    "lora_rank": 64,
    "seed": None,
    "scale_down_delay_seconds": 3600,
    "replicas": 1,
    "path": None,
    "reuse_from_session_id": None,
}
URI = "bt://loops:e3/sampler_weights/step-1"


class Case(NamedTuple):
    """A call, the request that it makes, an answer to it, and where in the result something of it is to be seen."""

    route: str
    call: Callable[[Any], Any]
    answer: Any
    seen: Callable[[Any], Any]
    is_: Any
    body: Any = None
    query: Mapping[str, str] = {}


def run_request(**fields: Any) -> types.CreateRunRequest:
    return types.CreateRunRequest(session_id="s1", base_model="Qwen/Q", **fields)


def sampler_request(**fields: Any) -> types.CreateSamplerRequest:
    return types.CreateSamplerRequest(session_id="s1", **fields)


CASES = [
    Case(
        "POST /v1/loops/sessions",
        lambda plane: plane.create_session(training_project_id="p"),
        {"session": {"id": "s2"}},
        lambda session: session.id,
        "s2",
        {"training_project_id": "p"},
    ),
    Case(
        "POST /v1/teams/t%2F1/loops/sessions",
        lambda plane: plane.create_session(team_id="t/1"),
        {"session": {"id": "s2"}},
        lambda session: session.id,
        "s2",
        {},
    ),
    Case(
        "GET /v1/loops/sessions/s%2F1",
        lambda plane: plane.get_session("s/1"),
        {"session": {"id": "s/1"}},
        lambda session: session.id,
        "s/1",
    ),
    Case(
        "POST /v1/loops/runs",
        lambda plane: plane.create_run(run_request()),
        {"run": SEED_RUN},
        lambda run: (run.id, run.sampler.model_id, run.deployment_id),
        ("e3", "w", None),
        RUN_BODY,
    ),
    Case(
        "POST /v1/teams/t1/loops/runs",
        lambda plane: plane.create_run(
            run_request(
                name="sft",
                availability_model="spot",
                reuse_from_run_id="e2",
                sampler_num_replicas=2,
                path="bt://loops:e2/weights/end",
            ),
            team_id="t1",
        ),
        {"run": NEWER_RUN},
        lambda run: (run.sampler, run.deployment_id, run.status.name, run.user.email),
        (None, "7w", "ACTIVE", "dev@example.com"),
        RUN_BODY
        | {
            "name": "sft",
            "availability_model": "spot",
            "reuse_from_run_id": "e2",
            "sampler_num_replicas": 2,
            "path": "bt://loops:e2/weights/end",
        },
    ),
    Case(
        "GET /v1/loops/runs",
        lambda plane: plane.list_runs(base_model="Qwen/Q"),
        {"runs": [SEED_RUN, NEWER_RUN]},
        lambda runs: [run.name for run in runs],
        [None, "sft"],
        query={"base_model": "Qwen/Q"},
    ),
    Case(
        "GET /v1/teams/t1/loops/runs",
        lambda plane: plane.list_runs(run_id="e3", scope="org", team_id="t1"),
        {"runs": []},
        lambda runs: runs,
        [],
        query={"run_id": "e3", "scope": "org"},
    ),
    Case(
        "GET /v1/loops/runs/..%2Fe3",
        lambda plane: plane.get_run("../e3"),
        {"run": NEWER_RUN},
        lambda run: run.created_at,
        datetime(2026, 6, 24, 18, 2, 11, tzinfo=UTC),
    ),
    Case(
        "POST /v1/loops/runs/e3/deactivate",
        lambda plane: plane.deactivate_run("e3"),
        OFF,
        lambda off: off.user.email,
        "dev@example.com",
        {},
    ),
    Case(
        "POST /v1/loops/trainers",
        lambda plane: plane.create_trainer(
            types.CreateTrainerRequest(session_id="s1", base_model="Qwen/Q", base_checkpoint="hf://o/r")
        ),
        {"run": NEWER_RUN},
        lambda run: run.sampler,
        None,
        RUN_BODY | {"base_checkpoint": "hf://o/r"},
    ),
    Case(
        "POST /v1/teams/t1/loops/trainers",
        lambda plane: plane.create_trainer(
            types.CreateTrainerRequest(session_id="s1", base_model="Qwen/Q"), team_id="t1"
        ),
        {"run": NEWER_RUN},
        lambda run: run.id,
        "e3",
        RUN_BODY,
    ),
    Case(
        "POST /v1/loops/samplers",
        lambda plane: plane.create_sampler(sampler_request(base_model="Qwen/Q", max_seq_length=8192)),
        {"sampler": SEED_SAMPLER},
        lambda sampler: (sampler.status.name, sampler.instance_type),
        ("DEPLOYING", None),
        {"session_id": "s1", "base_model": "Qwen/Q", "max_seq_length": 8192, "model_path": None},
    ),
    Case(
        "POST /v1/teams/t1/loops/samplers",
        lambda plane: plane.create_sampler(sampler_request(run_id="e3", num_replicas=2, model_path=URI), team_id="t1"),
        {"sampler": NEWER_SAMPLER},
        lambda sampler: (sampler.status.name, sampler.model_id, sampler.instance_type.name),
        ("A_WORD_OF_TOMORROW", None, "H100"),
        {"session_id": "s1", "max_seq_length": None, "model_path": URI, "run_id": "e3", "num_replicas": 2},
    ),
    Case(
        "GET /v1/loops/samplers",
        lambda plane: plane.list_samplers(),
        {"samplers": [SEED_SAMPLER, NEWER_SAMPLER]},
        lambda samplers: [sampler.user and sampler.user.email for sampler in samplers],
        [None, None],
    ),
    Case(
        "GET /v1/teams/t1/loops/samplers",
        lambda plane: plane.list_samplers(scope="org", team_id="t1"),
        {"samplers": []},
        lambda samplers: samplers,
        [],
        query={"scope": "org"},
    ),
    Case(
        "GET /v1/loops/samplers/q9",
        lambda plane: plane.get_sampler("q9"),
        {"sampler": SEED_SAMPLER | {"status": {}}},
        lambda sampler: sampler.status.name,
        None,
    ),
    Case(
        "POST /v1/loops/samplers/q9/deactivate",
        lambda plane: plane.deactivate_sampler("q9"),
        OFF,
        lambda off: off.id,
        "x",
        {},
    ),
    Case(
        "GET /v1/loops/checkpoints",
        lambda plane: plane.list_checkpoints(run_id="e3"),
        {"checkpoints": [CHECKPOINT]},
        lambda found: (found[0].base_model, found[0].lora_adapter_config, found[0].lora_config.targets),
        (None, None, ["q_proj"]),
        query={"run_id": "e3"},
    ),
    Case(
        "GET /v1/loops/checkpoints",
        lambda plane: plane.list_checkpoints(checkpoint_path=URI),
        {"checkpoints": [CHECKPOINT | {"lora_adapter_config": {"r": 16}}]},
        lambda found: found[0].lora_adapter_config.rank,
        16,
        query={"checkpoint_path": "bt://loops:e3/sampler_weights/step-1"},
    ),
    Case(
        "POST /v1/loops/checkpoints/validate",
        lambda plane: plane.validate_checkpoint(URI),
        {},
        lambda nothing: nothing,
        None,
        {"checkpoint_path": URI},
    ),
    Case(
        "POST /v1/loops/checkpoints/validate",
        lambda plane: plane.validate_checkpoint(URI, run_id="e4"),
        {"id": "Vq"},
        lambda found: found,
        "Vq",
        {"checkpoint_path": URI, "run_id": "e4"},
    ),
    Case(
        "GET /v1/loops/checkpoints/Vq/files",
        lambda plane: plane.get_checkpoint_files("Vq", page_size=2, page_token=4),
        {"presigned_urls": [FILE], "next_page_token": None, "total_count": 5},
        lambda page: (page.presigned_urls[0].size_bytes, page.next_page_token),
        (812, None),
        query={"page_size": "2", "page_token": "4"},
    ),
    Case(
        "GET /v1/loops/checkpoints/Vq/source",
        lambda plane: plane.get_checkpoint_source("Vq"),
        {"source": {"kind": "of_tomorrow"}},
        lambda source: source.kind,
        "of_tomorrow",
    ),
    Case(
        "POST /v1/loops/checkpoints/deploy",
        lambda plane: plane.deploy_checkpoints(
            types.DeployCheckpointsRequest(
                checkpoint_ids=["Vq"], model_name="m", instance_type_id="i", hf_secret_name="h"
            )
        ),
        {"model_id": "m1", "deployment_id": "d1"},
        lambda model: (model.model_id, model.deployment_id),
        ("m1", "d1"),
        {"checkpoint_ids": ["Vq"], "model_name": "m", "instance_type_id": "i", "hf_secret_name": "h"},
    ),
    Case(
        "GET /v1/loops/capabilities",
        lambda plane: plane.get_capabilities(),
        {"supported_models": [{"model_name": "Qwen/Q", "max_context_length": 8192}]},
        lambda found: (found.supported_models[0].max_context_length, found.supported_models[0].enabled),
        (8192, True),
    ),
    Case(
        "GET /v1/loops/capabilities",
        lambda plane: plane.get_capabilities(model="Qwen/Q", use_case="sft", max_seq_len=4096),
        {
            "supported_models": [
                {
                    "model_name": "Qwen/Q",
                    "max_seq_len": 8192,
                    "max_enabled_seq_len": 0,
                    "enabled": False,
                    "serverless": None,
                    "enablement_details": {"reason": "of_tomorrow", "remediation": None},
                }
            ]
        },
        lambda found: found.supported_models[0].enablement_details.reason,
        "of_tomorrow",
        query={"model": "Qwen/Q", "use_case": "sft", "max_seq_len": "4096"},
    ),
    Case(
        "GET /v1/loops/deployments",
        lambda plane: plane.list_deployments(scope="org"),
        {"deployments": [SEED_DEPLOYMENT, NEWER_DEPLOYMENT]},
        lambda found: [each.node_count for each in found],
        [None, 2],
        query={"scope": "org"},
    ),
    Case(
        "GET /v1/loops/deployments/7w",
        lambda plane: plane.get_deployment("7w"),
        {"deployment": NEWER_DEPLOYMENT},
        lambda deployment: deployment.latest_run_id,
        "e3",
    ),
    Case(
        "POST /v1/loops/deployments/7w/deactivate",
        lambda plane: plane.deactivate_deployment("7w"),
        OFF,
        lambda off: off.id,
        "x",
        {},
    ),
    Case(
        "POST /v1/loops/deployments/7w/metrics",
        lambda plane: plane.get_deployment_metrics("7w", start_epoch_millis=1, end_epoch_millis=2, step_seconds=60),
        {"deployment_id": "7w", "metrics": METRICS},
        lambda metrics: (
            metrics.inference_volume[0].value,
            metrics.per_node_metrics[0].cpu_usage[0].value,
            metrics.response_time_stats[0].p95,
        ),
        (1.5, 1.5, None),
        {"start_epoch_millis": 1, "end_epoch_millis": 2, "step_seconds": 60},
    ),
    Case(
        "GET /v1/loops/deployments/7w/logs",
        lambda plane: plane.get_deployment_logs(
            "7w", start_epoch_millis=1, end_epoch_millis=2, direction="asc", limit=10, min_level="INFO"
        ),
        {"logs": [{"timestamp": "1782324131000000001", "message": "hello", "replica": None, "level": "OF_TOMORROW"}]},
        lambda lines: (lines[0].time.year, lines[0].level),
        (2026, "OF_TOMORROW"),
        query={
            "start_epoch_millis": "1",
            "end_epoch_millis": "2",
            "direction": "asc",
            "limit": "10",
            "min_level": "INFO",
        },
    ),
    Case(
        "GET /v1/loops/deployments/7w/debug_archive/files",
        lambda plane: plane.get_debug_archive_files("7w", page_size=5, page_token="a b"),
        {"presigned_urls": [FILE], "next_page_token": "c"},
        lambda page: page.next_page_token,
        "c",
        query={"page_size": "5", "page_token": "a b"},
    ),
    Case(
        "GET /v1/loops/user_config",
        lambda plane: plane.get_user_config(),
        {"user_config": {"trainer_accelerator_priority": None, "sampler_accelerator_priority": ["H100"]}},
        lambda config: config.sampler_accelerator_priority,
        ["H100"],
    ),
    Case(
        "PATCH /v1/loops/user_config",
        lambda plane: plane.update_user_config(trainer_accelerator_priority=["H100"]),
        {"user_config": {"trainer_accelerator_priority": ["H100"], "sampler_accelerator_priority": None}},
        lambda config: config.trainer_accelerator_priority,
        ["H100"],
        {"trainer_accelerator_priority": ["H100"]},
    ),
    Case(
        "PATCH /v1/loops/user_config",
        lambda plane: plane.update_user_config(sampler_accelerator_priority=None),
        {"user_config": {}},
        lambda config: config.sampler_accelerator_priority,
        None,
        {"sampler_accelerator_priority": None},
    ),
    Case(
        "GET /v1/teams",
        lambda plane: plane.list_teams(),
        {"teams": [{"id": "t1", "name": "research", "default": True, "created_at": WHEN}]},
        lambda teams: (teams[0].name, teams[0].default),
        ("research", True),
    ),
    Case(
        "GET /v1/models/w/deployments/qr",
        lambda plane: plane.get_model_deployment_status("w", "qr"),
        {"id": "qr", "status": "ACTIVE"},
        lambda status: status,
        "ACTIVE",
    ),
    Case(
        "GET /v1/models/w/deployments/qr",
        lambda plane: plane.get_model_deployment_status("w", "qr"),
        {"status": {"name": "ACTIVE"}},
        lambda status: status,
        "ACTIVE",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.route)
async def test_route(service: ScriptedService, coloured_client: ServiceClient, case: Case) -> None:
    method, path = case.route.split()
    service.always(method, path, Say(body=case.answer))
    result = await case.call(coloured_client.control_plane)
    assert case.seen(result) == case.is_
    asked = service.seen[-1]
    assert (asked.method, asked.path) == (method, path)
    assert dict(parse_qsl(asked.query)) == case.query
    assert (asked.json if asked.body else None) == case.body


def test_every_route_is_here() -> None:
    """Rows 1 to 26 of the reference's table, of which one has two methods and six a team form; 27 is internal."""
    coroutines = {name for name in dir(loops_async.ControlPlane) if not name.startswith("_")}
    assert coroutines == {name for case in CASES for name in case.call.__code__.co_names} & coroutines
    assert len({case.route for case in CASES}) == 26 + 1 + 6


@pytest.mark.parametrize(("scheme", "header"), [("Bearer", f"Bearer {KEY}"), ("Api-Key", f"Api-Key {KEY}")])
async def test_both_schemes_authorize(service: ScriptedService, colour: Colour, scheme: str, header: str) -> None:
    service.always("GET", "/v1/teams", Say(body={"teams": []}))
    async with colour.connected(api_key=KEY, base_url=service.url, auth_scheme=scheme) as client:
        await client.control_plane.list_teams()
    assert [asked.headers["Authorization"] for asked in service.seen] == [header] * 2


async def test_no_checkpoint_at_a_path_is_an_empty_list(
    service: ScriptedService, coloured_client: ServiceClient
) -> None:
    refusal = {"code": "NOT_FOUND", "message": "no such checkpoint"}
    service.always("GET", "/v1/loops/checkpoints", Say(404, refusal))
    assert await coloured_client.control_plane.list_checkpoints(checkpoint_path=URI) == []


@pytest.mark.parametrize("answer", [{}, {"runs": None}, {"runs": [{"id": 3}]}, [], {"run": SEED_RUN}])
async def test_an_answer_of_another_shape_is_named(
    service: ScriptedService, client: ServiceClient, answer: Any
) -> None:
    service.always("GET", "/v1/loops/runs", Say(body=answer))
    with pytest.raises(loops_async.ProtocolError, match=r"list runs \(GET .*/v1/loops/runs\).*Check base_url"):
        await client.control_plane.list_runs()


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("../runs", "..%2Fruns"),
        ("a/b", "a%2Fb"),
        ("a?b=c#d", "a%3Fb=c%23d"),
        ("a b%2Fc", "a%20b%252Fc"),
        ("é", "%C3%A9"),
    ],
)
async def test_ids_are_escaped(
    service: ScriptedService, coloured_client: ServiceClient, name: str, escaped: str
) -> None:
    plane = coloured_client.control_plane
    calls = {
        "/v1/loops/runs/{}": plane.get_run,
        "/v1/loops/samplers/{}": plane.get_sampler,
        "/v1/loops/deployments/{}": plane.get_deployment,
        "/v1/loops/sessions/{}": plane.get_session,
        "/v1/loops/checkpoints/{}/files": coloured_client.get_checkpoint_archive_url,
    }
    for path, call in calls.items():
        with pytest.raises(loops_async.NotFoundError):
            await call(name)
        assert service.seen[-1].path == path.format(escaped)


REFUSED: list[tuple[Callable[[Any], Any], str]] = [
    (lambda plane: plane.create_run(run_request(lora_rank=0)), "lora_rank: expected `int` >= 1; got 0"),
    (lambda plane: plane.create_run(run_request(replicas=0)), "replicas: expected `int` >= 1; got 0"),
    (
        lambda plane: plane.create_run(run_request(scale_down_delay_seconds=0)),
        "scale_down_delay_seconds: expected `int` >= 1; got 0",
    ),
    (lambda plane: plane.create_run(run_request(max_seq_len=0)), "max_seq_len: expected `int` >= 1; got 0"),
    (lambda plane: plane.create_run(run_request(seed=1.5)), "seed: expected `int | null`, got `float`; got 1.5"),
    (lambda plane: plane.create_run(run_request(name="")), "name: expected `str` of length >= 1; got ''"),
    (lambda plane: plane.create_run(run_request(name="x" * 256)), "name: expected `str` of length <= 255; got 'xxx"),
    (
        lambda plane: plane.create_run(run_request(availability_model="cheap")),
        "availability_model: must be one of dedicated, spot; got 'cheap'",
    ),
    (
        lambda plane: plane.create_run(run_request(path="bt://loops:e3/sampler_weights/a")),
        "path: must be a 'weights' checkpoint; got 'bt://loops:e3/sampler_weights/a'",
    ),
    (lambda plane: plane.create_run(run_request(path="s3://x")), "path: must be bt://loops:<run_id>/weights/<name>"),
    (
        lambda plane: plane.create_trainer(run_request(sampler_num_replicas=2)),
        "expected CreateTrainerRequest, got CreateRunRequest",
    ),
    (lambda plane: plane.create_sampler(sampler_request(num_replicas=0)), "num_replicas: expected `int` >= 1; got 0"),
    (
        lambda plane: plane.create_sampler(sampler_request(model_path="bt://loops:e3/weights/a")),
        "model_path: must be a 'sampler_weights' checkpoint; got 'bt://loops:e3/weights/a'",
    ),
    (lambda plane: plane.list_checkpoints(), "give exactly one of run_id, base_model, checkpoint_path; got none"),
    (
        lambda plane: plane.list_checkpoints(run_id="e3", base_model="m"),
        "give exactly one of run_id, base_model, checkpoint_path; got {'run_id': 'e3', 'base_model': 'm'}",
    ),
    (lambda plane: plane.list_checkpoints(checkpoint_path="e3"), "checkpoint_path: must be bt://loops:<run_id>/"),
    (lambda plane: plane.list_runs(scope="world"), "scope: must be one of org; got 'world'"),
    (
        lambda plane: plane.validate_checkpoint("bt://loops:e3/weights/a"),
        "checkpoint_path: must be a 'sampler_weights'",
    ),
    (lambda plane: plane.get_checkpoint_files("Vq", page_size=0), "page_size: expected `int` >= 1; got 0"),
    (lambda plane: plane.get_checkpoint_files("Vq", page_token=-1), "page_token: expected `int` >= 0; got -1"),
    (
        lambda plane: plane.deploy_checkpoints(
            types.DeployCheckpointsRequest(checkpoint_ids=[], model_name="m", instance_type_id="i", hf_secret_name="h")
        ),
        "checkpoint_ids: expected `array` of length >= 1; got []",
    ),
    (
        lambda plane: plane.deploy_checkpoints(
            types.DeployCheckpointsRequest(
                checkpoint_ids=["a", ""], model_name="m", instance_type_id="i", hf_secret_name="h"
            )
        ),
        "checkpoint_ids[1]: expected `str` of length >= 1; got ''",
    ),
    (lambda plane: plane.get_capabilities(use_case="chat"), "use_case: must be one of rl, sft; got 'chat'"),
    (lambda plane: plane.get_capabilities(max_seq_len=0), "max_seq_len: expected `int` >= 1; got 0"),
    (lambda plane: plane.get_deployment_metrics("d", step_seconds=0), "step_seconds: expected `int` >= 1; got 0"),
    (lambda plane: plane.get_deployment_logs("d", limit=1001), "limit: expected `int` <= 1000; got 1001"),
    (lambda plane: plane.get_deployment_logs("d", direction="up"), "direction: must be one of asc, desc; got 'up'"),
    (
        lambda plane: plane.get_deployment_logs("d", min_level="LOUD"),
        "min_level: must be one of DEBUG, ERROR, INFO, WARNING; got 'LOUD'",
    ),
    (
        lambda plane: plane.get_deployment_logs("d", start_epoch_millis=5, end_epoch_millis=5),
        "start_epoch_millis: must be before end_epoch_millis=5; got 5",
    ),
    (
        lambda plane: plane.get_deployment_logs("d", start_epoch_millis=0, end_epoch_millis=604_800_001),
        "start_epoch_millis: must be at most 7 days before end_epoch_millis=604800001; got 0",
    ),
    (lambda plane: plane.get_debug_archive_files("d", page_size=1001), "page_size: expected `int` <= 1000; got 1001"),
    (
        lambda plane: plane.update_user_config(trainer_accelerator_priority=[]),
        "trainer_accelerator_priority: expected `array` of length >= 1; got []",
    ),
    (lambda plane: plane.get_run(""), "run_id: must be a non-empty string that is not '.' or '..'; got ''"),
    (lambda plane: plane.get_run("."), "run_id: must be a non-empty string that is not '.' or '..'; got '.'"),
    (lambda plane: plane.get_run(".."), "run_id: must be a non-empty string that is not '.' or '..'; got '..'"),
    (lambda plane: plane.get_run(None), "run_id: must be a non-empty string that is not '.' or '..'; got None"),
    (lambda plane: plane.get_checkpoint_files(5), "checkpoint_id: must be a non-empty string that is not"),
]


@pytest.mark.parametrize(("call", "problem"), REFUSED, ids=[problem.split(";")[0] for _, problem in REFUSED])
async def test_refused_before_anything_is_sent(
    service: ScriptedService, coloured_client: ServiceClient, call: Callable[[Any], Any], problem: str
) -> None:
    with pytest.raises(loops_async.InputError) as refused:
        await call(coloured_client.control_plane)
    assert problem in str(refused.value)
    assert [asked.path for asked in service.seen] == ["/v1/loops/sessions"]

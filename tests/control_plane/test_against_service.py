"""Every route through the typed client against the embedded service, in both colours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

import loops_async
from loops_async import (
    CreateRunRequest,
    CreateSamplerRequest,
    CreateTrainerRequest,
    DeployCheckpointsRequest,
    NotFoundError,
)
from loops_local import LocalService, serve_in_thread
from tests.control_plane.stub import Colour
from tests.engines import echo_unless_broken

Plane: TypeAlias = Callable[[Callable[[Any], Any]], Any]


@pytest.fixture(scope="module")
def local() -> Iterator[LocalService]:
    with serve_in_thread(engine=echo_unless_broken, provisioning_seconds=0.0) as local:
        yield local


@pytest.fixture
def plane(local: LocalService, colour: Colour) -> Plane:
    """Calls the control plane: ``await plane(lambda plane: plane.list_runs())``."""

    def call(work: Callable[[Any], Any]) -> Any:
        return colour.control_plane(local.base_url, work, api_key=local.api_key)

    return call


@pytest.fixture
def run(local: LocalService) -> loops_async.Run:
    """A run with a checkpoint of each kind called ``end``, and a second one of its weights."""

    async def train() -> loops_async.Run:
        async with loops_async.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            trainer = await service.create_lora_training_client("echo", rank=4, name="sft")
            await (await trainer.optim_step(loops_async.AdamParams())).result()
            await (await trainer.save_state("end")).result()
            await (await trainer.save_weights_for_sampler("end")).result()
            return await service.control_plane.get_run(trainer.run_id)

    return asyncio.run(train())


async def test_teams_and_sessions(plane: Plane) -> None:
    teams = await plane(lambda plane: plane.list_teams())
    assert [team.default for team in teams].count(True) == 1
    for team_id in (None, teams[0].id):
        session = await plane(lambda plane, team_id=team_id: plane.create_session(team_id=team_id))
        assert await plane(lambda plane, session_id=session.id: plane.get_session(session_id)) == session
    with pytest.raises(NotFoundError):
        await plane(lambda plane: plane.create_session(team_id="no-such-team"))


async def test_runs_and_trainers(plane: Plane) -> None:
    [team, *_] = await plane(lambda plane: plane.list_teams())
    session = await plane(lambda plane: plane.create_session())
    fields: dict[str, Any] = {"session_id": session.id, "base_model": "echo", "name": "mine"}
    paired = await plane(lambda plane: plane.create_run(CreateRunRequest(**fields)))
    alone = await plane(lambda plane: plane.create_trainer(CreateTrainerRequest(**fields)))
    of_team = await plane(lambda plane: plane.create_run(CreateRunRequest(**fields), team_id=team.id))
    assert (paired.name, paired.status.name, alone.sampler) == ("mine", "ACTIVE", None)
    assert paired.sampler.model_id
    listed = await plane(lambda plane: plane.list_runs(base_model="echo", scope="org"))
    assert {paired.id, alone.id} <= {run.id for run in listed}
    assert of_team.id in {run.id for run in await plane(lambda plane: plane.list_runs(team_id=team.id))}
    assert [run.id for run in await plane(lambda plane: plane.list_runs(run_id=alone.id))] == [alone.id]
    again = await plane(
        lambda plane: plane.create_sampler(CreateSamplerRequest(session_id=session.id, run_id=alone.id))
    )
    assert (await plane(lambda plane: plane.get_run(alone.id))).sampler.id == again.id
    for _ in range(2):
        assert (await plane(lambda plane: plane.deactivate_run(paired.id))).id
    assert (await plane(lambda plane: plane.get_run(paired.id))).status.name == "INACTIVE"


async def test_samplers(plane: Plane, run: loops_async.Run) -> None:
    path = f"bt://loops:{run.id}/sampler_weights/end"
    request = CreateSamplerRequest(session_id=run.session_id, base_model="echo", model_path=path, num_replicas=1)
    sampler = await plane(lambda plane: plane.create_sampler(request))
    assert sampler.id == (await plane(lambda plane: plane.list_samplers(scope="org")))[0].id
    assert await plane(lambda plane: plane.get_sampler(sampler.id))
    status = await plane(
        lambda plane: plane.get_model_deployment_status(str(sampler.model_id), str(sampler.deployment_id))
    )
    assert status in ("BUILDING", "DEPLOYING", "LOADING_MODEL", "ACTIVE")
    for _ in range(2):
        assert (await plane(lambda plane: plane.deactivate_sampler(sampler.id))).base_model == "echo"
    assert (await plane(lambda plane: plane.get_sampler(sampler.id))).status.name == "INACTIVE"


async def test_checkpoints(plane: Plane, run: loops_async.Run, colour: Colour, local: LocalService) -> None:
    path = f"bt://loops:{run.id}/sampler_weights/end"
    listed = await plane(lambda plane: plane.list_checkpoints(run_id=run.id))
    assert {(each.checkpoint_id, each.target) for each in listed} == {("end", "trainer"), ("end", "sampler")}
    [found] = await plane(lambda plane: plane.list_checkpoints(checkpoint_path=path))
    assert (found.target, found.lora_adapter_config.rank) == ("sampler", 4)
    assert found.id in {each.id for each in await plane(lambda plane: plane.list_checkpoints(base_model="echo"))}
    assert await plane(lambda plane: plane.list_checkpoints(checkpoint_path=path + "-not")) == []
    await plane(lambda plane: plane.validate_checkpoint(path, run_id=run.id))
    with pytest.raises(loops_async.BadRequestError):
        await plane(lambda plane: plane.validate_checkpoint(path + "-not"))
    assert (await plane(lambda plane: plane.get_checkpoint_source(found.id))).kind == "s3"
    page = await plane(lambda plane: plane.get_checkpoint_files(found.id, page_size=1))
    assert (len(page.presigned_urls), page.next_page_token) == (1, 1)
    assert page.presigned_urls[0].last_modified is not None
    request = DeployCheckpointsRequest(
        checkpoint_ids=[found.id], model_name="mine", instance_type_id="cpu", hf_secret_name="hf"
    )
    made = await plane(lambda plane: plane.deploy_checkpoints(request))
    assert await plane(lambda plane: plane.get_model_deployment_status(made.model_id, made.deployment_id))


async def test_deployments(plane: Plane, run: loops_async.Run) -> None:
    deployment_id = str(run.deployment_id)
    deployment = await plane(lambda plane: plane.get_deployment(deployment_id))
    assert (deployment.active_run_id, deployment.status.name) == (run.id, "RUNNING")
    assert deployment_id in {each.id for each in await plane(lambda plane: plane.list_deployments(scope="org"))}
    lines = await plane(lambda plane: plane.get_deployment_logs(deployment_id, direction="asc", min_level="INFO"))
    assert [line.time for line in lines] == sorted(line.time for line in lines)
    assert any("optim_step" in line.message for line in lines)
    [last] = await plane(lambda plane: plane.get_deployment_logs(deployment_id, direction="desc", limit=1))
    assert last == lines[-1]
    metrics = await plane(lambda plane: plane.get_deployment_metrics(deployment_id, step_seconds=1))
    assert any(point.value for point in metrics.inference_volume)
    assert (await plane(lambda plane: plane.deactivate_deployment(deployment_id))).id == deployment_id
    assert (await plane(lambda plane: plane.get_deployment(deployment_id))).status.name == "STOPPED"


async def test_what_a_failed_deployment_left(plane: Plane) -> None:
    session = await plane(lambda plane: plane.create_session())
    run = await plane(lambda plane: plane.create_run(CreateRunRequest(session_id=session.id, base_model="broken")))
    page = await plane(lambda plane: plane.get_debug_archive_files(run.deployment_id, page_size=10))
    assert page.next_page_token is None


async def test_capabilities_and_preferences(plane: Plane, run: loops_async.Run) -> None:
    [model] = (await plane(lambda plane: plane.get_capabilities(model=run.base_model, use_case="sft"))).supported_models
    assert model.enabled
    assert model.max_seq_len == model.max_context_length
    before = await plane(lambda plane: plane.get_user_config())
    changed = await plane(lambda plane: plane.update_user_config(trainer_accelerator_priority=["H100", "A100"]))
    assert changed.trainer_accelerator_priority == ["H100", "A100"]
    assert changed.sampler_accelerator_priority == before.sampler_accelerator_priority
    cleared = await plane(lambda plane: plane.update_user_config(trainer_accelerator_priority=None))
    assert cleared.trainer_accelerator_priority is None


@pytest.mark.parametrize("service_says", ["lost", "told"])
async def test_a_lost_answer_leaves_one_run(local: LocalService, colour: Colour, service_says: str) -> None:
    model = f"once-{service_says}-{type(colour).__name__}"
    if service_says == "lost":
        local.faults.lose_answer("POST */runs")

    def provision(service: Any) -> Any:
        return service.provision_run(CreateRunRequest(session_id=service.session_id, base_model=model))

    run = await colour.service(local.base_url, provision, api_key=local.api_key)
    listed = await colour.control_plane(
        local.base_url, lambda plane: plane.list_runs(base_model=model), api_key=local.api_key
    )
    assert [each.id for each in listed] == [run.id]

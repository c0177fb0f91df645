"""Every route of the control plane through the typed client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from loops_async import (
    AdamParams,
    BadRequestError,
    ControlPlane,
    CreateRunRequest,
    CreateSamplerRequest,
    CreateTrainerRequest,
    DeployCheckpointsRequest,
    NotFoundError,
    Run,
    ServiceClient,
)
from loops_local import LocalService, serve_in_thread
from tests.support.colours import Colour
from tests.support.engines import echo_unless_broken


@pytest.fixture(scope="module")
def local() -> Iterator[LocalService]:
    with serve_in_thread(engine=echo_unless_broken, provisioning_seconds=0.0) as local:
        yield local


@pytest.fixture
def plane(service: ServiceClient) -> ControlPlane:
    return service.control_plane


@pytest.fixture
async def run(service: ServiceClient, plane: ControlPlane) -> Run:
    """A run with a checkpoint of each kind called ``end``."""
    trainer = await service.create_lora_training_client("echo", rank=4, name="sft")
    await trainer.optim_step(AdamParams())
    await trainer.save_state("end")
    await (await trainer.save_weights_for_sampler("end"))
    return await plane.get_run(trainer.run_id)


async def test_teams_and_sessions(plane: ControlPlane) -> None:
    teams = await plane.list_teams()
    assert [team.default for team in teams].count(True) == 1
    for team_id in (None, teams[0].id):
        session = await plane.create_session(team_id=team_id)
        assert await plane.get_session(session.id) == session
    with pytest.raises(NotFoundError):
        await plane.create_session(team_id="no-such-team")


async def test_runs_and_trainers(plane: ControlPlane) -> None:
    [team, *_] = await plane.list_teams()
    session = await plane.create_session()
    fields: dict[str, Any] = {"session_id": session.id, "base_model": "echo", "name": "mine"}
    paired = await plane.create_run(CreateRunRequest(**fields))
    alone = await plane.create_trainer(CreateTrainerRequest(**fields))
    of_team = await plane.create_run(CreateRunRequest(**fields), team_id=team.id)
    assert (paired.name, paired.status.name, alone.sampler) == ("mine", "ACTIVE", None)
    assert paired.sampler is not None
    assert paired.sampler.model_id
    assert {paired.id, alone.id} <= {run.id for run in await plane.list_runs(base_model="echo", scope="org")}
    assert of_team.id in {run.id for run in await plane.list_runs(team_id=team.id)}
    assert [run.id for run in await plane.list_runs(run_id=alone.id)] == [alone.id]
    sampler = await plane.create_sampler(CreateSamplerRequest(session_id=session.id, run_id=alone.id))
    assert (await plane.get_run(alone.id)).sampler == await plane.get_sampler(sampler.id)
    for _ in range(2):
        assert (await plane.deactivate_run(paired.id)).id
    assert (await plane.get_run(paired.id)).status.name == "INACTIVE"


async def test_samplers(plane: ControlPlane, run: Run) -> None:
    path = f"bt://loops:{run.id}/sampler_weights/end"
    request = CreateSamplerRequest(session_id=run.session_id, base_model="echo", model_path=path, num_replicas=1)
    sampler = await plane.create_sampler(request)
    assert sampler.id == (await plane.list_samplers(scope="org"))[0].id
    assert await plane.get_sampler(sampler.id)
    status = await plane.get_model_deployment_status(str(sampler.model_id), str(sampler.deployment_id))
    assert status in ("BUILDING", "DEPLOYING", "LOADING_MODEL", "ACTIVE")
    for _ in range(2):
        assert (await plane.deactivate_sampler(sampler.id)).base_model == "echo"
    assert (await plane.get_sampler(sampler.id)).status.name == "INACTIVE"


async def test_checkpoints(plane: ControlPlane, run: Run) -> None:
    path = f"bt://loops:{run.id}/sampler_weights/end"
    listed = await plane.list_checkpoints(run_id=run.id)
    assert {(each.checkpoint_id, each.target) for each in listed} == {("end", "trainer"), ("end", "sampler")}
    [found] = await plane.list_checkpoints(checkpoint_path=path)
    assert found.lora_adapter_config is not None
    assert (found.target, found.lora_adapter_config.rank) == ("sampler", 4)
    assert found.id in {each.id for each in await plane.list_checkpoints(base_model="echo")}
    assert await plane.list_checkpoints(checkpoint_path=path + "-not") == []
    await plane.validate_checkpoint(path, run_id=run.id)
    with pytest.raises(BadRequestError):
        await plane.validate_checkpoint(path + "-not")
    assert (await plane.get_checkpoint_source(found.id)).kind == "s3"
    page = await plane.get_checkpoint_files(found.id, page_size=1)
    assert (len(page.presigned_urls), page.next_page_token) == (1, 1)
    assert page.presigned_urls[0].last_modified is not None
    request = DeployCheckpointsRequest(
        checkpoint_ids=[found.id], model_name="mine", instance_type_id="cpu", hf_secret_name="hf"
    )
    made = await plane.deploy_checkpoints(request)
    assert await plane.get_model_deployment_status(made.model_id, made.deployment_id)


async def test_deployments(plane: ControlPlane, run: Run) -> None:
    deployment_id = str(run.deployment_id)
    deployment = await plane.get_deployment(deployment_id)
    assert (deployment.active_run_id, deployment.status.name) == (run.id, "RUNNING")
    assert deployment_id in {each.id for each in await plane.list_deployments(scope="org")}
    lines = await plane.get_deployment_logs(deployment_id, direction="asc", min_level="INFO")
    assert [line.time for line in lines] == sorted(line.time for line in lines)
    assert any("optim_step" in line.message for line in lines)
    [last] = await plane.get_deployment_logs(deployment_id, direction="desc", limit=1)
    assert last == lines[-1]
    metrics = await plane.get_deployment_metrics(deployment_id, step_seconds=1)
    assert any(point.value for point in metrics.inference_volume)
    assert (await plane.deactivate_deployment(deployment_id)).id == deployment_id
    assert (await plane.get_deployment(deployment_id)).status.name == "STOPPED"


async def test_the_debug_archive_of_a_failed_deployment(plane: ControlPlane) -> None:
    session = await plane.create_session()
    run = await plane.create_run(CreateRunRequest(session_id=session.id, base_model="broken"))
    page = await plane.get_debug_archive_files(str(run.deployment_id), page_size=10)
    assert page.next_page_token is None


async def test_capabilities_and_preferences(plane: ControlPlane, run: Run) -> None:
    [model] = (await plane.get_capabilities(model=run.base_model, use_case="sft")).supported_models
    assert model.enabled
    assert model.max_seq_len == model.max_context_length
    before = await plane.get_user_config()
    changed = await plane.update_user_config(trainer_accelerator_priority=["H100", "A100"])
    assert changed.trainer_accelerator_priority == ["H100", "A100"]
    assert changed.sampler_accelerator_priority == before.sampler_accelerator_priority
    cleared = await plane.update_user_config(trainer_accelerator_priority=None)
    assert cleared.trainer_accelerator_priority is None


async def test_a_lost_answer_leaves_one_run(service: ServiceClient, colour: Colour, local: LocalService) -> None:
    model = f"once-{colour.module.__name__}"
    lost = local.faults.lose_answer("POST */runs")
    run = await service.provision_run(CreateRunRequest(session_id=service.session_id, base_model=model))
    assert [each.id for each in await service.control_plane.list_runs(base_model=model)] == [run.id]
    assert len(lost) == 1

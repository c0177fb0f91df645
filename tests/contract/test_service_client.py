"""Every member of a service client, its arguments and its environment."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest

from loops_async import (
    AdamParams,
    ConfigError,
    CreateRunRequest,
    InputError,
    ServiceClient,
    UnsupportedError,
    WandbConfig,
)
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.work import FEW_TOKENS, PROMPT, body_of, train, version_sampled


async def test_connecting_makes_a_session(service: ServiceClient) -> None:
    assert (await service.control_plane.get_session(service.session_id)).id == service.session_id


async def test_the_environment_stands_in_for_arguments(
    colour: Colour, local: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", local.api_key)
    monkeypatch.setenv("LOOPS_BASE_URL", local.base_url + "/")
    async with colour.connected() as service:
        assert service.session_id


async def test_arguments_win_over_the_environment(
    colour: Colour, local: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", "wrong")
    monkeypatch.setenv("LOOPS_BASE_URL", "http://127.0.0.1:9")
    async with colour.connected(api_key=local.api_key, base_url=local.base_url) as service:
        assert service.session_id


async def test_a_session_to_reuse_comes_from_the_argument_or_the_environment(
    colour: Colour, local: LocalService, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hits = local.faults.watch("POST */runs", times=2)
    monkeypatch.setenv("LOOPS_REUSE_FROM_SESSION_ID", "of-the-environment")
    common = {"api_key": local.api_key, "base_url": local.base_url}
    for options in [common, {**common, "reuse_from_session_id": "of-the-argument"}]:
        async with colour.connected(**options) as service:
            await service.create_lora_training_client(engine.name)
    assert [body_of(hit)["reuse_from_session_id"] for hit in hits] == ["of-the-environment", "of-the-argument"]


async def test_a_service_of_an_earlier_date(service: ServiceClient, local: LocalService, engine: WatchedEngine) -> None:
    """It says less of a run and of its sampler."""
    run = await service.control_plane.create_run(
        CreateRunRequest(session_id=service.session_id, base_model=engine.name, lora_rank=8)
    )
    shown = msgspec.to_builtins(run)
    for name in ("name", "deployment_id", "lora_config_version", "status", "user", "base_checkpoint"):
        shown.pop(name, None)
    for name in ("user", "instance_type", "node_count", "base_checkpoint"):
        shown["sampler"].pop(name, None)
    local.faults.answer("POST */runs", 200, {"run": shown})

    trainer = await service.create_lora_training_client(engine.name, rank=8)
    assert trainer.run_id == run.id
    await train(trainer)
    assert await version_sampled(await trainer.save_weights_and_get_sampling_client()) == 1


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("rank", {"rank": 0}),
        ("rank", {"rank": 1.5}),
        ("seed", {"seed": "seven"}),
        ("timeout", {"timeout": 0}),
        ("ready_timeout", {"ready_timeout": -1.0}),
        ("max_seq_len", {"max_seq_len": 0}),
        ("scale_down_delay_seconds", {"scale_down_delay_seconds": 0}),
        ("replicas", {"replicas": 0}),
        ("name", {"name": ""}),
        ("path", {"path": "s3://elsewhere"}),
        ("wandb_config", {"wandb_config": {"project": "p"}}),
        ("wandb_config.project", {"wandb_config": WandbConfig(project="")}),
    ],
)
async def test_arguments_of_a_run_are_checked_before_anything_is_sent(
    service: ServiceClient, engine: WatchedEngine, field: str, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError) as raised:
        await service.create_lora_training_client(engine.name, **options)
    assert raised.value.path == field
    assert await service.control_plane.list_runs(base_model=engine.name) == []


async def test_capabilities(service: ServiceClient) -> None:
    capabilities = await service.get_server_capabilities()
    assert "custom" in [model.model_name for model in capabilities.supported_models]


async def test_a_standalone_sampler(service: ServiceClient, engine: WatchedEngine) -> None:
    sampler = await service.create_sampling_client(engine.name)

    assert (await sampler.sample(PROMPT, 1, FEW_TOKENS)).sequences[0].tokens == [104, 105, 104, 105]
    assert sampler.get_base_model() == engine.name


@pytest.mark.parametrize("base_model", [{}, {"base_model": "echo"}], ids=["alone", "with a base model"])
async def test_model_path_is_not_offered_and_says_what_is(
    base_model: dict[str, str], service: ServiceClient, local: LocalService
) -> None:
    hits = local.faults.watch("POST */samplers")
    with pytest.raises(NotImplementedError, match="create_sampling_client_from_checkpoint") as raised:
        await service.create_sampling_client(**base_model, model_path="bt://loops:run/sampler_weights/a")
    assert isinstance(raised.value, UnsupportedError)
    assert "TrainingClient.create_sampling_client(model_path)" in str(raised.value)
    assert not hits


async def test_a_standalone_sampler_needs_a_base_model(service: ServiceClient, local: LocalService) -> None:
    hits = local.faults.watch("POST */samplers")
    with pytest.raises(InputError, match="is needed") as raised:
        await service.create_sampling_client()
    assert raised.value.path == "base_model"
    assert not hits


async def test_a_sampler_of_a_checkpoint_without_its_run(service: ServiceClient, engine: WatchedEngine) -> None:
    trainer = await service.create_lora_training_client(engine.name)
    await train(trainer, steps=3)
    saved = await (await trainer.save_weights_for_sampler("three", publish=False))

    sampler = await service.create_sampling_client_from_checkpoint(saved.path)
    assert await version_sampled(sampler) == 3
    assert (sampler.checkpoint_path, sampler.checkpoint_name) == (saved.path, "three")
    with pytest.raises(InputError, match="model_path"):
        await service.create_sampling_client_from_checkpoint(f"bt://loops:{trainer.run_id}/weights/three")


async def test_a_run_that_goes_on_from_a_checkpoint(service: ServiceClient, engine: WatchedEngine) -> None:
    first = await service.create_lora_training_client(engine.name, rank=4)
    await train(first, steps=2)
    saved = await (await first.save_state("two"))

    fresh = await service.create_training_client_from_state(saved.path)
    resumed = await service.create_training_client_from_state_with_optimizer(saved.path)
    started = await service.create_lora_training_client(engine.name, rank=4, path=saved.path)

    assert len({first.run_id, fresh.run_id, resumed.run_id, started.run_id}) == 4
    assert fresh.get_info().lora_rank == resumed.get_info().lora_rank == 4
    assert [await one.policy_version() for one in (fresh, resumed, started)] == [0, 2, 0]


async def test_a_checkpoint_that_is_not_there(service: ServiceClient, engine: WatchedEngine) -> None:
    trainer = await service.create_lora_training_client(engine.name)
    with pytest.raises(Exception, match="no checkpoint"):
        await service.create_training_client_from_state(f"bt://loops:{trainer.run_id}/weights/missing")


async def test_neither_key_nor_url(colour: Colour) -> None:
    with pytest.raises(ConfigError, match=r"BASETEN_API_KEY.*loops-local serve"):
        async with colour.connected():
            pass


async def test_the_key_is_nowhere_to_be_read(colour: Colour, service: ServiceClient, local: LocalService) -> None:
    assert local.api_key not in repr(colour.own(service))
    assert local.api_key not in repr(vars(colour.own(service)))


async def test_copies_of_clients_are_the_clients(service: ServiceClient, colour: Colour) -> None:
    trainer = await service.create_lora_training_client("echo")
    step = await trainer.optim_step(AdamParams())
    sampler = await service.create_sampling_client("echo")
    for client in (service, service.control_plane, trainer, step, sampler):
        own = colour.own(client)
        assert copy.copy(own) is own
        assert copy.deepcopy({"client": [own]})["client"] == [own]

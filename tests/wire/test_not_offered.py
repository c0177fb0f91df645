"""What a service, a run or an answer does not have is said in words that help."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from loops_async import (
    ConfigError,
    InputError,
    ProtocolError,
    SamplingClient,
    ServiceClient,
    TrainingClient,
    UnsupportedError,
)
from tests.support.scripted import COMPLETIONS, KEY, MODEL, Say, ScriptedService

CHECKPOINT: dict[str, Any] = {
    "id": "c1",
    "run_id": "r0",
    "checkpoint_id": "x",
    "checkpoint_type": "lora",
    "created_at": "2026-06-24T18:20:39.854Z",
    "base_model": MODEL,
    "lora_adapter_config": {"r": 16},
    "size_bytes": 1,
    "sync_status": None,
    "target": "trainer",
}
STATE = "bt://loops:r0/weights/x"
WEIGHTS = "bt://loops:r0/sampler_weights/x"


async def test_a_run_without_a_sampler(client: ServiceClient, service: ScriptedService) -> None:
    service.answer("POST", "/v1/loops/runs", Say(body={"run": service.run(sampler=None)}))
    trainer = await client.create_lora_training_client(MODEL)
    service.seen.clear()
    for call in (trainer.save_weights_and_get_sampling_client, trainer.create_sampling_client):
        with pytest.raises(UnsupportedError, match="run r1 has no paired sampler"):
            await call(WEIGHTS if call == trainer.create_sampling_client else "x")
    assert not service.submitted(), "nothing is published for nobody"


async def test_a_trainer_that_does_not_tell_its_version(trainer: TrainingClient, service: ScriptedService) -> None:
    assert await trainer.policy_version() == 1
    service.answer("GET", "/trainer/policy_version", Say(501, {"detail": "not here"}))
    with pytest.raises(UnsupportedError, match="not here"):
        await trainer.policy_version()


async def test_prompt_logprobs_that_were_not_sent(sampler: SamplingClient, service: ScriptedService) -> None:
    service.answer("POST", "/sampler/sample", Say(body=COMPLETIONS))
    with pytest.raises(ProtocolError, match="no prompt logprobs though they were requested"):
        await sampler.compute_logprobs([1, 2])


async def test_what_a_sampler_serves(sampler: SamplingClient, service: ScriptedService) -> None:
    assert await sampler.discover_base_model_name() == MODEL
    assert await sampler.discover_adapter_name() is None
    assert len(service.seen_at("GET", "/sampler/v1/models")) == 1, "known for five seconds"


async def test_a_sampler_without_a_base_model(sampler: SamplingClient, service: ScriptedService) -> None:
    service.always("GET", "/sampler/v1/models", Say(body={"data": [{"id": "a", "parent": MODEL, "new": 1}]}))
    assert await sampler.discover_adapter_name() == "a"
    with pytest.raises(ProtocolError, match="lists no base model"):
        await sampler.discover_base_model_name()


@pytest.mark.parametrize("nulls", [{"base_model": None}, {"lora_adapter_config": None}, {"lora_adapter_config": {}}])
async def test_a_checkpoint_of_which_too_little_is_known(
    client: ServiceClient, service: ScriptedService, nulls: dict[str, Any]
) -> None:
    service.always("GET", "/v1/loops/checkpoints", Say(body={"checkpoints": [{**CHECKPOINT, **nulls}]}))
    assert len(await client.list_checkpoints("r0")) == 1, "nulls are legal in a listing"
    with pytest.raises(ProtocolError, match=r"does not say the base model and rank of checkpoint bt://loops:r0"):
        await client.create_training_client_from_state(STATE)
    assert not service.seen_at("POST", "/v1/loops/runs")


async def test_an_unknown_checkpoint(client: ServiceClient, service: ScriptedService) -> None:
    service.always("GET", "/v1/loops/checkpoints", Say(body={"checkpoints": []}))
    with pytest.raises(InputError, match=r"has no checkpoint bt://loops:r0/weights/x.*list_checkpoints"):
        await client.create_training_client_from_state(STATE)


@pytest.mark.parametrize("with_optimizer", [False, True])
async def test_a_trainer_from_a_state_is_of_its_model_and_rank_and_loads_it(
    client: ServiceClient, service: ScriptedService, with_optimizer: bool
) -> None:
    service.always("GET", "/v1/loops/checkpoints", Say(body={"checkpoints": [CHECKPOINT]}))
    if with_optimizer:
        await client.create_training_client_from_state_with_optimizer(STATE)
    else:
        await client.create_training_client_from_state(STATE)
    [run] = service.seen_at("POST", "/v1/loops/runs")
    assert (run.json["base_model"], run.json["lora_rank"], run.json["path"]) == (MODEL, 16, STATE)
    *_, load = service.submitted()
    assert load.path == ("/trainer/load_state_with_optimizer" if with_optimizer else "/trainer/load_state")
    assert load.json["path"] == STATE


async def test_what_a_sampler_serves_cannot_expire(trainer: TrainingClient, service: ScriptedService) -> None:
    with pytest.raises(InputError, match=r"ttl_seconds: needs publish=False"):
        await trainer.save_weights_for_sampler("x", ttl_seconds=60)
    assert not service.submitted()


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", "", "..\\x", "C:x", "x\n", None])
async def test_a_tokenizer_is_not_written_elsewhere(
    sampler: SamplingClient, service: ScriptedService, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = ModuleType("transformers")
    installed.__spec__ = ModuleSpec("transformers", loader=None)
    monkeypatch.setitem(sys.modules, "transformers", installed)
    served = {"data": [{"id": MODEL, "parent": None, "tokenizer": "tokenizer"}]}
    service.always("GET", "/sampler/v1/models", Say(body=served))
    service.always("GET", "/sampler/tokenizer", Say(body={"files": [name]}))
    with pytest.raises(ProtocolError):
        await sampler.get_tokenizer()


@pytest.mark.parametrize("body", [b"\x88\xb1", b"[]", b"{}"], ids=repr)
async def test_a_tokenizer_that_cannot_be_read_is_a_typed_error(
    client: ServiceClient, service: ScriptedService, body: bytes
) -> None:
    pytest.importorskip("transformers", reason="NOT TESTED: the file of a tokenizer, which needs transformers")
    sampler = await client.create_sampling_client(MODEL)
    served = {"data": [{"id": MODEL, "parent": None, "tokenizer": "tokenizer"}]}
    service.always("GET", "/sampler/v1/models", Say(body=served))
    service.always("GET", "/sampler/tokenizer", Say(body={"files": ["tokenizer.json"]}))
    service.always("GET", "/sampler/tokenizer/tokenizer.json", Say(body=body))
    with pytest.raises(ProtocolError, match="a tokenizer that cannot be read"):
        await sampler.get_tokenizer()


async def test_a_team_that_does_not_exist(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    teams = [{"id": "t1", "name": "research"}, {"id": "t2", "name": "ops"}]
    service.always("GET", "/v1/teams", Say(body={"teams": teams}))
    monkeypatch.setenv("LOOPS_TEAM", "finance")
    with pytest.raises(ConfigError, match="there is no team 'finance'; known teams: ops, research"):
        await ServiceClient(base_url=service.url, api_key=KEY).open()

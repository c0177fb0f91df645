"""Scripts of both generations run: each method once in each form."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import numpy as np
import pytest

import loops_tinker as tinker
from loops_local import LocalService
from loops_tinker import types

PROMPT = types.ModelInput.from_ints([65, 66, 67])
PARAMS = types.SamplingParams(max_tokens=4)


def test_the_old_generation_without_await(echo: LocalService, datum: types.Datum) -> None:
    service = tinker.ServiceClient(user_metadata={"a": "b"}, timeout=3)
    assert [each.model_name for each in service.get_server_capabilities().supported_models]
    trainer = service.create_lora_training_client(base_model="echo", rank=4, train_mlp=True, user_metadata={"a": "b"})
    passed = trainer.forward_backward([datum], "cross_entropy")
    stepped = trainer.optim_step(types.AdamParams(learning_rate=1e-3))
    logprobs = np.concatenate([each["logprobs"].tolist() for each in passed.result().loss_fn_outputs])
    assert logprobs.shape == (3,)
    assert passed.result().metrics["loss:sum"] == pytest.approx(-logprobs[1:].sum())
    assert stepped.result().metrics
    assert trainer.forward([datum], loss_fn="cross_entropy").result().loss_fn_outputs
    sampler = trainer.save_weights_and_get_sampling_client(name="x")
    assert len(sampler.sample(prompt=PROMPT, num_samples=2, sampling_params=PARAMS).result().sequences) == 2
    assert sampler.compute_logprobs(PROMPT).result()[0] is None
    assert sampler.get_base_model() == "echo"
    state = trainer.save_state(name="s").result().path
    weights = trainer.save_weights_for_sampler(name="w", ttl_seconds=60).result().path
    assert (state, weights) == (
        f"tinker://{trainer.model_id}/weights/s",
        f"tinker://{trainer.model_id}/sampler_weights/w",
    )
    assert trainer.load_state(state).result().path == state
    trainer.load_state_with_optimizer(state)
    for client in (service.create_sampling_client(model_path=weights), trainer.create_sampling_client(weights)):
        assert client.sample(PROMPT, 1, PARAMS).result().sequences[0].stop_reason in ("stop", "length")
    assert service.create_sampling_client(base_model="echo").compute_logprobs(PROMPT).result()
    assert service.create_training_client_from_state(state).get_info().model_data.model_name == "echo"
    assert service.create_training_client_from_state_with_optimizer(state).model_id != trainer.model_id


async def test_the_old_generation_with_two_awaits(echo: LocalService, datum: types.Datum) -> None:
    service = tinker.ServiceClient()
    trainer = await service.create_lora_training_client_async(base_model="echo", rank=4)
    assert type(trainer) is tinker.TrainingClient
    passed = await trainer.forward_backward_async([datum], loss_fn="cross_entropy")
    stepped = await trainer.optim_step_async(adam_params=types.AdamParams())
    assert (await passed.result_async()).loss_fn_outputs
    assert (await stepped).metrics
    assert (await (await trainer.forward_async([datum], "cross_entropy"))).loss_fn_outputs
    sampler = await trainer.save_weights_and_get_sampling_client_async(name="x")
    assert type(sampler) is tinker.SamplingClient
    assert len((await sampler.sample_async(PROMPT, 2, PARAMS)).sequences) == 2
    assert len(await sampler.compute_logprobs_async(PROMPT)) == 3
    assert await sampler.get_base_model_async() == "echo"
    state = (await (await trainer.save_state_async("s")).result_async()).path
    await (await trainer.load_state_async(state))
    await (await trainer.load_state_with_optimizer_async(state))
    weights = (await (await trainer.save_weights_for_sampler_async("w"))).path
    assert (await trainer.create_sampling_client_async(weights)).get_base_model() == "echo"
    assert (await service.create_sampling_client_async(model_path=weights)).get_base_model() == "echo"
    assert (await service.create_training_client_from_state_async(state)).model_id
    assert (await service.create_training_client_from_state_with_optimizer_async(state)).model_id
    assert (await service.get_server_capabilities_async()).supported_models
    assert (await trainer.get_info_async()).model_id == trainer.model_id


async def test_the_new_generation(echo: LocalService, datum: types.Datum) -> None:
    with tinker.ServiceClient(display_name="x") as service:
        trainer = await service.create_lora_training_client(base_model="echo", rank=4)
        passed = trainer.forward_backward([datum], "cross_entropy")
        assert (await trainer.optim_step(types.AdamParams())).metrics
        assert (await passed).metrics
        sampler = await trainer.save_weights_and_get_sampling_client()
        responses = await asyncio.gather(*[sampler.sample(PROMPT, 2, PARAMS).coroutine() for _ in range(3)])
        ids = [sequence.sequence_id for response in responses for sequence in response.sequences]
        assert len(set(ids)) == 6
        assert {response.prompt_cache_hit_tokens for response in responses} == {0}
        inflight = await trainer.save_weights_and_get_sampling_client(kind="inflight")
        assert (await inflight.sample(PROMPT, 1, PARAMS, include_prompt_logprobs=True)).prompt_logprobs
        with pytest.raises(tinker.TinkerError):
            await tinker.RestClient().get_training_run_by_tinker_path(f"tinker://nothing/weights/{trainer.model_id}")


def test_the_first_clients_of_loops(trainer: tinker.TrainingClient, datum: types.Datum) -> None:
    assert isinstance(trainer.forward_backward([datum]).result().loss, float)
    trainer.save_state("s").result()
    assert tinker.ServiceClient().list_checkpoints(trainer.run_id)[0].checkpoint_id == "s"


async def test_what_the_service_keeps(trainer: tinker.TrainingClient) -> None:
    state = (await trainer.save_state("s")).path
    weights = (await trainer.save_weights_for_sampler("w")).path
    rest = tinker.ServiceClient().create_rest_client()
    listed = rest.list_checkpoints(trainer.model_id).result().checkpoints
    assert {(each.checkpoint_id, each.checkpoint_type, each.tinker_path) for each in listed} == {
        ("weights/s", "training", state),
        ("sampler_weights/w", "sampler", weights),
    }
    assert (await rest.list_checkpoints_async(trainer.model_id)).checkpoints == listed
    everything = await rest.list_user_checkpoints_async()
    assert {each.tinker_path for each in everything.checkpoints} >= {state, weights}
    assert everything.cursor is not None
    assert len(rest.list_user_checkpoints(limit=1, offset=1).result().checkpoints) == 1
    run = await rest.get_training_run_by_tinker_path_async(state)
    assert (run.training_run_id, run.base_model, run.lora_rank, run.user_metadata) == (
        trainer.model_id,
        "echo",
        4,
        None,
    )
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == state
    assert (
        rest.get_training_run(trainer.model_id).result() == await rest.get_training_run_async(trainer.model_id) == run
    )
    assert (await rest.list_training_runs_async(limit=1)).cursor.total_count >= 1
    assert rest.get_weights_info_by_tinker_path(weights).result().lora_rank == 4
    assert rest.get_server_capabilities().result().supported_models
    untyped: Any = rest
    untyped_admin: Any = tinker.AdminClient()
    for refused in (
        rest.delete_checkpoint_from_tinker_path(state),
        rest.delete_checkpoint("r", "weights/s"),
        rest.set_checkpoint_ttl_from_tinker_path(state, 60),
        rest.publish_checkpoint_from_tinker_path(state),
        rest.unpublish_checkpoint_from_tinker_path(state),
        rest.get_checkpoint_archive_url_from_tinker_path(state),
        rest.get_external_weights_urls(state),
        untyped.whoami(),
        untyped.list_sessions_async(limit=3),
        untyped_admin.get_audit_log(event_type="all"),
    ):
        with pytest.raises(tinker.UnsupportedError, match="Loops does not have"):
            await refused
    with pytest.raises(AttributeError, match="'RestClient' object has no attribute 'nonsense'"):
        untyped.nonsense()
    other = tinker.RestClient(os.environ["LOOPS_BASE_URL"], os.environ["BASETEN_API_KEY"])
    assert await other.get_weights_info_by_tinker_path_async(state) == await rest.get_weights_info_by_tinker_path(state)
    assert await other.get_server_capabilities_async() == await rest.get_server_capabilities()


def test_a_checkpoint_that_is_not_there_is_not_found(trainer: tinker.TrainingClient) -> None:
    service = tinker.ServiceClient()
    path = f"tinker://{trainer.model_id}/weights/none"
    for future in (
        service.create_training_client_from_state(path),
        service.create_training_client_from_state_with_optimizer(path),
        service.create_sampling_client(path.replace("weights", "sampler_weights")),
        tinker.RestClient().get_weights_info_by_tinker_path(path),
    ):
        with pytest.raises(tinker.NotFoundError, match=r"there is no checkpoint tinker://.*/none") as missing:
            future.result()
        assert missing.value.status_code == 404
        assert missing.value.body == {"detail": str(missing.value)}


def test_what_loops_does_not_have_is_refused_at_the_call(trainer: tinker.TrainingClient, datum: types.Datum) -> None:
    service, sampler = tinker.ServiceClient(), trainer.save_weights_and_get_sampling_client()
    with pytest.raises(tinker.UnsupportedError, match="use 'ppo'"):
        trainer.forward_backward([datum], "stable_reinforce")
    with pytest.raises(tinker.UnsupportedError, match="forward_backward_custom"):
        trainer.forward([datum], "gspo")
    with pytest.raises(tinker.UnsupportedError, match="Dimuon"):
        trainer.optim_step(types.DimuonParams(learning_rate=1.0))
    with pytest.raises(tinker.UnsupportedError, match="train_attn"):
        service.create_lora_training_client("echo", train_attn=False)
    with pytest.raises(tinker.UnsupportedError, match="AdamW"):
        service.create_lora_training_client("echo", optimizer=types.DimuonOptimizerConfig())
    with pytest.raises(tinker.UnsupportedError, match="topk_sample_logprobs"):
        sampler.sample(PROMPT, 1, PARAMS, topk_sample_logprobs=2)
    with pytest.raises(tinker.UnsupportedError, match="weights_access_token"):
        trainer.load_state("tinker://r/weights/s", weights_access_token="x")
    with pytest.raises(tinker.UnsupportedError, match="text and the bytes of images"):
        sampler.sample(types.ModelInput(chunks=[types.DmelChunk(dmel=b"x")]), 1, PARAMS)
    with pytest.raises(tinker.UnsupportedError, match="stores no losses"):
        service.create_custom_loss(print, {})
    with pytest.raises(tinker.UnsupportedError, match="loops ps"):
        service.get_console_url()
    with pytest.raises(tinker.UnsupportedError, match=f"loops runs show {trainer.model_id}"):
        trainer.get_console_url()
    with pytest.raises(ValueError, match="Either model_path or base_model"):
        service.create_sampling_client()
    with pytest.raises(ValueError, match="Invalid tinker path"):
        service.create_training_client_from_state("nonsense")
    with pytest.raises(TypeError, match=r"data\[0\] must be a Datum"):
        trainer.forward_backward([3])  # type: ignore[list-item]


def test_a_key_of_the_vendor_is_not_sent(echo: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BASETEN_API_KEY")
    monkeypatch.setenv("TINKER_API_KEY", "tml-abc")
    with pytest.raises(ValueError, match="one of Tinker, and was not sent"):
        tinker.ServiceClient()
    monkeypatch.setenv("TINKER_API_KEY", echo.api_key)
    monkeypatch.setenv("TINKER_BASE_URL", echo.base_url)
    monkeypatch.delenv("LOOPS_BASE_URL")
    assert tinker.ServiceClient().create_lora_training_client("echo").model_id


def test_what_is_ignored_is_said_once(echo: LocalService, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        tinker.ServiceClient(unheard_of=3, also_new=None)
    assert [record.message for record in caplog.records] == ["ignored, since Loops has nothing like it: unheard_of"]

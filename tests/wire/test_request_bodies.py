"""Bodies and headers, byte for byte where the order matters to somebody (data-plane 2, 3.3, 3.4)."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
import pytest

from loops_async import (
    AdamParams,
    Datum,
    ExternalRef,
    ImageChunk,
    ModelInput,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TrainingClient,
    __version__,
)
from tests.wire.conftest import KEY
from tests.wire.scripted import COMPLETIONS, MODEL, Say, ScriptedService

DATUM = Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, -100], "weights": [1.0, float("nan")]})
DATUM_JSON = (
    b'{"model_input":{"chunks":[{"type":"encoded_text","tokens":[1,2]}]},"loss_fn_inputs":{'
    b'"target_tokens":{"data":[2,-100],"dtype":"int64","shape":[2]},'
    b'"weights":{"data":[1.0,null],"dtype":"float32","shape":[2]}}}'
)
ADAM_JSON = b'{"learning_rate":0.0001,"beta1":0.9,"beta2":0.95,"eps":1e-12,"weight_decay":0.0,"grad_clip_norm":1.0}'


async def test_every_operation_of_a_trainer(service: ScriptedService, trainer: TrainingClient) -> None:
    await trainer.forward([DATUM])
    await trainer.forward_backward([DATUM, DATUM], "cross_entropy", {"skip_token_normalization": True})
    await trainer.forward([DATUM], top_k_logprobs=20)
    await trainer.optim_step(AdamParams())
    await trainer.save_state("a")
    await trainer.save_state("b", ttl_seconds=60)
    await trainer.save_weights_for_sampler("c")
    await trainer.save_weights_for_sampler("d", publish=False)
    await trainer.load_state("bt://loops:r0/weights/a")
    await trainer.load_state_with_optimizer("s3://bucket/a")
    await trainer.init_trainer_server(16)
    end = b'"model":"org/model"}'
    expected: list[tuple[str, bytes]] = [
        (
            "forward",
            b'{"data":[' + DATUM_JSON + b'],"loss_fn":"cross_entropy","loss_fn_config":null,"seq_id":2,"run_id":"r1",'
            b'"top_k_logprobs":0,' + end,
        ),
        (
            "forward_backward",
            b'{"data":[' + DATUM_JSON + b"," + DATUM_JSON + b'],"loss_fn":"cross_entropy",'
            b'"loss_fn_config":{"skip_token_normalization":true},"seq_id":3,"run_id":"r1","top_k_logprobs":0,' + end,
        ),
        (
            "forward",
            b'{"data":[' + DATUM_JSON + b'],"loss_fn":"cross_entropy","loss_fn_config":null,"seq_id":4,"run_id":"r1",'
            b'"top_k_logprobs":20,' + end,
        ),
        ("optim_step", b'{"adam_params":' + ADAM_JSON + b',"seq_id":5,"run_id":"r1",' + end),
        ("save_state", b'{"name":"a","ttl_seconds":null,"run_id":"r1","seq_id":6,' + end),
        ("save_state", b'{"name":"b","ttl_seconds":60,"run_id":"r1","seq_id":7,' + end),
        ("save_weights_for_sampler", b'{"name":"c","run_id":"r1","seq_id":8,"bump_version":true,' + end),
        (
            "save_weights_for_sampler",
            b'{"name":"d","ttl_seconds":null,"run_id":"r1","seq_id":9,"bump_version":false,' + end,
        ),
        ("load_state", b'{"path":"bt://loops:r0/weights/a","run_id":"r1","seq_id":10,' + end),
        ("load_state_with_optimizer", b'{"path":"s3://bucket/a","run_id":"r1","seq_id":11,' + end),
        (
            "init_trainer_server",
            b'{"lora_rank":16,"base_model":"org/model","seq_id":12,"run_id":"r1",' + end,
        ),
    ]
    assert [(seen.path.removeprefix("/trainer/"), seen.body) for seen in service.submitted()] == expected


async def test_the_first_operation_of_a_new_trainer(client: ServiceClient, service: ScriptedService) -> None:
    await client.create_lora_training_client(MODEL, rank=8)
    [first] = service.submitted()
    assert first.path == "/trainer/init_trainer_server"
    assert first.body == b'{"lora_rank":8,"base_model":"org/model","seq_id":1,"run_id":"r1","model":"org/model"}'
    [health] = service.seen_at("GET", "/trainer/health")
    assert health.query in ("base_model=org/model", "base_model=org%2Fmodel")
    assert health.headers["X-Run-Id"] == "r1"


@pytest.mark.parametrize(
    ("loss_fn", "config"),
    [
        ("importance_sampling", None),
        ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("cispo", {"clip_low_threshold": 0}),
        ("dro", {"beta": 0.05}),
        ("dppo", {"dppo_mask_high": 0.2, "dppo_mask_low": 0.2, "adv_tau": 1.0, "kl_tau": 0.001}),
    ],
)
async def test_losses_on_samples(
    service: ScriptedService, trainer: TrainingClient, loss_fn: Any, config: dict[str, float] | None
) -> None:
    datum = Datum(
        model_input=[1, 2],
        loss_fn_inputs={"target_tokens": [2, 3], "logprobs": [-0.5, -1.0], "advantages": [1.0]},
    )
    await trainer.forward_backward([datum], loss_fn, config)
    [seen] = service.submitted()
    assert (seen.json["loss_fn"], seen.json["loss_fn_config"]) == (loss_fn, config)
    assert list(seen.json["data"][0]["loss_fn_inputs"]) == ["target_tokens", "logprobs", "advantages"]


async def test_images_and_routing_in_a_datum(service: ScriptedService, trainer: TrainingClient) -> None:
    prompt = ModelInput.from_ints([1]).append(ImageChunk.from_bytes(b"\x89PNG", "png", 2))
    ref = ExternalRef(uri="bt://loops:r1/sequences/o1", version=1)
    await trainer.forward([Datum(model_input=prompt, routed_experts_ref=ref)])
    [seen] = service.submitted()
    assert msgspec.json.encode(seen.json["data"]) == (
        b'[{"model_input":{"chunks":[{"type":"encoded_text","tokens":[1]},'
        b'{"type":"image","data":"iVBORw==","format":"png","expected_tokens":2}]},"loss_fn_inputs":{},'
        b'"routed_experts_ref":{"uri":"bt://loops:r1/sequences/o1","version":1}}]'
    )


async def test_headers_of_a_trainer(service: ScriptedService, trainer: TrainingClient) -> None:
    future = await trainer.optim_step(AdamParams())
    await future
    await trainer.policy_version()
    submit, poll, version = service.seen
    assert (submit.method, poll.method, version.method) == ("POST", "GET", "GET")
    for seen in (submit, poll, version):
        assert seen.headers["Authorization"] == f"Bearer {KEY}"
        assert seen.headers["X-Run-Id"] == "r1"
        assert seen.headers["X-Baseten-Accept-Error"] == "1"
        assert seen.headers["User-Agent"] == f"loops-async/{__version__}"
        assert "Cookie" not in seen.headers
    assert submit.headers["Content-Type"] == "application/json"
    assert int(submit.headers["Content-Length"]) == len(submit.body)
    assert "Idempotency-Key" not in poll.headers


async def test_a_body_in_pieces_says_its_length(service: ScriptedService, trainer: TrainingClient) -> None:
    await trainer.forward([DATUM] * 400)
    [seen] = service.submitted()
    assert int(seen.headers["Content-Length"]) == len(seen.body) > 64 * 1024
    assert "Transfer-Encoding" not in seen.headers
    assert len(seen.json["data"]) == 400


async def test_the_other_authorization_scheme(service: ScriptedService) -> None:
    async with ServiceClient(api_key=KEY, base_url=service.url, auth_scheme="Api-Key"):
        pass
    assert service.seen[0].headers["Authorization"] == f"Api-Key {KEY}"


async def test_without_a_key_there_is_no_authorization(service: ScriptedService) -> None:
    async with ServiceClient(base_url=service.url) as client:
        sampler = await client.create_sampling_client(MODEL)
        await sampler.sample([1])
    assert not any("Authorization" in seen.headers for seen in service.seen)


async def test_local_processes_get_no_key(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", KEY)
    urls = {"trainer_url": f"{service.url}/trainer", "sampler_url": f"{service.url}/sampler"}
    async with ServiceClient.local(**urls) as client:
        trainer = await client.create_lora_training_client(MODEL)
        sampler = await trainer.save_weights_and_get_sampling_client("x")
        await sampler.sample([1])
    assert not any("Authorization" in seen.headers for seen in service.seen)
    assert {seen.path.split("/")[1] for seen in service.seen} == {"trainer", "sampler"}, "there is no control plane"


# --- creating ---


async def test_what_a_seed_era_service_is_asked_for(client: ServiceClient, service: ScriptedService) -> None:
    [session] = service.seen
    assert session.json == {}, "the project is sent only when it was given"
    await client.create_lora_training_client(MODEL)
    [run] = service.seen_at("POST", "/v1/loops/runs")
    assert run.body == (
        b'{"session_id":"s1","base_model":"org/model","max_seq_len":null,"lora_rank":32,"seed":null,'
        b'"scale_down_delay_seconds":3600,"replicas":1,"path":null,"reuse_from_session_id":null}'
    )
    await client.create_sampling_client(MODEL)
    [sampler] = service.seen_at("POST", "/v1/loops/samplers")
    assert sampler.json == {"session_id": "s1", "base_model": MODEL, "max_seq_length": None, "model_path": None}


async def test_what_is_given_is_sent(service: ScriptedService) -> None:
    async with ServiceClient("p1", api_key=KEY, base_url=service.url, reuse_from_session_id="s0") as client:
        await client.create_lora_training_client(
            MODEL,
            16,
            7,
            max_seq_len=4096,
            scale_down_delay_seconds=60,
            replicas=2,
            path="bt://loops:r0/weights/a",
            name="mine",
        )
    assert service.seen_at("POST", "/v1/loops/sessions")[0].json == {"training_project_id": "p1"}
    assert service.seen_at("POST", "/v1/loops/runs")[0].json == {
        "session_id": "s1",
        "base_model": MODEL,
        "max_seq_len": 4096,
        "lora_rank": 16,
        "seed": 7,
        "scale_down_delay_seconds": 60,
        "replicas": 2,
        "path": "bt://loops:r0/weights/a",
        "reuse_from_session_id": "s0",
        "name": "mine",
    }


# --- sampling ---

ALWAYS = b'"n":1,"temperature":1.0,"top_p":1.0,"logprobs":0,"return_tokens_as_token_ids":true'
IDS = b'"return_token_ids":true'
"""Sent always: ids are read without parsing names; a service that does not know the key ignores it."""


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        ({}, b'{"prompt":[1,2],' + ALWAYS + b"," + IDS + b"}"),
        (
            {"sampling_params": SamplingParams(max_tokens=5, seed=0, top_k=3, stop="\n")},
            b'{"prompt":[1,2],' + ALWAYS + b"," + IDS + b',"max_tokens":5,"seed":0,"top_k":3,"stop":"\\n"}',
        ),
        (
            {"sampling_params": SamplingParams(stop=["a", "b"])},
            b'{"prompt":[1,2],' + ALWAYS + b"," + IDS + b',"stop":["a","b"]}',
        ),
        (
            {"sampling_params": SamplingParams(stop=[7, 8])},
            b'{"prompt":[1,2],' + ALWAYS + b"," + IDS + b',"stop_token_ids":[7,8]}',
        ),
        ({"sampling_params": SamplingParams(stop=[], top_k=-1)}, b'{"prompt":[1,2],' + ALWAYS + b"," + IDS + b"}"),
        ({"sampling_params": SamplingParams(stop="", top_k=0)}, b'{"prompt":[1,2],' + ALWAYS + b"," + IDS + b"}"),
        (
            {"include_prompt_logprobs": True},
            b'{"prompt":[1,2],' + ALWAYS + b"," + IDS + b',"prompt_logprobs":0}',
        ),
        ({"topk_prompt_logprobs": 4}, b'{"prompt":[1,2],' + ALWAYS + b"," + IDS + b',"prompt_logprobs":4}'),
        (
            {"sampling_params": SamplingParams(structured_outputs={"json": {}})},
            b'{"prompt":[1,2],' + ALWAYS + b"," + IDS + b',"structured_outputs":{"json":{}}}',
        ),
        (
            {"prompt": ModelInput.from_ints([1]).append(ImageChunk.from_bytes(b"\x89PNG", "png", 2))},
            b'{"prompt":[],' + ALWAYS + b',"model_input_chunks":[{"type":"encoded_text","tokens":[1]},'
            b'{"type":"image","data":"iVBORw==","format":"png","expected_tokens":2}],' + IDS + b"}",
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else ",".join(value) or "defaults",
)
async def test_sample_bodies(
    service: ScriptedService, sampler: SamplingClient, arguments: dict[str, Any], body: bytes
) -> None:
    await sampler.sample(**{"prompt": [1, 2], **arguments})
    [seen] = service.seen_at("POST", "/sampler/sample")
    assert seen.body == body


async def test_greedy_and_many(service: ScriptedService, sampler: SamplingClient) -> None:
    await sampler.sample([1], 8, SamplingParams(temperature=0.0, top_p=0.5))
    [seen] = service.seen_at("POST", "/sampler/sample")
    assert (seen.json["n"], seen.json["temperature"], seen.json["top_p"]) == (8, 0.0, 0.5)


async def test_compute_logprobs_asks_for_one_greedy_token(service: ScriptedService, sampler: SamplingClient) -> None:
    choice = {**COMPLETIONS["choices"][0], "prompt_logprobs": [None, {"2": {"logprob": -0.5}}]}
    service.answer("POST", "/sampler/sample", Say(body={"choices": [choice]}))
    assert await sampler.compute_logprobs([1, 2]) == [None, -0.5]
    [seen] = service.seen_at("POST", "/sampler/sample")
    assert {name: seen.json[name] for name in ("n", "max_tokens", "temperature", "prompt_logprobs")} == {
        "n": 1,
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
    }


NAMES = ("X-Run-Id", "X-Sampler-Id", "X-Checkpoint-Path", "X-Min-Policy-Version", "X-Baseten-Session-ID")
CHECKPOINT = "bt://loops:r0/sampler_weights/x"


def named(service: ScriptedService) -> dict[str, str]:
    seen = service.seen_at("POST", "/sampler/sample")[-1]
    return {name: seen.headers[name] for name in NAMES if name in seen.headers}


async def test_a_standalone_sampler_is_named_by_its_id(service: ScriptedService, sampler: SamplingClient) -> None:
    await sampler.sample([1])
    assert named(service) == {"X-Sampler-Id": "q1"}
    await sampler.sample([1], affinity_key="group-7")
    assert named(service) == {"X-Sampler-Id": "q1", "X-Baseten-Session-ID": "group-7"}


async def test_a_standalone_checkpoint_is_named_by_its_path(client: ServiceClient, service: ScriptedService) -> None:
    checkpoint = {
        "id": "c1",
        "run_id": "r0",
        "checkpoint_id": "x",
        "checkpoint_type": "lora",
        "created_at": "2026-06-24T18:20:39.854Z",
        "base_model": MODEL,
        "lora_adapter_config": {"r": 16},
        "size_bytes": 1,
        "sync_status": None,
        "target": "sampler",
    }
    service.answer("GET", "/v1/loops/checkpoints", Say(body={"checkpoints": [checkpoint]}))
    sampler = await client.create_sampling_client_from_checkpoint(CHECKPOINT)
    await sampler.sample([1])
    assert named(service) == {"X-Checkpoint-Path": CHECKPOINT}


async def test_a_paired_sampler_is_named_by_its_run(service: ScriptedService, trainer: TrainingClient) -> None:
    published = await trainer.save_weights_and_get_sampling_client("x")
    await published.sample([1])
    assert named(service) == {"X-Run-Id": "r1", "X-Min-Policy-Version": "1"}
    pinned = await trainer.create_sampling_client(CHECKPOINT)
    await pinned.sample([1])
    assert named(service) == {"X-Run-Id": "r1", "X-Checkpoint-Path": CHECKPOINT}


async def test_version_0_is_the_base_model_and_no_floor(service: ScriptedService, trainer: TrainingClient) -> None:
    service.answer("POST", "/trainer/save_weights_for_sampler", Say(202, {"operation_id": "o"}))
    nothing_trained = {"status": "done", "result": {"version": 0, "path": CHECKPOINT}}
    service.answer("GET", "/trainer/operations/o", Say(body=nothing_trained))
    sampler = await trainer.save_weights_and_get_sampling_client("x")
    await sampler.sample([1])
    assert named(service) == {"X-Run-Id": "r1"}
    assert not service.seen_at("GET", "/sampler/trainers_policy_version")


async def test_each_sample_has_a_dashed_key(service: ScriptedService, sampler: SamplingClient) -> None:
    await sampler.sample([1])
    await sampler.sample([1])
    keys = [seen.headers["Idempotency-Key"] for seen in service.seen_at("POST", "/sampler/sample")]
    assert len(set(keys)) == 2
    assert all(str(uuid.UUID(key)) == key for key in keys)

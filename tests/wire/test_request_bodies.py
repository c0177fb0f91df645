"""Bodies and headers of requests (data-plane 2, 3.3, 3.4)."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from loops_async import (
    AdamParams,
    CreateRunRequest,
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
from tests.support.colours import Colour
from tests.support.scripted import COMPLETIONS, KEY, MODEL, Say, ScriptedService

DATUM = Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, -100], "weights": [1.0, float("nan")]})
PICTURED = ModelInput.from_ints([1]).append(ImageChunk.from_bytes(b"\x89PNG", "png", 2))
IMAGE_JSON = {"type": "image", "data": "iVBORw==", "format": "png", "expected_tokens": 2}
DATUM_JSON = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [2, -100], "dtype": "int64", "shape": [2]},
        "weights": {"data": [1.0, None], "dtype": "float32", "shape": [2]},
    },
}
ADAM_JSON = {
    "learning_rate": 0.0001,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-12,
    "weight_decay": 0.0,
    "grad_clip_norm": 1.0,
}


def loss_body(*data: Any, config: Any = None, top_k: int = 0) -> dict[str, Any]:
    return {"data": [*data], "loss_fn": "cross_entropy", "loss_fn_config": config, "top_k_logprobs": top_k}


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
    expected: list[tuple[str, dict[str, Any]]] = [
        ("forward", loss_body(DATUM_JSON)),
        ("forward_backward", loss_body(DATUM_JSON, DATUM_JSON, config={"skip_token_normalization": True})),
        ("forward", loss_body(DATUM_JSON, top_k=20)),
        ("optim_step", {"adam_params": ADAM_JSON}),
        ("save_state", {"name": "a", "ttl_seconds": None}),
        ("save_state", {"name": "b", "ttl_seconds": 60}),
        ("save_weights_for_sampler", {"name": "c", "bump_version": True}),
        ("save_weights_for_sampler", {"name": "d", "ttl_seconds": None, "bump_version": False}),
        ("load_state", {"path": "bt://loops:r0/weights/a"}),
        ("load_state_with_optimizer", {"path": "s3://bucket/a"}),
        ("init_trainer_server", {"lora_rank": 16, "base_model": MODEL}),
    ]
    assert [(seen.path.removeprefix("/trainer/"), seen.json) for seen in service.submitted()] == [
        (operation, body | {"run_id": "r1", "seq_id": seq_id, "model": MODEL})
        for seq_id, (operation, body) in enumerate(expected, start=2)
    ]


async def test_the_first_operation_of_a_new_trainer(client: ServiceClient, service: ScriptedService) -> None:
    await client.create_lora_training_client(MODEL, rank=8)
    [first] = service.submitted()
    assert first.path == "/trainer/init_trainer_server"
    assert first.json == {"lora_rank": 8, "base_model": MODEL, "seq_id": 1, "run_id": "r1", "model": MODEL}
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
    assert seen.json["data"][0]["loss_fn_inputs"].keys() == {"target_tokens", "logprobs", "advantages"}


async def test_images_and_routing_in_a_datum(service: ScriptedService, trainer: TrainingClient) -> None:
    ref = ExternalRef(uri="bt://loops:r1/sequences/o1", version=1)
    await trainer.forward([Datum(model_input=PICTURED, routed_experts_ref=ref)])
    [seen] = service.submitted()
    assert seen.json["data"] == [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1]}, IMAGE_JSON]},
            "loss_fn_inputs": {},
            "routed_experts_ref": {"uri": "bt://loops:r1/sequences/o1", "version": 1},
        }
    ]


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


async def test_what_a_seed_era_service_is_sent(client: ServiceClient, service: ScriptedService) -> None:
    [session] = service.seen
    assert session.json == {}, "the project is sent only when it was given"
    await client.create_lora_training_client(MODEL)
    [run] = service.seen_at("POST", "/v1/loops/runs")
    assert run.json == {
        "session_id": "s1",
        "base_model": MODEL,
        "max_seq_len": None,
        "lora_rank": 32,
        "seed": None,
        "scale_down_delay_seconds": 3600,
        "replicas": 1,
        "path": None,
        "reuse_from_session_id": None,
    }
    await client.create_sampling_client(MODEL)
    [sampler] = service.seen_at("POST", "/v1/loops/samplers")
    assert sampler.json == {"session_id": "s1", "base_model": MODEL, "max_seq_length": None, "model_path": None}


async def test_what_is_given_is_sent(service: ScriptedService, colour: Colour) -> None:
    options: dict[str, Any] = {"reuse_from_session_id": "s0", "availability_model": "spot"}
    async with colour.connected("p1", api_key=KEY, base_url=service.url, **options) as client:
        await client.create_lora_training_client(
            MODEL,
            16,
            7,
            max_seq_len=4096,
            scale_down_delay_seconds=60,
            replicas=2,
            path="bt://loops:r0/weights/a",
            name="mine",
            sampler_num_replicas=3,
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
        "availability_model": "spot",
        "sampler_num_replicas": 3,
    }


async def test_a_run_to_reuse_wins_over_a_session_to_reuse(service: ScriptedService) -> None:
    reuse = {"reuse_from_run_id": "r0", "reuse_from_session_id": "s0"}
    async with ServiceClient(api_key=KEY, base_url=service.url, **reuse) as client:
        await client.create_lora_training_client(MODEL)
    [run] = service.seen_at("POST", "/v1/loops/runs")
    assert (run.json["reuse_from_run_id"], run.json["reuse_from_session_id"]) == ("r0", None)


@pytest.mark.parametrize("team", ["research", "t1"], ids=["name", "id"])
async def test_a_team_owns_what_is_made(service: ScriptedService, colour: Colour, team: str) -> None:
    teams = [{"id": "t0", "name": "t2"}, {"id": "t1", "name": "research"}]
    made = {
        "sessions": {"session": {"id": "s1"}},
        "runs": {"run": service.run()},
        "samplers": {"sampler": service.sampler()},
    }
    service.always("GET", "/v1/teams", Say(body={"teams": teams}))
    for what, answer in made.items():
        service.always("POST", f"/v1/teams/t1/loops/{what}", Say(body=answer))
    async with colour.connected(api_key=KEY, base_url=service.url, team=team) as client:
        await client.provision_run(CreateRunRequest(session_id="s1", base_model=MODEL))
        await client.create_sampling_client(MODEL)
    posts = [seen.path for seen in service.seen if seen.method == "POST"]
    assert posts == [f"/v1/teams/t1/loops/{what}" for what in made]


# --- sampling ---

ALWAYS = {
    "prompt": [1, 2],
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "logprobs": 0,
    "return_tokens_as_token_ids": True,
    # Ids are read without parsing names; a service that does not know this key ignores it.
    "return_token_ids": True,
}


@pytest.mark.parametrize(
    ("arguments", "others"),
    [
        ({}, {}),
        (
            {"sampling_params": SamplingParams(max_tokens=5, seed=0, top_k=3, stop="\n")},
            {"max_tokens": 5, "seed": 0, "top_k": 3, "stop": "\n"},
        ),
        ({"sampling_params": SamplingParams(stop=["a", "b"])}, {"stop": ["a", "b"]}),
        ({"sampling_params": SamplingParams(stop=[7, 8])}, {"stop_token_ids": [7, 8]}),
        ({"sampling_params": SamplingParams(stop=[], top_k=-1)}, {}),
        ({"sampling_params": SamplingParams(stop="", top_k=0)}, {}),
        ({"include_prompt_logprobs": True}, {"prompt_logprobs": 0}),
        ({"topk_prompt_logprobs": 4}, {"prompt_logprobs": 4}),
        ({"sampling_params": SamplingParams(structured_outputs={"json": {}})}, {"structured_outputs": {"json": {}}}),
        ({"include_routed_experts": True}, {"include_routed_experts": True}),
        (
            {"prompt": PICTURED},
            {"prompt": [], "model_input_chunks": [{"type": "encoded_text", "tokens": [1]}, IMAGE_JSON]},
        ),
    ],
    ids=lambda arguments: ",".join(arguments),
)
async def test_sample_bodies(
    service: ScriptedService, sampler: SamplingClient, arguments: dict[str, Any], others: dict[str, Any]
) -> None:
    await sampler.sample(**{"prompt": [1, 2], **arguments})
    [seen] = service.seen_at("POST", "/sampler/sample")
    assert seen.json == ALWAYS | others


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

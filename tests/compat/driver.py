"""Uses the published client of the API as its documentation says; runs in an environment of its own.

`test_published_client.py` starts it with ``LOOPS_BASE_URL``, ``BASETEN_API_KEY``, ``TRAINER_URL`` and ``SAMPLER_URL``
set, and the base model as its argument. It prints one line for each part that worked.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from baseten.loops import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    ImageChunk,
    ModelInput,
    RemoteOpError,
    SamplingParams,
    ServiceClient,
    TensorData,
)
from baseten.loops.helpers.datum import attach_reference_logprobs

FEW = SamplingParams(max_tokens=4)


def tensor(values: list, dtype: str = "float32") -> TensorData:
    return TensorData(data=values, dtype=dtype, shape=[len(values)])


def example(tokens: list[int], **inputs: list[float]) -> Datum:
    targets = tensor([*tokens[1:], 7], "int64")
    given = {name: tensor(values) for name, values in inputs.items()}
    return Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs={"target_tokens": targets, **given})


def failure(call: Callable[[], object], kind: type[Exception] = Exception) -> str:
    """Return what a call that must fail says."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("it did not fail")


def done(part: str) -> None:
    print(f"ok {part}", flush=True)


def train(trainer) -> None:
    data = [example([1, 2, 3], weights=[0.0, 1.0, 1.0]), example([4, 5], weights=[1.0, 1.0])]
    forward = trainer.forward(data).result()
    assert [len(one["logprobs"].data) for one in forward.loss_fn_outputs] == [3, 2]
    step, optim = trainer.forward_backward(data, "cross_entropy"), trainer.optim_step(AdamParams(learning_rate=1e-2))
    assert math.isfinite(step.result().loss)
    assert optim.result().metrics["step"] == 1.0
    done("cross_entropy")
    on_policy = [example([1, 2, 3], logprobs=[-1.0, -2.0, -1.5], advantages=[0.0, 1.0, -1.0])]
    for loss, config in {
        "importance_sampling": None,
        "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        "cispo": None,
        "dro": {"beta": 0.1},
        "dppo": {"kl_tau": 0.001},
    }.items():
        assert math.isfinite(trainer.forward_backward(on_policy, loss, config).result().loss)
        done(loss)
    trainer.optim_step(AdamParams()).result()
    several = Datum(
        model_input=ModelInput.from_ints([1, 2]),
        loss_fn_inputs={
            "target_tokens": TensorData(data=[2, 3, 4, 5], dtype="int64", shape=[2, 2]),
            "weights": TensorData(data=[0.5, 0.5, 1.0, 0.0], dtype="float32", shape=[2, 2]),
        },
    )
    assert trainer.forward_backward([several]).result().loss_fn_outputs[0]["logprobs"].shape == [2, 2]
    masked = Datum(
        model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": tensor([-100, 3], "int64")}
    )
    scored = trainer.forward([masked]).result().loss_fn_outputs[0]["logprobs"].data
    assert scored[0] is None or math.isnan(scored[0])
    done("shapes and masks")
    trainer.optim_step(AdamParams()).result()


def direct_preferences(trainer) -> None:
    reference = trainer.save_weights_and_get_sampling_client("reference")
    pairs = attach_reference_logprobs(
        [example([1, 2, 3], weights=[0.0, 1.0, 0.0]), example([1, 2, 4], weights=[0.0, 1.0, 0.0])], reference
    )
    assert math.isfinite(trainer.forward_backward(pairs, "dpo", {"beta": 0.1}).result().loss)
    trainer.optim_step(AdamParams()).result()
    done("dpo")


def custom(trainer) -> None:
    try:
        import torch
    except ImportError:
        print("skipped forward_backward_custom: no torch in this environment", flush=True)
        return
    result = trainer.forward_backward_custom(
        [example([1, 2, 3])], lambda _, logprobs: (-torch.stack([one.sum() for one in logprobs]).sum(), {"mine": 1.0})
    ).result()
    assert result.metrics["mine"] == 1.0
    trainer.optim_step(AdamParams()).result()
    done("custom loss")


def save_and_load(service, trainer) -> str:
    state = trainer.save_state("state").result().path
    trainer.save_state("brief", ttl_seconds=3600).result()
    staged = trainer.save_weights_for_sampler("staged").result()
    assert trainer.optim_step(AdamParams()).result().metrics["step"] == staged.version + 1
    assert trainer.load_state(state).result().step == 0
    assert trainer.load_state_with_optimizer(state).result().step == staged.version
    done("save and load")
    fresh = service.create_training_client_from_state(state)
    resumed = service.create_training_client_from_state_with_optimizer(state)
    assert fresh.optim_step(AdamParams()).result().metrics["step"] == 1.0
    assert resumed.optim_step(AdamParams()).result().metrics["step"] == staged.version + 1
    fresh.close()
    resumed.close()
    done("training clients from a state")
    return staged.path


def sample(sampler, base_model: str) -> None:
    sampler.ensure_ready()
    prompt = ModelInput.from_ints([1, 2, 3])
    answer = sampler.sample(prompt, num_samples=2, sampling_params=FEW)
    assert len(answer.sequences) == 2
    assert all(len(one.tokens) == len(one.logprobs) <= 4 for one in answer.sequences)
    for params in (
        SamplingParams(max_tokens=4, temperature=0.0),
        SamplingParams(max_tokens=4, seed=7, top_k=5, top_p=0.9, temperature=0.7),
        SamplingParams(max_tokens=4, stop="a"),
        SamplingParams(max_tokens=4, stop=["a", "b"]),
        SamplingParams(max_tokens=4, stop=[1, 2]),
    ):
        assert sampler.sample(prompt, sampling_params=params).sequences
    scored = sampler.sample(prompt, 1, FEW, include_prompt_logprobs=True, topk_prompt_logprobs=3, affinity_key="group")
    assert scored.prompt_logprobs[0] is None
    assert len(scored.prompt_logprobs) == 3
    assert len(scored.topk_prompt_logprobs[1]) in (3, 4)  # with or without the token itself
    assert len(sampler.compute_logprobs(prompt)) == 3
    assert sampler.get_base_model() == sampler.discover_base_model_name() == base_model
    asyncio.run(sample_asynchronously(sampler, prompt))
    image = ModelInput(
        chunks=[EncodedTextChunk(tokens=[1]), ImageChunk.from_bytes(b"\x89PNG", "png", expected_tokens=2)]
    )
    assert "image" in failure(lambda: sampler.sample(image, sampling_params=FEW))
    done("sampling")


async def sample_asynchronously(sampler, prompt: ModelInput) -> None:
    answers = await asyncio.gather(*(sampler.sample_async(prompt, sampling_params=FEW) for _ in range(16)))
    assert len(answers) == 16


def list_and_download(service, trainer) -> None:
    listed = trainer.list_checkpoints()
    assert {one.checkpoint_id for one in listed} >= {"state", "brief", "staged"}
    assert len(service.list_checkpoints(trainer.run_id)) == len(listed)
    staged = next(one for one in listed if one.checkpoint_id == "staged")
    page = service.get_checkpoint_archive_url(staged.id, page_size=1)
    assert (len(page.presigned_urls), page.next_page_token) == (1, 1)
    with tempfile.TemporaryDirectory() as directory:
        downloaded = service.download_checkpoint(staged.id, dest_dir=Path(directory, "adapter"))
        assert downloaded.bytes_written == staged.size_bytes
        assert Path(directory, "adapter", "adapter_config.json").is_file()
    done("listing and download")


def use_local_mode(base_model: str) -> None:
    """What the published client can do without a control plane: it has no run id there, so it can save nothing."""
    service = ServiceClient.local(trainer_url=os.environ["TRAINER_URL"], sampler_url=os.environ["SAMPLER_URL"])
    trainer = service.create_lora_training_client(base_model, rank=4)
    assert math.isfinite(trainer.forward_backward([example([1, 2, 3])]).result().loss)
    assert trainer.optim_step(AdamParams()).result().metrics["step"] == 1.0
    assert service.create_sampling_client(base_model).sample(ModelInput.from_ints([1]), sampling_params=FEW).sequences
    trainer.close()
    done("local mode")


def main(base_model: str, *, serverless: bool) -> None:
    service = ServiceClient()
    assert base_model in {one.model_name for one in service.get_server_capabilities().supported_models}
    done("session")
    trainer = service.create_lora_training_client(base_model, rank=4, seed=1)
    assert trainer.get_info().lora_rank == 4
    trainer.health()
    done("run")
    train(trainer)
    direct_preferences(trainer)
    custom(trainer)
    if serverless:
        try:
            print(trainer.policy_version)
        except NotImplementedError:
            done("no policy version")
    else:
        assert trainer.policy_version > 0
    live = trainer.save_weights_and_get_sampling_client("live")
    sample(live, base_model)
    staged = save_and_load(service, trainer)
    pinned = trainer.create_sampling_client(staged)
    sample(pinned, base_model)
    sample(service.create_sampling_client(base_model), base_model)
    sample(service.create_sampling_client(model_path=staged), base_model)
    list_and_download(service, trainer)
    assert "nowhere" in failure(trainer.load_state("bt://loops:nowhere/weights/x").result, RemoteOpError)
    done("failures")
    trainer.close()
    use_local_mode(base_model)


if __name__ == "__main__":
    main(sys.argv[1], serverless="serverless" in sys.argv[2:])

"""Every member of a training client."""

from __future__ import annotations

from typing import Any

import pytest

from loops_async import (
    AdamParams,
    ClosedError,
    Datum,
    GetInfoResponse,
    InputError,
    ModelData,
    RemoteOpError,
    SaveWeightsResponse,
    ServerError,
    ServiceClient,
    TrainingClient,
    UnsupportedError,
)
from loops_local import LocalService
from tests.support.engines import WatchedEngine
from tests.support.work import example, scores, train, version_sampled


async def test_forward_scores_and_changes_nothing(trainer: TrainingClient, engine: WatchedEngine) -> None:
    output = await (await trainer.forward([example(1), example(2)]))

    assert [one["logprobs"].tolist() for one in output.loss_fn_outputs] == [
        scores([1, 20, 30, 40], version=0),
        scores([2, 20, 30, 40], version=0),
    ]
    assert output.loss == pytest.approx(output.metrics["loss"])
    optim = await (await trainer.optim_step(AdamParams()))
    assert optim.metrics is not None
    assert optim.metrics["grad_norm"] == 0.0
    assert engine.done[0] == ("forward", 1)


async def test_a_step_of_training(trainer: TrainingClient, engine: WatchedEngine) -> None:
    step = await trainer.forward_backward([example()])
    optim = await trainer.optim_step(AdamParams(learning_rate=0.5))

    (output,) = (await step).loss_fn_outputs
    assert output["logprobs"].tolist() == scores([1, 20, 30, 40], version=0)
    assert (await optim).metrics == {
        "step": 1.0,
        "learning_rate": 0.5,
        "lr": 0.5,
        "grad_norm": 1.0,
        "backward_passes": 1.0,
    }
    assert engine.done == [("forward_backward", 1), ("optim_step", 0.5)]


async def test_the_policy_version_is_asked_for_at_each_access(trainer: TrainingClient) -> None:
    assert await trainer.policy_version() == 0
    await train(trainer, steps=2)
    assert await trainer.policy_version() == 2


async def test_losses_and_their_settings_are_positional(trainer: TrainingClient) -> None:
    inputs: dict[str, Any] = {"target_tokens": [2, 3], "logprobs": [-0.5, -0.5], "advantages": [1.0, -1.0]}
    data = [Datum(model_input=[1, 2], loss_fn_inputs=inputs)]

    await (await trainer.forward_backward(data, "importance_sampling"))
    await (await trainer.forward_backward(data, "ppo", {"clip_low_threshold": 0.9}))
    output = await (await trainer.forward([example()], "cross_entropy", {"skip_token_normalization": True}))
    assert output.metrics["skip_token_normalization"] == 1.0


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "ppo"])
async def test_a_trainer_that_does_not_confirm_that_it_sums_is_told(
    trainer: TrainingClient, local: LocalService, loss_fn: Any
) -> None:
    inputs = {} if loss_fn == "cross_entropy" else {"logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]}
    data = [Datum(model_input=[1, 2], loss_fn_inputs=inputs)]
    config = {"skip_token_normalization": True}
    confirmed = await (await trainer.forward_backward(data, loss_fn, config))
    assert confirmed.metrics["skip_token_normalization"] == 1.0
    local.faults.answer("GET */operations/*", 200, {"status": "done", "result": {"metrics": {}}}, times=2)
    unconfirmed = await trainer.forward_backward(data, loss_fn, config)
    with pytest.raises(UnsupportedError, match=f"does not confirm skip_token_normalization for {loss_fn}"):
        await unconfirmed
    assert (await (await trainer.forward(data, loss_fn, config))).metrics == {}


async def test_saved_state_brings_weights_back_with_or_without_the_optimizer(trainer: TrainingClient) -> None:
    await train(trainer, steps=2)
    saved = await (await trainer.save_state("two-steps"))
    await train(trainer)

    assert saved == SaveWeightsResponse(mode="lora", path=f"bt://loops:{trainer.run_id}/weights/two-steps")
    assert (await (await trainer.load_state_with_optimizer(saved.path))).step == 2
    assert await trainer.policy_version() == 2
    assert (await (await trainer.load_state(saved.path))).step == 0
    assert await trainer.policy_version() == 0


async def test_publishing_lets_the_paired_sampler_serve_the_weights(trainer: TrainingClient) -> None:
    following = await trainer.save_weights_and_get_sampling_client()
    await train(trainer)
    published = await (await trainer.save_weights_for_sampler("one-step"))

    assert (published.version, published.path) == (1, f"bt://loops:{trainer.run_id}/sampler_weights/one-step")
    assert await version_sampled(following) == 1


async def test_staging_leaves_the_sampler_alone(trainer: TrainingClient) -> None:
    following = await trainer.save_weights_and_get_sampling_client()
    await train(trainer)
    staged = await (await trainer.save_weights_for_sampler("one-step", publish=False))

    assert staged.version == 1
    assert await version_sampled(following) == 0


async def test_beginning_again(trainer: TrainingClient) -> None:
    await train(trainer)
    begun = await (await trainer.init_trainer_server(4))

    assert (begun.step, begun.lora_rank) == (0, 4)
    assert await trainer.policy_version() == 0


async def test_what_is_known_of_a_run(trainer: TrainingClient, engine: WatchedEngine, service: ServiceClient) -> None:
    assert trainer.get_info() == GetInfoResponse(
        model_data=ModelData(model_name=engine.name, tokenizer_id=engine.name), model_name=engine.name, lora_rank=8
    )
    assert (await service.control_plane.get_run(trainer.run_id)).base_model == engine.name


async def test_health(trainer: TrainingClient, local: LocalService) -> None:
    await trainer.health()

    local.faults.answer(f"GET */trainers/{trainer.run_id}/health", 500, {"error": "out of memory"})
    with pytest.raises(ServerError, match="out of memory"):
        await trainer.health()


async def test_a_failed_operation_says_what_and_where(trainer: TrainingClient) -> None:
    missing = f"bt://loops:{trainer.run_id}/weights/missing"
    loading = await trainer.load_state(missing)

    with pytest.raises(RemoteOpError, match=f"no checkpoint '{missing}'") as raised:
        await loading
    error = raised.value
    assert (error.error_class, error.operation, error.run_id) == ("ValueError", "load_state", trainer.run_id)
    assert error.operation_id == loading.operation_id


async def test_a_closed_client_submits_nothing(trainer: TrainingClient) -> None:
    async with trainer:
        under_way = await trainer.forward([example()])
    with pytest.raises(ClosedError, match="closed"):
        await trainer.forward([example()])
    assert (await under_way).loss_fn_outputs


async def test_arguments_are_checked_before_anything_is_sent(trainer: TrainingClient, engine: WatchedEngine) -> None:
    with pytest.raises(InputError, match=r"data\[1\]\.loss_fn_inputs\['target_tokens'\].*2 positions"):
        await trainer.forward([example(), Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2]})])
    with pytest.raises(InputError, match="name"):
        await trainer.save_state("../elsewhere")
    with pytest.raises(InputError, match="weights"):
        await trainer.load_state(f"bt://loops:{trainer.run_id}/sampler_weights/a")
    await train(trainer)
    assert engine.done == [("forward_backward", 1), ("optim_step", AdamParams().learning_rate)]

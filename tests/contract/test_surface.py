"""The published contract: names, positional order and defaults, in both colours."""

from __future__ import annotations

import inspect
from inspect import Parameter, Signature
from types import ModuleType
from typing import Any

import pytest

import loops_async
import loops_sync

NAMES = """
    AdamParams Checkpoint CheckpointFile CheckpointFilesResponse CheckpointTarget Datum EncodedTextChunk
    ForwardBackwardFuture ForwardBackwardOutput GetInfoResponse ImageAssetPointerChunk ImageChunk
    InitTrainerServerResponse LoadWeightsResponse LoraAdapterConfig LossFnType ModelData ModelInput OperationFuture
    OptimStepResponse RemoteOpError SampledSequence SampleResponse SampleResult SampleTimeoutError
    SamplerTerminatedError SamplingClient SamplingParams SaveWeightsForSamplerResponse SaveWeightsResponse
    ServerCapabilities ServerShutdownError ServiceClient SupportedModel TensorData TrainingClient UnknownRequestError
    WandbConfig
"""

METHODS = {
    "ServiceClient": {
        "__init__": "training_project_id=None, *, api_key=None, base_url=None, reuse_from_session_id=None",
        "local": "*, trainer_url, sampler_url",
        "create_lora_training_client": (
            "base_model, rank=32, seed=None, timeout=600.0, ready_timeout=3600.0, wandb_config=None"
        ),
        "create_sampling_client": "base_model=None, timeout=300.0, ready_timeout=3600.0, model_path=None",
        "get_server_capabilities": "",
        "list_checkpoints": "run_id",
        "get_checkpoint_archive_url": "checkpoint_id, page_size=1000, page_token=0",
        "create_training_client_from_state": "path",
        "create_training_client_from_state_with_optimizer": "path",
    },
    "TrainingClient": {
        "forward": "data, loss_fn='cross_entropy', loss_fn_config=None",
        "forward_backward": "data, loss_fn='cross_entropy', loss_fn_config=None",
        "optim_step": "adam_params",
        "save_state": "name, ttl_seconds=None",
        "save_weights_for_sampler": "name",
        "save_weights_and_get_sampling_client": "name='default'",
        "load_state": "path",
        "load_state_with_optimizer": "path",
        "create_sampling_client": "model_path",
        "list_checkpoints": "",
        "get_checkpoint_archive_url": "checkpoint_id, page_size=1000, page_token=0",
        "get_tokenizer": "",
        "get_info": "",
        "init_trainer_server": "lora_rank",
        "health": "",
        "close": "",
    },
    "SamplingClient": {
        "sample": "prompt, num_samples=1, sampling_params=None, include_prompt_logprobs=False, topk_prompt_logprobs=0",
        "compute_logprobs": "prompt",
        "discover_base_model_name": "",
        "discover_adapter_name": "",
        "get_base_model": "",
        "get_tokenizer": "",
        "ensure_ready": "ready_timeout=None",
    },
    "OperationFuture": {"result": "timeout=None", "done": ""},
}

PROPERTIES = [
    ("ServiceClient", "session_id"),
    ("TrainingClient", "run_id"),
    ("TrainingClient", "policy_version"),
    ("OperationFuture", "operation_id"),
]

colours = pytest.mark.parametrize("module", [loops_async, loops_sync], ids=lambda module: module.__name__)


def shape(signature: Signature, kind: Any) -> list[tuple[str, Any]]:
    return [(one.name, one.default) for one in signature.parameters.values() if one.kind is kind and one.name != "self"]


@colours
@pytest.mark.parametrize(("owner", "method"), [(owner, method) for owner in METHODS for method in METHODS[owner]])
def test_signature(module: ModuleType, owner: str, method: str) -> None:
    published = inspect.signature(eval(f"lambda {METHODS[owner][method]}: None"))
    ours = inspect.signature(getattr(getattr(module, owner), method))

    assert shape(ours, Parameter.POSITIONAL_OR_KEYWORD) == shape(published, Parameter.POSITIONAL_OR_KEYWORD)
    known = shape(published, Parameter.KEYWORD_ONLY)
    named = shape(ours, Parameter.KEYWORD_ONLY)
    assert set(known) <= set(named)
    assert all(default is not Parameter.empty for name, default in named if (name, default) not in known)


@colours
def test_names(module: ModuleType) -> None:
    assert set(NAMES.split()) <= set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize(("owner", "name"), PROPERTIES)
def test_properties_of_the_blocking_client(owner: str, name: str) -> None:
    assert isinstance(inspect.getattr_static(getattr(loops_sync, owner), name), property)


@colours
@pytest.mark.parametrize(
    ("owner", "theirs", "ours"),
    [
        ("ServiceClient", "create_rest_client", "control_plane"),
        ("ServiceClient", "get_server_capabilities_async", "get_server_capabilities"),
        ("TrainingClient", "forward_backward_async", "forward_backward"),
        ("SamplingClient", "sample_async", "sample"),
        ("OperationFuture", "result_async", "result"),
        ("TrainingClient", "aclose", "close"),
        ("TrainingClient", "model_id", "run_id"),
        ("ServiceClient", "list_user_checkpoints", "list_all_checkpoints"),
        ("ControlPlane", "list_training_runs_async", "list_runs"),
    ],
)
def test_a_name_of_another_client_is_told_ours(module: ModuleType, owner: str, theirs: str, ours: str) -> None:
    kind = type(owner, (getattr(module, owner),), {"__del__": lambda _: None})  # it is never opened
    client: Any = kind.__new__(kind)
    with pytest.raises(AttributeError, match=f"^'{owner}' object has no attribute '{theirs}'; here it is '{ours}'$"):
        getattr(client, theirs)
    assert not hasattr(client, theirs)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing_async'$"):
        _ = client.nothing_async


@colours
@pytest.mark.parametrize(
    ("owner", "theirs", "hint"),
    [
        ("TrainingClient", "result", "this is the result itself, not a future of it"),
        ("SamplingClient", "result_async", "this is the result itself, not a future of it"),
        ("ControlPlane", "delete_checkpoint", "give ttl_seconds when you save it"),
        ("OperationFuture", "future", "`start` of loops_sync or loops_async returns a future that has it"),
    ],
)
def test_what_has_no_name_here_is_explained(module: ModuleType, owner: str, theirs: str, hint: str) -> None:
    kind = type(owner, (getattr(module, owner),), {"__del__": lambda _: None})
    client: Any = kind.__new__(kind)
    with pytest.raises(AttributeError, match=f"^'{owner}' object has no attribute '{theirs}'; .*{hint}$"):
        getattr(client, theirs)


def test_a_value_is_no_future_and_no_pydantic_model() -> None:
    answer: Any = loops_async.SampleResponse()
    with pytest.raises(AttributeError, match=r"no attribute 'result'; this is the result itself, not a future of it$"):
        answer.result()
    with pytest.raises(AttributeError, match=r"no attribute 'model_dump'; here it is 'to_dict'$"):
        answer.model_dump()
    assert not hasattr(answer, "anything")

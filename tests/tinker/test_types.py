"""Values are those that scripts know: names, defaults, copies."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from loops_tinker import types

WHEN = datetime(2026, 1, 2, tzinfo=UTC)
CHECKPOINT = types.Checkpoint(
    checkpoint_id="weights/a", checkpoint_type="training", time=WHEN, tinker_path="tinker://r/weights/a"
)
VALUES: list[Any] = [
    types.ModelInput.from_ints([1, 2]).append(types.ImageChunk(data=b"x", format="png", expected_tokens=2)),
    types.Datum(types.ModelInput.from_ints([1]), {"weights": [1.0]}),
    types.TensorData(data=[1, 2, 3, 4], dtype="int64", shape=[2, 2]),
    types.SamplingParams(max_tokens=3, stop=["\n"]),
    types.SampleResponse(sequences=[types.SampledSequence(tokens=[1], logprobs=[-1.0], stop_reason="stop")]),
    types.AdamParams(learning_rate=1e-3),
    types.ForwardBackwardOutput(loss_fn_output_type="x", loss_fn_outputs=[{}], metrics={"loss:sum": 1.0}),
    CHECKPOINT,
    types.TrainingRun(
        training_run_id="r",
        base_model="m",
        model_owner="o",
        is_lora=True,
        last_request_time=WHEN,
        last_checkpoint=CHECKPOINT,
    ),
    types.SampledProvenanceSpan(sequence_id="s", length=3),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_copied_pickled_and_replaced(value: Any) -> None:
    for twin in (
        copy.copy(value),
        copy.deepcopy(value),
        pickle.loads(pickle.dumps(value)),
        dataclasses.replace(value),
        value.model_copy(deep=True),
    ):
        assert twin == value
        assert type(twin) is type(value)
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)
    assert set(value.model_dump()) == {each.name for each in dataclasses.fields(value)}
    assert field in value.model_dump_json()


def test_defaults_are_those_of_tinker() -> None:
    assert types.AdamParams().model_dump() == {
        "learning_rate": 1e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-12,
        "weight_decay": 0.0,
        "grad_clip_norm": 0.0,
    }
    assert types.SamplingParams().model_dump(exclude_none=True) == {"temperature": 1, "top_k": -1, "top_p": 1}


def test_a_chunk_copies_its_tokens() -> None:
    tokens = [1, 2]
    chunk = types.EncodedTextChunk(tokens=tokens)
    tokens.clear()
    assert chunk.length == 2
    assert types.EncodedTextChunk(tokens=np.array([1, 2])).tokens == [1, 2]


def test_append_int_adds_a_chunk() -> None:
    appended = types.ModelInput.from_ints([1]).append_int(2)
    assert (len(appended.chunks), appended.to_ints(), appended.length) == (2, [1, 2], 2)
    assert types.ModelInput.empty().length == 0
    with pytest.raises(ValueError, match="text only"):
        appended.append(types.ImageChunk(data=b"x", format="png")).to_ints()
    with pytest.raises(ValueError, match=r"chunks\[0\]"):
        types.ModelInput(chunks=[3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("given", "dtype"), [(np.int32, "int64"), (np.int64, "int64"), (np.float16, "float32"), (np.float64, "float32")]
)
def test_arrays_become_one_of_two_dtypes(given: type, dtype: str) -> None:
    array = np.array([[1, 2], [3, 4]], dtype=given)
    tensor = types.TensorData.from_numpy(array)
    array[:] = 0
    assert (tensor.dtype, tensor.shape, tensor.data, tensor.tolist()) == (dtype, [2, 2], [1, 2, 3, 4], [[1, 2], [3, 4]])
    assert tensor.to_numpy().dtype == dtype


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="whole or floats"):
        types.TensorData.from_numpy(np.array([True]))
    with pytest.raises(ValueError, match="flat"):
        types.TensorData(data=[[1, 2]], dtype="int64")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="int64 or float32"):
        types.TensorData(data=[1], dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        types.TensorData(data=[1], dtype="int64").nothing  # type: ignore[attr-defined]  # noqa: B018 - looks it up


def test_a_sparse_tensor_is_filled() -> None:
    tensor = types.TensorData(
        data=[5.0, 6.0], dtype="float32", shape=[2, 3], sparse_crow_indices=[0, 1, 2], sparse_col_indices=[2, 0]
    )
    assert tensor.tolist() == [[0, 0, 5], [6, 0, 0]]
    assert tensor.tolist(pad_value=-1) == [[-1, -1, 5], [6, -1, -1]]


@pytest.mark.torch
def test_tensors_of_torch() -> None:
    import torch

    half = types.TensorData.from_torch(torch.tensor([1.5, 2.5], dtype=torch.bfloat16, requires_grad=True))
    assert (half.dtype, half.tolist()) == ("float32", [1.5, 2.5])
    sparse = types.TensorData.from_torch_sparse(torch.tensor([[0, 0, 5], [6, 0, 0]]))
    assert (sparse.data, sparse.sparse_crow_indices, sparse.sparse_col_indices) == ([5, 6], [0, 1, 2], [2, 0])
    assert sparse.to_torch().tolist() == [[0, 0, 5], [6, 0, 0]]
    assert types.Datum(types.ModelInput.from_ints([1]), {"any": torch.ones(1)}).loss_fn_inputs["any"].tolist() == [1.0]


def test_lists_of_a_datum_need_a_known_name() -> None:
    prompt = types.ModelInput.from_ints([1, 2])
    datum = types.Datum(prompt, {"target_tokens": [2, 3], "weights": [1, 0], "mine": np.ones(2)})
    assert {name: tensor.dtype for name, tensor in datum.loss_fn_inputs.items()} == {
        "target_tokens": "int64",
        "weights": "float32",
        "mine": "float32",
    }
    with pytest.raises(KeyError, match="mine"):
        types.Datum(prompt, {"mine": [1.0, 2.0]})


def test_spans_must_cover_a_datum() -> None:
    datum = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
    prompt = types.PromptProvenanceSpan(sequence_id="s", length=2)
    sampled = types.SampledProvenanceSpan(sequence_id="s", length=1)
    spanned = datum.with_provenance(model_input=[prompt, sampled], loss_fn_inputs=[prompt, sampled])
    assert spanned.model_input_spans == (prompt, sampled)
    assert dataclasses.replace(spanned, loss_fn_inputs={}).loss_fn_input_spans == (prompt, sampled)
    with pytest.raises(ValueError, match="must cover 3 positions; they cover 2"):
        datum.with_provenance(model_input=[prompt], loss_fn_inputs=[prompt, sampled])
    with pytest.raises(ValueError, match="must not be empty"):
        types.PromptProvenanceSpan(sequence_id="", length=1)


def test_a_sequence_has_lists_and_arrays() -> None:
    sequence = types.SampledSequence(tokens_np=np.array([1, 2]), logprobs_np=np.array([-1.0, -0.5]), stop_reason="stop")
    assert (sequence.tokens, sequence.logprobs) == ([1, 2], [-1.0, -0.5])
    assert sequence.tokens_np.dtype == np.int32
    assert sequence.logprobs_np is not None
    assert sequence.logprobs_np.dtype == np.float32
    with pytest.raises(TypeError, match="tokens"):
        types.SampledSequence(stop_reason="stop")
    response = types.SampleResponse(sequences=[sequence], prompt_logprobs=[None, -1.0])
    assert response.prompt_logprobs_np is not None
    assert np.isnan(response.prompt_logprobs_np[0])
    assert response.topk_prompt_logprobs_np is None


def test_the_likeliest_tokens_have_lists_and_arrays() -> None:
    lists: types.TopkLists = [None, [(7, -0.5)], [(3, -0.25), (2, -1.5)]]
    arrays = types.SampleResponse(sequences=[], topk_prompt_logprobs=lists).topk_prompt_logprobs_np
    assert arrays is not None
    assert (arrays.token_ids.dtype, arrays.logprobs.dtype) == (np.int32, np.float32)
    assert arrays.token_ids.tolist() == [[0, 0], [7, 0], [3, 2]]
    assert arrays.logprobs.tolist() == [[-99999.0, -99999.0], [-0.5, -99999.0], [-0.25, -1.5]]
    nothing = types.SampleResponse(sequences=[], topk_prompt_logprobs=[None]).topk_prompt_logprobs_np
    assert nothing is not None
    assert nothing.token_ids.shape == (1, 0)


@pytest.mark.parametrize("path", ["tinker://r/x", "x", "tinker://r/other/x", "bt://loops:r/weights/x"])
def test_a_path_has_three_parts(path: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid tinker path: {path}"):
        types.ParsedCheckpointTinkerPath.from_tinker_path(path)
    parsed = types.ParsedCheckpointTinkerPath.from_tinker_path("tinker://r/sampler_weights/x")
    assert (parsed.training_run_id, parsed.checkpoint_type, parsed.checkpoint_id) == (
        "r",
        "sampler",
        "sampler_weights/x",
    )

"""What was sampled, as numpy arrays; and numpy arrays that are given, as what is sent."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from loops_async import Datum, EncodedTextChunk, InputError, SampledSequence, TensorData
from loops_async._arguments import checked_data
from loops_async._operations.batch import Batch
from loops_async.protocol import ForwardBody, encode
from loops_async.types.array_numbers import ArrayNumbers, kept_numbers


def test_a_completion_is_lists_and_the_same_as_arrays() -> None:
    sequence = SampledSequence(tokens=[5, 6, 7], logprobs=[-0.5, -1.0, -1.5])
    assert sequence.tokens_array.dtype == np.int64
    assert sequence.tokens_array.tolist() == sequence.tokens
    assert sequence.logprobs_array.dtype == np.float64
    assert sequence.logprobs_array.tolist() == sequence.logprobs


def test_arrays_are_made_once_and_shared_so_they_are_read_only() -> None:
    sequence = SampledSequence(tokens=[1, 2], logprobs=[-1.0, -2.0])
    assert np.shares_memory(sequence.logprobs_array, sequence.logprobs_array[1:])
    assert sequence.logprobs_array is sequence.logprobs_array
    assert sequence.tokens_array is sequence.tokens_array
    with pytest.raises(ValueError, match="read-only"):
        sequence.logprobs_array += 1.0


def test_missing_logprobs_are_nan() -> None:
    assert np.isnan(SampledSequence(tokens=[1, 2]).logprobs_array).tolist() == [True, True]


def test_arrays_do_not_travel_and_do_not_count_when_comparing() -> None:
    asked, other = SampledSequence(tokens=[1], logprobs=[-1.0]), SampledSequence(tokens=[1], logprobs=[-1.0])
    array = asked.tokens_array
    assert asked == other
    assert len(pickle.dumps(asked)) == len(pickle.dumps(other))
    assert pickle.loads(pickle.dumps(asked)).tokens_array is not array


# --- arrays that are given -------------------------------------------------------------------------------------------

NUMBERS: Final = arrays.arrays(
    dtype=st.sampled_from(["float32", "float64", "float16", "int32", "int64", "int8", "bool"]),
    shape=arrays.array_shapes(max_dims=3, max_side=4, min_side=1),
)


@given(array=NUMBERS, tokens=arrays.arrays(st.sampled_from(["int64", "int32"]), st.integers(1, 9)))
def test_arrays_are_on_the_wire_what_their_lists_are(array: Any, tokens: Any) -> None:
    """Byte for byte, and equal, whoever reads them."""
    listed = TensorData(data=array.ravel().tolist(), dtype=str(array.dtype), shape=list(array.shape))
    from_lists = Datum(model_input=tokens.tolist(), loss_fn_inputs={"x": listed})
    for order in (array, np.asfortranarray(array)):
        datum = Datum(model_input=tokens, loss_fn_inputs={"x": order})
        assert encode(datum) == encode(from_lists)
        assert datum.to_json() == from_lists.to_json()
        assert repr(datum) == repr(from_lists)
        has_nan = array.dtype.kind == "f" and bool(np.isnan(array).any())
        for other in (datum, pickle.loads(pickle.dumps(datum)), copy.deepcopy(datum)):
            assert (other == from_lists) is not has_nan
            assert other.model_input.to_ints() == tokens.tolist()
            np.testing.assert_array_equal(other.loss_fn_inputs["x"].to_numpy(), array)


@given(array=NUMBERS)
def test_arrays_are_checked_as_their_lists_are(array: Any) -> None:
    def problem(logprobs: Any) -> str | None:
        inputs = {"logprobs": logprobs, "advantages": np.ones(len(array))}
        try:
            list(checked_data([Datum(model_input=[1] * len(array), loss_fn_inputs=inputs)], "ppo"))
        except InputError as error:
            return str(error)
        return None

    listed = TensorData(data=array.ravel().tolist(), dtype=str(array.dtype), shape=list(array.shape))
    with np.errstate(all="raise"):
        assert problem(array) == problem(listed)


def test_an_array_that_is_given_may_be_changed_at_once() -> None:
    tokens, weights = np.array([1, 2, 3]), np.array([0.0, 1.0, 2.0], np.float32)
    datum = Datum(model_input=tokens, loss_fn_inputs={"weights": weights})
    tokens[:], weights[:] = 0, 0
    assert datum.model_input.to_ints() == [1, 2, 3]
    assert datum.loss_fn_inputs["weights"].data == [0.0, 1.0, 2.0]


def test_a_field_that_was_given_an_array_is_a_list_to_all_who_read_it() -> None:
    tensor, chunk = TensorData.of(np.array([[1, 2], [3, 4]])), EncodedTextChunk(np.array([5, 6]))
    assert type(tensor.data) is type(chunk.tokens) is list
    assert tensor.data is tensor.data
    assert (tensor.tolist(), chunk.tokens) == ([[1, 2], [3, 4]], [5, 6])
    assert type(TensorData(data=np.array([1.5]), dtype="float64", shape=[1]).data[0]) is float  # type: ignore[arg-type] - it is taken, too


def test_a_masked_array_is_not_taken_for_its_numbers() -> None:
    masked = np.ma.masked_array([1.0, 2.0], mask=[False, True])
    assert TensorData.of(masked).data[0] == 1.0
    assert math.isnan(TensorData.of(masked).data[1] or 0.0)


async def test_a_batch_of_arrays_is_arrays_until_it_is_encoded() -> None:
    """Checking and encoding it makes no list that stays."""
    inputs = {
        "target_tokens": np.arange(4),
        "logprobs": np.full(4, -1.0, np.float32),
        "advantages": np.array([1.0, 0.0, 1.0, 1.0], np.float32),
    }
    data = [Datum(model_input=np.arange(4), loss_fn_inputs=inputs)]
    body = ForwardBody(data=[], loss_fn="ppo")
    encoded = await Batch("forward_backward", checked_data(data, "ppo"), body).encode()
    assert encoded.trained_tokens == 3
    held = [tensor.numbers for tensor in data[0].loss_fn_inputs.values()]
    held.append(kept_numbers(data[0].model_input.chunks[0], "tokens"))
    assert {type(each) for each in held} == {ArrayNumbers}

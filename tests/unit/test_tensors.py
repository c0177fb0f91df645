"""Tensors from whatever holds numbers, to the wire and back."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from loops_async import InputError, TensorData, protocol


class TorchLike:
    """What a torch tensor shows of itself, without torch."""

    def __init__(self, values: Any, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape
        self._values = values

    def tolist(self) -> Any:
        return self._values

    def detach(self) -> TorchLike:
        return self


@pytest.mark.parametrize(
    ("given_", "dtype", "shape", "data"),
    [
        ([1, 2, 3], "int64", [3], [1, 2, 3]),
        ([1, 2.5], "float32", [2], [1, 2.5]),
        ([True, False], "bool", [2], [True, False]),
        ((1, 2), "int64", [2], [1, 2]),
        ([[1, 2], [3, 4], [5, 6]], "int64", [3, 2], [1, 2, 3, 4, 5, 6]),
        ([[[1.0], [2.0]]], "float32", [1, 2, 1], [1.0, 2.0]),
        ([], "int64", [0], []),
        ([[], []], "int64", [2, 0], []),
        ([np.int64(7), np.int64(8)], "int64", [2], [7, 8]),
        ([np.float32(0.5), 1], "float32", [2], [0.5, 1]),
        ([np.float64(0.5)], "float32", [1], [0.5]),
        ([np.bool_(True)], "bool", [1], [True]),
        (np.arange(6, dtype=np.int32).reshape(2, 3), "int32", [2, 3], [0, 1, 2, 3, 4, 5]),
        (np.zeros((0, 3)), "float64", [0, 3], []),
        (np.float32(1.5), "float32", [1], [1.5]),
        (TorchLike([[1.0, 2.0]], "torch.bfloat16", (1, 2)), "bfloat16", [1, 2], [1.0, 2.0]),
        (TorchLike(3, "torch.int64", ()), "int64", [1], [3]),
        ([TorchLike(3, "torch.int64", ()), 4], "int64", [2], [3, 4]),
    ],
)
def test_made_of(given_: Any, dtype: str, shape: list[int], data: list[Any]) -> None:
    tensor = TensorData.of(given_)
    assert (tensor.dtype, tensor.shape, tensor.data) == (dtype, shape, data)
    assert {type(x) for x in tensor.data} <= {bool, int, float}, "the wire knows Python's numbers only"


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ([[1, 2], [3]], "same length of 2"),
        ([[1, 2], 3], "same length of 2"),
        ([1, [2, 3]], "same length"),
        ([[[1]], [2]], "same length of 1"),
        (["a"], "expected numbers"),
        ([None, 1.0], "expected numbers"),
        ([1, object()], "expected numbers"),
        ("12", "got str"),
        (5, "got int"),
        (None, "got NoneType"),
        ({"a": 1}, "got dict"),
        (np.zeros(2, dtype=np.uint8), "'uint8'"),
        (np.zeros(2, dtype=complex), "'complex128'"),
    ],
)
def test_refused(given_: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        TensorData.of(given_, path="loss_fn_inputs['weights']")
    assert refused.value.path == "loss_fn_inputs['weights']"


def test_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"bfloat16, bool, float16.*got 'float8'"):
        TensorData.of([1.0], "float8")


@given(
    arrays.arrays(
        dtype=st.sampled_from(["float32", "float64", "int32", "int64", "int8", "bool"]),
        shape=arrays.array_shapes(max_dims=3, max_side=4, min_side=1),
    )
)
def test_numpy_survives_the_wire(array: np.ndarray[Any, Any]) -> None:
    array = np.where(np.isinf(array), 0, array).astype(array.dtype)  # JSON has no infinity
    sent = protocol.encode(TensorData.from_numpy(array))
    back = msgspec.json.decode(sent, type=TensorData)
    assert back.to_numpy().dtype == array.dtype
    np.testing.assert_array_equal(back.to_numpy(), array)
    np.testing.assert_array_equal(np.array(back.tolist(), dtype=array.dtype), array)


def test_nan_travels_as_null_both_ways() -> None:
    sent = protocol.encode(TensorData.of([1.0, math.nan]))
    assert msgspec.json.decode(sent) == {"data": [1.0, None], "dtype": "float32", "shape": [2]}
    back = msgspec.json.decode(sent, type=TensorData)
    assert back.data[0] == 1.0
    assert isinstance(back.data[1], float)
    assert math.isnan(back.data[1])


def test_null_in_an_int_tensor_is_not_made_a_float() -> None:
    assert msgspec.json.decode(b'{"data":[1,null],"dtype":"int64","shape":[2]}', type=TensorData).data == [1, None]


def test_from_list_flattens() -> None:
    # The published client keeps nested input nested, which no trainer can read.
    assert TensorData.from_list([[1, 2], [3, 4]]).data == [1, 2, 3, 4]
    assert TensorData.from_list([[1, 2], [3, 4]]).dtype == "float32"


def test_of_a_tensor_is_itself_or_the_same_with_another_dtype() -> None:
    tensor = TensorData.of([1, 2])
    assert TensorData.of(tensor) is tensor
    assert TensorData.of(tensor, "float32") == TensorData(data=[1, 2], dtype="float32", shape=[2])


def test_from_torch_detaches() -> None:
    detached: list[bool] = []

    class Attached(TorchLike):
        def detach(self) -> TorchLike:
            detached.append(True)
            return self

    assert TensorData.from_torch(Attached([1.0], "torch.float32", (1,))).data == [1.0]  # type: ignore[arg-type]
    assert detached


def test_bfloat16_reads_as_float32_in_numpy() -> None:
    assert TensorData(data=[1.5], dtype="bfloat16", shape=[1]).to_numpy().dtype == np.float32


@pytest.mark.parametrize("value", [[1.5], np.array([1.5]), TensorData.of([1.5])], ids=repr)
def test_fractions_are_not_named_integers(value: Any) -> None:
    with pytest.raises(InputError, match="which int64 does not express"):
        TensorData.of(value, "int64")

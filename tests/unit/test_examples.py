"""Training examples and prompts as users make them."""

from __future__ import annotations

import re
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from loops_async import (
    Datum,
    EncodedTextChunk,
    ExternalRef,
    ImageAssetPointerChunk,
    ImageChunk,
    InputError,
    ModelInput,
    TensorData,
    protocol,
)


def on_the_wire(value: Any) -> Any:
    return msgspec.json.decode(protocol.encode(value))


@pytest.mark.parametrize(
    "tokens",
    [
        [5, 6, 7],
        (5, 6, 7),
        range(5, 8),
        np.array([5, 6, 7]),
        np.array([5, 6, 7], dtype=np.int32),
        list(np.arange(5, 8)),
    ],
    ids=["list", "tuple", "range", "int64 array", "int32 array", "list of numpy ints"],
)
def test_tokens_of_every_kind(tokens: Any) -> None:
    made = ModelInput.from_ints(tokens)
    assert made == ModelInput([EncodedTextChunk([5, 6, 7])])
    assert on_the_wire(made) == {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
    assert Datum(model_input=tokens).model_input == made


@pytest.mark.parametrize(
    "tokens",
    ["hello", b"hello", 5, None, [1.5], ["a"], [True], [[1, 2]], np.array([1.0]), np.array([[1, 2]]), np.int64(3)],
    ids=repr,
)
def test_what_is_not_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(InputError, match="token ids"):
        ModelInput.from_ints(tokens)
    with pytest.raises(InputError, match="token ids"):
        Datum(model_input=tokens)


class Batch(UserDict[str, Any]):
    """As a tokenizer of transformers returns it."""


@pytest.mark.parametrize(
    ("tokens", "hint"),
    [
        (Batch(input_ids=[1], attention_mask=[1]), 'got Batch; give its ["input_ids"]'),
        ({"input_ids": [1]}, 'got dict; give its ["input_ids"]'),
        (SimpleNamespace(ids=[1]), "give its .ids"),
        ("hello", "got str; encode it first"),
        ([[1, 2]], "got list; this is a batch: give one row"),
        (np.array([[1, 2]]), "got list; this is a batch: give one row"),
    ],
)
def test_where_the_tokens_are(tokens: Any, hint: str) -> None:
    with pytest.raises(InputError, match=re.escape(hint)) as refused:
        Datum(model_input=tokens)
    assert refused.value.path == "model_input"


def test_what_is_sent_does_not_change_with_what_was_given() -> None:
    tokens, inputs = [1, 2], {"target_tokens": TensorData.of([2, 3])}
    chunk, datum = EncodedTextChunk(tokens), Datum(model_input=tokens, loss_fn_inputs=inputs)
    tokens.clear()
    inputs.clear()
    assert chunk.tokens == [1, 2]
    assert datum.model_input.to_ints() == [1, 2]
    assert datum.loss_fn_inputs["target_tokens"].data == [2, 3]


def test_a_chunk_holds_plain_token_ids() -> None:
    assert EncodedTextChunk(np.array([1, 2])).tokens == [1, 2]
    assert [type(token) for token in EncodedTextChunk([np.int64(1)]).tokens] == [int]  # type: ignore[list-item]
    with pytest.raises(InputError, match="got float"):
        EncodedTextChunk(np.array([1.5]))


@pytest.mark.parametrize(
    ("changes", "path"),
    [({"data": "text"}, "data"), ({"format": "gif"}, "format"), ({"expected_tokens": 1.5}, "expected_tokens")],
)
def test_rules_of_an_image_chunk(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(InputError) as refused:
        ImageChunk(**({"data": b"", "format": "png", "expected_tokens": 1} | changes))
    assert refused.value.path == path


def test_an_image_chunk_holds_plain_values() -> None:
    chunk = ImageChunk(data=bytearray(b"x"), format="png", expected_tokens=np.int64(2))  # type: ignore[arg-type]
    assert (chunk.data, chunk.expected_tokens, type(chunk.expected_tokens)) == (b"x", 2, int)


def test_model_input_is_a_value() -> None:
    first = ModelInput.from_ints([1])
    longer = first.append_int(2)
    assert (first.to_ints(), longer.to_ints()) == ([1], [1, 2])
    assert len(longer.chunks) == 1, "a token joins the text before it"
    assert ModelInput.empty().append_int(3).to_ints() == [3]
    assert (ModelInput.empty().length, longer.length) == (0, 2)


def test_images_take_the_positions_that_they_expect() -> None:
    image = ImageChunk.from_bytes(b"\x89PNG", "png", expected_tokens=7)
    mixed = ModelInput.from_ints([1, 2]).append(image).append_int(3)
    assert mixed.length == 10
    assert mixed.has_images
    assert [type(chunk).__name__ for chunk in mixed.chunks] == ["EncodedTextChunk", "ImageChunk", "EncodedTextChunk"]
    with pytest.raises(TypeError, match="ImageChunk"):
        mixed.to_ints()
    assert on_the_wire(image) == {"type": "image", "data": "iVBORw==", "format": "png", "expected_tokens": 7}
    assert msgspec.json.decode(protocol.encode(mixed), type=ModelInput) == mixed
    assert image.to_bytes() == b"\x89PNG"


@pytest.mark.parametrize(("fmt", "tokens", "path"), [("gif", 1, "fmt"), ("png", 0, "expected_tokens")])
def test_image_rules(fmt: Any, tokens: int, path: str) -> None:
    with pytest.raises(InputError) as refused:
        ImageChunk.from_bytes(b"", fmt, tokens)
    assert refused.value.path == path


def test_asset_pointers_cannot_be_made() -> None:
    with pytest.raises(InputError, match="ImageChunk instead"):
        ImageAssetPointerChunk("somewhere")


def test_datum_takes_lists_and_arrays() -> None:
    datum = Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3], "weights": np.array([0.0, 1.0])})
    assert datum.loss_fn_inputs == {
        "target_tokens": TensorData(data=[2, 3], dtype="int64", shape=[2]),
        "weights": TensorData(data=[0.0, 1.0], dtype="float64", shape=[2]),
    }


def test_datum_on_the_wire() -> None:
    # A seed-era service does not know routed_experts_ref, so it is sent only when there is one.
    plain = Datum(model_input=[1], loss_fn_inputs={"target_tokens": [2]})
    assert on_the_wire(plain) == {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
        "loss_fn_inputs": {"target_tokens": {"data": [2], "dtype": "int64", "shape": [1]}},
    }
    routed = Datum(model_input=[1], routed_experts_ref=ExternalRef(uri="bt://x", version=1))
    assert on_the_wire(routed)["routed_experts_ref"] == {"uri": "bt://x", "version": 1}
    for datum in (plain, routed):
        assert msgspec.json.decode(protocol.encode(datum), type=Datum) == datum


@pytest.mark.parametrize("inputs", [None, [1, 2], "weights"])
def test_loss_inputs_must_be_named(inputs: Any) -> None:
    with pytest.raises(InputError, match="loss_fn_inputs: expected a dict"):
        Datum(model_input=[1], loss_fn_inputs=inputs)


def test_a_bad_tensor_is_named() -> None:
    with pytest.raises(InputError) as refused:
        Datum(model_input=[1], loss_fn_inputs={"weights": [[1.0], []]})
    assert refused.value.path == "loss_fn_inputs['weights']"

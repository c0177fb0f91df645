"""Splitting, streaming and decoding of large bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loops_async import Datum, InputError, TensorData
from loops_async._http import body as sliced
from loops_async._http.body import Body
from loops_async._operations import batch
from loops_async._operations.batch import DatumArray, encode_data
from loops_async._operations.results import decode_output

LIMIT = 2_000
OVERHEAD = 50


def datum_of(size: int) -> Datum:
    """Return a datum that takes about `size` bytes."""
    return Datum(model_input=[1] * max(1, (size - 80) // 2))


async def split(sizes: list[int], group: int) -> tuple[list[Datum], list[DatumArray]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "MAX_REQUEST_BYTES", LIMIT)
        data = [datum_of(size) for size in sizes]
        return data, await encode_data(data, group=group, overhead=OVERHEAD)


def body_size(datums: Sequence[Datum]) -> int:
    return OVERHEAD + len(b",".join(map(msgspec.json.encode, datums)))


@given(st.lists(st.integers(80, 900), min_size=1, max_size=30), st.sampled_from([1, 2]))
def test_split_in_order_into_as_few_as_fit(sizes: list[int], group: int) -> None:
    sizes = sizes if group == 1 else [size for size in sizes for _ in range(2)]
    data, arrays = asyncio.run(split(sizes, group))
    bodies = [msgspec.json.decode(array.json, type=list[Datum]) for array in arrays]
    assert [one for body in bodies for one in body] == data
    assert [array.count for array in arrays] == [len(body) for body in bodies]
    assert all(len(body) % group == 0 and body for body in bodies), "neighbours of a group stay together"
    assert all(body_size(body) <= LIMIT for body in bodies)
    for body, following in pairwise(bodies):
        assert body_size(body + following[:group]) > LIMIT, "there was room for one more group"


async def test_a_batch_that_fits_exactly_is_one_body() -> None:
    data = [datum_of(300)] * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "MAX_REQUEST_BYTES", body_size(data))
        assert len(await encode_data(data, group=1, overhead=OVERHEAD)) == 1
        patch.setattr(batch, "MAX_REQUEST_BYTES", body_size(data) - 1)
        assert [array.count for array in await encode_data(data, group=1, overhead=OVERHEAD)] == [3, 1]


@pytest.mark.parametrize(
    ("sizes", "group", "path"),
    [([3_000], 1, "data[0]"), ([100, 100, 3_000], 1, "data[2]"), ([100, 100, 1_200, 1_200], 2, "data[2]")],
)
async def test_one_group_that_is_too_large_is_named(sizes: list[int], group: int, path: str) -> None:
    with pytest.raises(InputError, match=r"bytes of JSON; one request holds at most") as refused:
        await split(sizes, group)
    assert refused.value.path == path


async def test_a_value_that_json_has_no_word_for_is_named() -> None:
    strange = Datum(model_input=[1], loss_fn_inputs={"x": TensorData(data=[object()], dtype="int64", shape=[1])})  # type: ignore[list-item]
    with pytest.raises(InputError, match="object") as refused:
        await encode_data([datum_of(100), strange], group=1, overhead=0)
    assert refused.value.path == "data[1]"


async def turns_taken_by_others(work: Any) -> int:
    """Return how often another task got its turn while `work` was done."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await work
    task.cancel()
    await asyncio.wait([task])
    return turns


async def test_encoding_lets_others_in_between_datums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced, "SLICE_SECONDS", 0.0)
    assert await turns_taken_by_others(encode_data([datum_of(100)] * 50, group=1, overhead=0)) >= 50


async def test_decoding_lets_others_in_between_datums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced, "SLICE_SECONDS", 0.0)
    one = {"logprobs": {"data": [1.0], "dtype": "float32", "shape": [1]}}
    raw = json.dumps({"loss_fn_outputs": [one] * 50}).encode()
    assert await turns_taken_by_others(decode_output(raw)) >= 50


async def test_a_short_slice_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced, "SLICE_SECONDS", 3600.0)
    assert await turns_taken_by_others(encode_data([datum_of(100)] * 50, group=1, overhead=0)) <= 2


async def test_sending_lets_others_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(sliced, "SEND_BYTES", 1)

    async def send() -> None:
        async for _ in Body(b"x" * 50).stream():
            pass

    assert await turns_taken_by_others(send()) >= 50


@given(st.lists(st.binary(max_size=20), max_size=20), st.integers(1, 9))
@settings(max_examples=25)
def test_pieces_know_their_size_and_can_be_sent_twice(parts: list[bytes], at_once: int) -> None:
    async def sent() -> bytes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sliced, "SEND_BYTES", at_once)
            return b"".join([part async for part in pieces.stream()])

    pieces = Body(*parts)
    assert pieces.size == sum(map(len, parts))
    assert asyncio.run(sent()) == asyncio.run(sent()) == b"".join(parts)

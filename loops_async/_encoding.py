"""Large bodies, encoded and decoded in slices between which the event loop breathes.

msgspec holds the interpreter while it encodes, so a worker thread would not help: a batch is encoded datum by datum
instead, and sent from where it was encoded, so that a body never exists twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, TypeVar

import msgspec

from .errors import InputError
from .protocol import MAX_REQUEST_BYTES, encode_into
from .types import Datum, ForwardBackwardOutput, OptimStepResponse, TensorData

T = TypeVar("T")

SLICE_SECONDS: Final = 0.002
"""Work this long without a break at most, unless a single datum takes longer."""

SEND_BYTES: Final = 256 * 1024
"""Hand this much to the network at a time."""


class Breather:
    """Gives the event loop a turn whenever a slice of work has been done."""

    def __init__(self) -> None:
        self._resumed = time.perf_counter()

    async def breathe(self) -> None:
        """Let others run if the slice is over."""
        if time.perf_counter() - self._resumed >= SLICE_SECONDS:
            await asyncio.sleep(0)
            self._resumed = time.perf_counter()


class Pieces:
    """A request body in pieces."""

    __slots__ = ("parts", "size")

    def __init__(self, *parts: bytes | bytearray) -> None:
        self.parts = parts
        self.size = sum(map(len, parts))

    async def stream(self) -> AsyncIterator[memoryview]:
        """Yield the pieces, cut but not copied; may be called once for each attempt."""
        breather = Breather()
        for part in self.parts:
            for start in range(0, len(part), SEND_BYTES):
                yield memoryview(part)[start : start + SEND_BYTES]
                await breather.breathe()  # a fast network takes all of it without a pause


class DatumArray(msgspec.Struct):
    """A JSON array of `count` datums."""

    json: bytearray
    count: int


async def encode_data(data: Sequence[Datum], *, group: int, overhead: int) -> list[DatumArray]:
    """Encode datums and split them, in order, into as few bodies as the size limit allows.

    Each body is written into one buffer that grows: the allocator keeps a large block for the next batch, where it
    returns many small ones to the system, and getting them back costs more than it should.

    Args:
        data: the datums.
        group: how many neighbours must stay in one body (2 for the pairs of dpo).
        overhead: bytes that each body needs besides its datums and the commas between them.

    Raises:
        InputError: when one group alone is too large, or JSON has no word for something in it.
    """
    breather = Breather()
    limit = MAX_REQUEST_BYTES - overhead + 1  # each datum counts with a comma, of which a body has one less
    arrays = [DatumArray(bytearray(b"["), 0)]
    for start in range(0, len(data), group):
        array = arrays[-1]
        before = len(array.json)
        for index, datum in enumerate(data[start : start + group], start):
            try:
                encode_into(datum, array.json, -1)
            except TypeError as strange:
                raise InputError(f"data[{index}]", str(strange)) from None
            array.json += b","
            await breather.breathe()
        size = len(array.json) - before
        if size > limit:
            raise InputError(
                f"data[{start}]", f"is {size:,} bytes of JSON; one request holds at most {limit:,}. Shorten it"
            )
        if len(array.json) - 1 > limit:
            arrays.append(DatumArray(bytearray(b"[") + array.json[before:], 0))
            del array.json[before:]
        arrays[-1].count += group
    for array in arrays:
        array.json[-1:] = b"]"
    return arrays


class _RawOutput(msgspec.Struct):
    loss: float | None = None
    loss_fn_output_type: str = ""
    loss_fn_outputs: list[msgspec.Raw] = []
    metrics: dict[str, float | None] = {}


_decode_output = msgspec.json.Decoder(_RawOutput).decode
_decode_tensors = msgspec.json.Decoder(dict[str, TensorData]).decode


async def decode_output(raw: bytes | msgspec.Raw) -> ForwardBackwardOutput:
    """Decode a forward pass, datum by datum; a null among its numbers reads as NaN."""
    breather = Breather()
    output = _decode_output(raw)
    tensors: list[dict[str, TensorData]] = []
    for one in output.loss_fn_outputs:
        tensors.append(_decode_tensors(one))
        await breather.breathe()
    return ForwardBackwardOutput(
        loss=_number(output.loss),
        loss_fn_output_type=output.loss_fn_output_type,
        loss_fn_outputs=tensors,
        metrics=_numbers(output.metrics),
    )


class _RawStep(msgspec.Struct):
    metrics: dict[str, float | None] | None = None


_decode_step = msgspec.json.Decoder(_RawStep).decode


async def decode_step(raw: bytes | msgspec.Raw) -> OptimStepResponse:
    """Decode an optimizer step; a null among its numbers, such as the norm of a gradient that overflowed, is NaN."""
    metrics = _decode_step(raw).metrics
    return OptimStepResponse(metrics=None if metrics is None else _numbers(metrics))


def _numbers(metrics: dict[str, float | None]) -> dict[str, float]:
    return {name: _number(value) for name, value in metrics.items()}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def decoder_for(kind: type[T]) -> Any:
    """Return an async function that decodes a result of `kind`."""
    if kind is ForwardBackwardOutput:
        return decode_output
    if kind is OptimStepResponse:
        return decode_step
    decode = msgspec.json.Decoder(kind).decode

    async def decode_small(raw: bytes | msgspec.Raw) -> T:
        return decode(raw)

    return decode_small

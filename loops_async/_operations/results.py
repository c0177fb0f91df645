"""Decoding the results of operations in slices, between which the event loop can do other work."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from .._http.body import Pacer
from ..types import ForwardBackwardOutput, OptimStepResponse, TensorData

T = TypeVar("T")


class _RawOutput(msgspec.Struct):
    loss: float | None = None
    loss_fn_output_type: str = ""
    loss_fn_outputs: list[msgspec.Raw] = []
    metrics: dict[str, float | None] = {}


_decode_output = msgspec.json.Decoder(_RawOutput).decode
_decode_tensors = msgspec.json.Decoder(dict[str, TensorData]).decode


async def decode_output(raw: bytes | msgspec.Raw) -> ForwardBackwardOutput:
    """Decode the result of a forward pass, datum by datum; a null in place of a number becomes NaN."""
    pacer = Pacer()
    output = _decode_output(raw)
    tensors: list[dict[str, TensorData]] = []
    for raw_tensors in output.loss_fn_outputs:
        tensors.append(_decode_tensors(raw_tensors))
        await pacer.pause()
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
    """Decode the result of an optimizer step; a null metric, e.g. the norm of an overflowed gradient, becomes NaN."""
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

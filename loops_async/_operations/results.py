"""Decoding the results of operations in slices, between which the event loop can do other work."""

from __future__ import annotations

from typing import Any, TypeVar

from msgspec import Raw, Struct

from .._http.body import Pacer
from .._http.decoding import decode_answer
from ..types import ForwardBackwardOutput, OptimStepResponse, TensorData

T = TypeVar("T")


class _RawOutput(Struct):
    loss: float | None = None
    loss_fn_output_type: str = ""
    loss_fn_outputs: list[Raw] = []
    metrics: dict[str, float | None] = {}


async def decode_output(raw: bytes | Raw) -> ForwardBackwardOutput:
    """Decode the result of a forward pass, datum by datum; a null in place of a number becomes NaN.

    Raises:
        UnreadableError: `raw` is not such a result.
    """
    pacer = Pacer()
    output = decode_answer(raw, _RawOutput)
    tensors: list[dict[str, TensorData]] = []
    for raw_tensors in output.loss_fn_outputs:
        tensors.append(decode_answer(raw_tensors, dict[str, TensorData]))
        await pacer.pause()
    return ForwardBackwardOutput(
        loss=_number(output.loss),
        loss_fn_output_type=output.loss_fn_output_type,
        loss_fn_outputs=tensors,
        metrics=_numbers(output.metrics),
    )


class _RawStep(Struct):
    metrics: dict[str, float | None] | None = None


async def decode_step(raw: bytes | Raw) -> OptimStepResponse:
    """Decode the result of an optimizer step; a null metric, e.g. the norm of an overflowed gradient, becomes NaN."""
    metrics = decode_answer(raw, _RawStep).metrics
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

    async def decode_small(raw: bytes | Raw) -> T:
        return decode_answer(raw, kind)

    return decode_small

"""Decoding the results of operations in slices, between which the event loop can do other work."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from .._http.body import Pacer
from ..types import ForwardBackwardOutput, OptimStepResponse, TensorData

T = TypeVar("T")


class _Output(msgspec.Struct):
    loss: float | None = None
    loss_fn_output_type: str = ""
    metrics: dict[str, float | None] = {}


class _RawOutput(_Output):
    loss_fn_outputs: list[msgspec.Raw] = []


class _ParsedOutput(_Output):
    loss_fn_outputs: list[dict[str, TensorData]] = []


_decode_output = msgspec.json.Decoder(_RawOutput).decode
_decode_tensors = msgspec.json.Decoder(dict[str, TensorData]).decode


async def decode_output(raw: bytes | msgspec.Raw) -> ForwardBackwardOutput:
    """Decode the result of a forward pass, datum by datum; a null in place of a number becomes NaN."""
    pacer = Pacer()
    output: _RawOutput | _ParsedOutput = _read(raw, _decode_output, _ParsedOutput)
    tensors: list[dict[str, TensorData]] = []
    for datum in output.loss_fn_outputs:
        tensors.append(_decode_tensors(datum) if isinstance(datum, msgspec.Raw) else datum)
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
    metrics = _read(raw, _decode_step, _RawStep).metrics
    return OptimStepResponse(metrics=None if metrics is None else _numbers(metrics))


def has_nan(body: bytes) -> bool:
    """Whether a body may contain NaN or Infinity, which JSON does not have but some services write."""
    return b"NaN" in body or b"Infinity" in body


def _read(raw: bytes | msgspec.Raw, decode: Callable[[Any], Any], kind: Any) -> Any:
    """Decode JSON; where it has NaN or Infinity, parse it in a way that accepts them, and return it as `kind`."""
    try:
        return decode(raw)
    except msgspec.DecodeError as problem:
        body = bytes(raw)
        if not has_nan(body):
            raise
        try:
            parsed = json.loads(body)
        except ValueError:
            raise problem from None
        return msgspec.convert(parsed, kind)


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
        found: T = _read(raw, decode, kind)
        return found

    return decode_small

"""Validation of arguments, before anything is sent."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, TypeVar, cast

import msgspec
import msgspec.inspect
from msgspec import UNSET, Struct

from .errors import InputError
from .protocol import check_loss_data, is_for_all_positions, loss_rule, loss_settings
from .types import Datum, EncodedTextChunk, ImageChunk, ModelInput, TensorData
from .types.inputs import token_ids
from .types.tensors import DTYPES, is_list_like, plain_scalar

S = TypeVar("S", bound=Struct)


def check(value: S, *, path: str = "") -> S:
    """Return `value` if each of its fields satisfies the constraints of its type."""
    raw = _plain_fields(value, path)
    try:
        msgspec.convert(raw, type(value))
    except msgspec.ValidationError as problem:
        raise _input_error(path, type(value), raw, str(problem)) from None
    for name, number in raw.items():
        if isinstance(number, float) and not math.isfinite(number):
            raise InputError(_join(path, name), f"must be a finite number; got {number}")
    return value


def _plain_fields(value: Struct, path: str) -> dict[str, Any]:
    """Return the fields that are set, as JSON types."""
    try:
        raw: dict[str, Any] = msgspec.to_builtins(value, enc_hook=plain_scalar)
    except TypeError:
        raise _unserializable(value, path) from None
    return raw


def _unserializable(value: Struct, path: str) -> InputError:
    """Return the error that names the field that is not JSON serializable."""
    for name in value.__struct_fields__:
        given = getattr(value, name)
        try:
            msgspec.to_builtins(None if given is UNSET else given, enc_hook=plain_scalar)
        except TypeError as error:
            return InputError(_join(path, name), f"{error}; got {given!r}")
    raise AssertionError("every field is JSON serializable, but the struct is not")


def _input_error(path: str, kind: type[Struct], raw: dict[str, Any], problem: str) -> InputError:
    """Convert msgspec's ``Expected `int` >= 1 - at `$.lora_rank` `` to an error that names the field and the value."""
    rule, _, where = problem.partition(" - at `$")
    field = where.strip(".`")
    value: Any = raw
    for step in _STEP.findall(field):
        value = value[int(step)] if step.isdigit() else value[step]
    if rule.startswith("Invalid enum value"):
        rule = f"must be one of {', '.join(_allowed_values(kind, field))}"
    return InputError(_join(path, field), f"{rule[:1].lower()}{rule[1:]}; got {value!r}")


_STEP = re.compile(r"[^.\[\]]+")


def _allowed_values(kind: type[Struct], field: str) -> list[str]:
    """Return the values that an enumeration or `Literal` field may have."""
    info = cast("msgspec.inspect.StructType", msgspec.inspect.type_info(kind))
    declared = next(each.type for each in info.fields if each.encode_name == field)
    members = declared.types if isinstance(declared, msgspec.inspect.UnionType) else (declared,)
    return [
        str(allowed)
        for member in members
        if isinstance(member, msgspec.inspect.LiteralType | msgspec.inspect.EnumType)
        for allowed in (member.values if isinstance(member, msgspec.inspect.LiteralType) else member.cls)
    ]


def _join(path: str, field: str) -> str:
    return ".".join(filter(None, (path, field)))


def check_kind(value: Any, kind: type[S], path: str) -> S:
    """Return `value` if it is a valid `kind`."""
    if not isinstance(value, kind):
        raise InputError(path, f"expected {kind.__name__}, got {type(value).__name__}")
    return check(value, path=path)


def check_request(value: Any, kind: type[S]) -> S:
    """Return the body of a request if it is a valid `kind`; errors name its fields without a prefix, like arguments."""
    if not isinstance(value, kind):
        raise InputError("request", f"expected {kind.__name__}, got {type(value).__name__}")
    return check(value)


def check_positive(value: Any, path: str) -> None:
    """Reject a number of seconds that is not positive and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(path, f"must be a number of seconds greater than 0; got {value!r}")


def check_at_least(value: Any, smallest: int, path: str) -> None:
    """Reject anything but a whole number of at least `smallest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise InputError(path, f"must be a whole number of at least {smallest}; got {value!r}")


def check_model_input(value: Any, path: str, *, max_seq_len: int | None = None) -> ModelInput:
    """Return `value` as a `ModelInput` if it has tokens and fits the model."""
    prompt = value if isinstance(value, ModelInput) else ModelInput([EncodedTextChunk(token_ids(value, path=path))])
    for index, chunk in enumerate(prompt.chunks):
        if not isinstance(chunk, EncodedTextChunk | ImageChunk):
            raise InputError(
                f"{path}.chunks[{index}]", f"expected EncodedTextChunk or ImageChunk, got {type(chunk).__name__}"
            )
    if prompt.length == 0:
        raise InputError(path, "must have at least one token")
    if max_seq_len is not None and prompt.length > max_seq_len:
        raise InputError(path, f"has {prompt.length} tokens, more than max_seq_len={max_seq_len}; shorten it")
    return prompt


def check_data(
    data: Any, loss_fn: Any, config: Any, *, max_seq_len: int | None = None
) -> tuple[Sequence[Datum], dict[str, Any] | None]:
    """Return the datums and the loss's configuration if the loss can be computed from them."""
    loss_rule(loss_fn)
    listed = _listed(data)
    for index, datum in enumerate(listed):
        path = f"data[{index}]"
        if not isinstance(datum, Datum):
            raise InputError(path, f"expected Datum, got {type(datum).__name__}")
        check_model_input(datum.model_input, f"{path}.model_input", max_seq_len=max_seq_len)
        for name, tensor in datum.loss_fn_inputs.items():
            _check_tensor(tensor, f"{path}.loss_fn_inputs[{name!r}]", datum.model_input.length, name)
    check_loss_data(loss_fn, listed)
    return listed, _checked_config(loss_fn, config)


def _check_tensor(tensor: Any, path: str, positions: int, name: str) -> None:
    if not isinstance(tensor, TensorData):
        raise InputError(path, f"expected TensorData, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise InputError(path, f"dtype must be one of {', '.join(sorted(DTYPES))}; got {tensor.dtype!r}")
    if math.prod(tensor.shape) != len(tensor.data):
        raise InputError(path, f"shape {tensor.shape} does not hold {len(tensor.data)} numbers")
    if tensor.shape[:1] != [positions] and not is_for_all_positions(name, tensor):
        raise InputError(path, f"needs one entry for each of the {positions} positions; shape is {tensor.shape}")


def _checked_config(loss_fn: str, config: Any) -> dict[str, Any] | None:
    """Return the configuration as a dict, without defaults, which the service adds."""
    if config is None:
        return None
    if not _is_mapping(config):
        raise InputError("loss_fn_config", f"expected a dict, got {type(config).__name__}")
    loss_settings(loss_fn, config)
    return dict(config)


def _listed(data: Any) -> Sequence[Any]:
    if not is_list_like(data):
        raise InputError("data", f"expected a list of Datum, got {type(data).__name__}")
    if not data:
        raise InputError("data", "must have at least one Datum")
    return data


def _is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)

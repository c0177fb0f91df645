"""Validation of arguments, before anything is sent."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final, TypeVar, cast
from uuid import UUID

import msgspec
import msgspec.inspect
from msgspec import UNSET, Struct
from msgspec.structs import replace

from ._kinds import is_mapping
from ._values import place_and_rule
from .errors import ConfigError, InputError
from .protocol import INT64, LOGPROBS, MASK, LossRule, checked_loss_data, is_for_all_positions, loss_rule, loss_settings
from .types import Datum, EncodedTextChunk, ImageChunk, ModelInput, TensorData
from .types.array_numbers import ArrayNumbers
from .types.inputs import text_input
from .types.tensors import DTYPES, FLOATS, is_list_like, plain_number, plain_scalar

S = TypeVar("S", bound=Struct)

_LARGEST: Final = sys.float_info.max
"""An int may be larger, and is no float then."""

_OTHER_TYPES: Final = (bytes, bytearray, memoryview, datetime, date, time, timedelta, Decimal, UUID)
"""What msgspec would turn into text, e.g. bytes into base64: a field for text must refuse it."""


def check(value: S, *, path: str = "") -> S:
    """Return a copy of `value` in plain Python values if each of its fields keeps the rule that its type states.

    The copy is what to send: the original may hold arrays and lists, which the caller may change.
    """
    raw = _plain_fields(value, path)
    try:
        plain = msgspec.convert(raw, type(value))
    except msgspec.ValidationError as problem:
        raise _input_error(path, type(value), raw, problem) from None
    for name, number in raw.items():
        if isinstance(number, float) and not math.isfinite(number):
            raise InputError(_join(path, name), f"must be a finite number; got {number}")
    return plain


def _plain_fields(value: Struct, path: str) -> dict[str, Any]:
    """Return the fields that are set, as JSON types, or of types that no field for those takes."""
    try:
        raw: dict[str, Any] = msgspec.to_builtins(value, enc_hook=plain_scalar, builtin_types=_OTHER_TYPES)
    except TypeError:
        raise _unserializable(value, path) from None
    return raw


def _unserializable(value: Struct, path: str) -> InputError:
    """Return the error that names the field that is not JSON serializable."""
    for name in value.__struct_fields__:
        given = getattr(value, name)
        try:
            msgspec.to_builtins(None if given is UNSET else given, enc_hook=plain_scalar, builtin_types=_OTHER_TYPES)
        except TypeError as error:
            return InputError(_join(path, name), f"{error}; got {given!r}")
    raise AssertionError("every field is JSON serializable, but the struct is not")


def _input_error(path: str, kind: type[Struct], raw: dict[str, Any], problem: msgspec.ValidationError) -> InputError:
    """Convert msgspec's error to one that names the field and the value."""
    field, rule = place_and_rule(problem)
    value: Any = raw
    for step in _STEP.findall(field):
        value = value[int(step)] if step.isdigit() else value[step]
    if rule.startswith("invalid enum value"):
        rule = f"must be one of {', '.join(_allowed_values(kind, field))}"
    return InputError(_join(path, field), f"{rule}; got {value!r}")


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
    """Return a plain copy of `value` if it is a valid `kind`."""
    if not isinstance(value, kind):
        raise InputError(path, f"expected {kind.__name__}, got {type(value).__name__}")
    return check(value, path=path)


def check_request(value: Any, kind: type[S]) -> S:
    """Return the body of a request if it is a valid `kind`; errors name its fields without a prefix, like arguments."""
    if not isinstance(value, kind):
        raise InputError("request", f"expected {kind.__name__}, got {type(value).__name__}")
    return check(value)


@contextmanager
def as_config_errors() -> Generator[None]:
    """Raise `ConfigError` in place of `InputError`: inside are checks of what configures a client or a server."""
    try:
        yield
    except InputError as wrong:
        raise ConfigError(str(wrong)) from None


def check_positive(value: Any, path: str) -> float:
    """Return a number of seconds if it is positive and finite."""
    seconds = plain_number(value)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= _LARGEST:
        raise InputError(path, f"must be a number of seconds greater than 0; got {value!r}")
    return seconds


def check_at_least(value: Any, smallest: int, path: str) -> int:
    """Return a whole number if it is at least `smallest`."""
    number = plain_number(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < smallest:
        raise InputError(path, f"must be a whole number of at least {smallest}; got {value!r}")
    return number


def check_finite(value: Any, path: str) -> float:
    """Return a number as a float if it is finite."""
    number = plain_number(value)
    if not isinstance(number, int | float) or not -_LARGEST <= number <= _LARGEST:
        raise InputError(path, f"must be a finite number; got {value!r}")
    return float(number)


def check_not_negative(value: Any, path: str) -> float:
    """Return a number as a float if it is finite and at least 0."""
    number = check_finite(value, path)
    if number < 0:
        raise InputError(path, f"must be at least 0; got {value!r}")
    return number


def check_model_input(value: Any, path: str, *, max_seq_len: int | None = None) -> ModelInput:
    """Return `value` as a `ModelInput` if it has tokens and fits the model."""
    prompt = value if isinstance(value, ModelInput) else text_input(value, path=path)
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


def check_config(loss_fn: Any, config: Any) -> dict[str, Any] | None:
    """Return the configuration of a loss as a dict, without defaults, which the service adds."""
    loss_rule(loss_fn)
    if config is None:
        return None
    if not is_mapping(config):
        raise InputError("loss_fn_config", f"expected a dict, got {type(config).__name__}")
    settings = loss_settings(loss_fn, config)
    return {name: settings[name] for name in config}


def checked_data(data: Any, loss_fn: str, *, max_seq_len: int | None = None) -> Iterator[Datum]:
    """Return an iterator over the datums as they are to be sent; each step checks one.

    All together may take long, so that the caller must be able to pause between them. The list itself is read and
    checked at once.
    """
    rule = loss_rule(loss_fn)
    examples = checked_examples(data, loss_fn, max_seq_len=max_seq_len)
    return (_as_sent(datum, loss_fn, rule, f"data[{index}].loss_fn_inputs") for index, datum in enumerate(examples))


def checked_examples(data: Any, loss_fn: str, *, max_seq_len: int | None = None) -> Iterator[Datum]:
    """Do the same for datums that may have inputs which the loss does not read, and are not sent as they are."""
    datums = listed(data)
    examples = (_checked_example(datum, f"data[{index}]", max_seq_len) for index, datum in enumerate(datums))
    return checked_loss_data(loss_fn, examples, len(datums))


def _checked_example(datum: Any, path: str, max_seq_len: int | None) -> Datum:
    if not isinstance(datum, Datum):
        raise InputError(path, f"expected Datum, got {type(datum).__name__}")
    check_model_input(datum.model_input, f"{path}.model_input", max_seq_len=max_seq_len)
    for name, tensor in datum.loss_fn_inputs.items():
        _check_tensor(tensor, f"{path}.loss_fn_inputs[{name!r}]", datum.model_input.length, name)
    return datum


def _check_tensor(tensor: Any, path: str, positions: int, name: str) -> None:
    if not isinstance(tensor, TensorData):
        raise InputError(path, f"expected TensorData, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise InputError(path, f"dtype must be one of {', '.join(sorted(DTYPES))}; got {tensor.dtype!r}")
    if math.prod(tensor.shape) != len(tensor.numbers):
        raise InputError(path, f"shape {tensor.shape} does not hold {len(tensor.numbers)} numbers")
    if tensor.shape[:1] != [positions] and not is_for_all_positions(name, tensor):
        raise InputError(path, f"needs one entry for each of the {positions} positions; shape is {tensor.shape}")
    _check_numbers(tensor, path, is_logprob=name in LOGPROBS)


_ROUNDING: Final = 1e-3
"""How far above 0 a logprob may be, because samplers compute with rounded numbers."""


def _check_numbers(tensor: TensorData, path: str, *, is_logprob: bool) -> None:
    """Refuse values that the dtype does not have, infinities (JSON has none), and logprobs above 0."""
    if _are_plainly_right(tensor, is_logprob=is_logprob):
        return
    numbers = float if tensor.dtype in FLOATS else bool if tensor.dtype == "bool" else int
    for position, value in enumerate(tensor.data):
        problem = _problem(value, numbers=numbers, is_logprob=is_logprob)
        if problem is not None:
            raise InputError(path, f"{problem}; got {value!r} at position {position}")


def _are_plainly_right(tensor: TensorData, *, is_logprob: bool) -> bool:
    """Whether all numbers are right, by a sum, which costs a few percent of encoding them where a loop costs more.

    The sum is an int only if every number is one, and finite only if every number is. False says that it is uncertain.
    """
    data: Any = tensor.numbers
    if isinstance(data, ArrayNumbers):
        if tensor.dtype in FLOATS:
            return data.lie_within(-_LARGEST, _ROUNDING if is_logprob else _LARGEST)
        return tensor.dtype != "bool" and data.are_integers()
    if tensor.dtype == "bool" or not data or isinstance(data[0], bool):
        return False
    try:
        total = sum(data)
    except (TypeError, OverflowError):  # e.g. None, an int of 400 digits
        return False
    if tensor.dtype not in FLOATS:
        return type(total) is int and total in INT64
    return -_LARGEST <= total <= _LARGEST and not (is_logprob and max(data) > _ROUNDING)


def _problem(value: Any, *, numbers: type, is_logprob: bool) -> str | None:
    """Say what is wrong with one number of a tensor; None for nothing."""
    if numbers is not float:
        is_right = type(value) is numbers and (numbers is bool or value in INT64)
        return None if is_right else f"must hold {numbers.__name__} values, as its dtype says"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must hold numbers"
    if value != value:  # NaN, which travels as null
        return None
    if not -_LARGEST <= value <= _LARGEST:
        return "must be finite: JSON has no infinity"
    if is_logprob and value > _ROUNDING:
        return "a logprob must not be greater than 0; give logprobs in nats, not probabilities"
    return None


def _as_sent(datum: Datum, loss_fn: str, rule: LossRule, path: str) -> Datum:
    _check_names(datum, loss_fn, rule, path)
    return _without_mask(datum, loss_fn, rule, path)


def _check_names(datum: Datum, loss_fn: str, rule: LossRule, path: str) -> None:
    """Refuse inputs that the loss does not read; the user who gives them expects that they count."""
    for name in datum.loss_fn_inputs:
        if name in rule.inputs or name == MASK:
            continue
        from difflib import get_close_matches  # its import takes longer than all checks of most programs

        similar = get_close_matches(str(name), rule.inputs, n=1)
        hint = f"; did you mean {similar[0]!r}?" if similar else ""
        if name == "weights":
            hint = f"; a position whose {rule.excluding} are 0 does not count"
        raise InputError(f"{path}[{name!r}]", f"{loss_fn} does not read it, only {', '.join(rule.inputs)}{hint}")


def _without_mask(datum: Datum, loss_fn: str, rule: LossRule, path: str) -> Datum:
    """Return the datum without its mask, which only the drift metrics read, if the loss leaves out the same positions.

    Raises:
        InputError: the loss would count a position that is masked.
    """
    inputs = dict(datum.loss_fn_inputs)
    mask = inputs.pop(MASK, None)
    if mask is None:
        return datum
    path = f"{path}[{MASK!r}]"
    positions = datum.model_input.length
    if mask.shape != [positions]:
        raise InputError(path, f"must have the shape [{positions}]; got {mask.shape}")
    masked = _masked_positions(mask)
    counted = rule.counted(datum) if masked else []
    for position in masked:
        if counted[position]:
            raise InputError(
                path,
                f"masks position {position}, which {loss_fn} counts, since it does not read a mask: set "
                f"{rule.excluding} to 0 there",
            )
    return replace(datum, loss_fn_inputs=inputs)


def _masked_positions(mask: TensorData) -> list[int]:
    numbers: Any = mask.data
    try:
        if min(numbers) > 0:  # usual, and much faster than a loop
            return []
    except TypeError:  # None, which stands for NaN
        pass
    return [position for position, kept in enumerate(numbers) if kept is None or not kept > 0]


def listed(data: Any) -> list[Any]:
    """Return the datums of a batch as a list of its own."""
    if not is_list_like(data):
        raise InputError("data", f"expected a list of Datum, got {type(data).__name__}")
    if not data:
        raise InputError("data", "must have at least one Datum")
    return list(data)  # a copy: the caller may change the list before it is sent

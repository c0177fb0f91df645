"""What every engine refuses: batches whose losses, settings or inputs break a rule. Trainers get what has passed.

Token ids, images and the length of a sequence are checked by the engine, since they depend on its model.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from loops_async.errors import InputError
from loops_async.protocol import (
    LOSSES,
    MASK,
    SKIP_NORMALIZATION,
    TARGET_TOKENS,
    LossRule,
    checked_loss_data,
    loss_rule,
    loss_settings,
)
from loops_async.types import Datum, TensorData

from .base import RefusedError

__all__ = ["check_batch", "check_normalization"]

T = TypeVar("T")

# Names of the wire. Of these a loss may ignore those that are not its own, so one set of datums serves several losses.
_KNOWN: Final = frozenset({MASK}).union(*(rule.inputs for rule in LOSSES.values()))


def check_batch(data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any]) -> None:
    """Check a batch before a trainer gets it; an `InputError` names the datum, the field and the rule.

    Whatever a loss reads has passed then: its settings, and that its inputs are there, in shapes that belong together,
    with numbers that fit them and are finite where the loss has weight.
    """
    rule = loss_rule(loss_fn)
    loss_settings(loss_fn, config)
    for index, datum in enumerate(checked_loss_data(loss_fn, data, len(data))):
        _check_datum(datum, rule, f"data[{index}]")


def check_normalization(pending: bool | None, skip: bool) -> None:
    """Refuse gradients that skip normalisation beside `pending` ones that do not, or the reverse; None: there are none.

    Trainers call it, since only they know what is pending.
    """
    if pending is not None and skip != pending:
        setting = f"loss_fn_config[{SKIP_NORMALIZATION!r}]"
        raise RefusedError(f"{setting}: must be the same in all calls before an optim_step")


def _check_datum(datum: Datum, rule: LossRule, where: str) -> None:
    if datum.routed_experts_ref:
        problem = "replaying the routing of experts is not supported by this engine"
        raise InputError(f"{where}.routed_experts_ref", problem)
    given = datum.loss_fn_inputs
    where = f"{where}.loss_fn_inputs"
    if unknown := sorted(given.keys() - _KNOWN):
        raise InputError(f"{where}[{unknown[0]!r}]", f"unknown; known are {', '.join(sorted(_KNOWN))}")
    floats: dict[str, array[float]] = {}
    for name in rule.inputs:
        if name not in given:
            continue
        path = f"{where}[{name!r}]"
        if name == TARGET_TOKENS:
            _converted(given[name], _int64, path)
        else:
            floats[name] = _converted(given[name], _float32, path)
    for name, values in floats.items():
        if not all(map(math.isfinite, values)):
            _check_finite(values, rule.counted_targets(datum), datum.model_input.length, f"{where}[{name!r}]")


def _converted(tensor: TensorData, convert: Callable[[Iterable[Any]], T], path: str) -> T:
    """Return the numbers of a tensor as the loss reads them."""
    try:
        if math.prod(tensor.shape) != len(tensor.data):
            raise ValueError(f"it has {len(tensor.data)} numbers")
        return convert(tensor.data)
    except (TypeError, ValueError, OverflowError) as error:
        problem = f"does not fit its dtype {tensor.dtype} and shape {tensor.shape}: {error}"
        raise InputError(path, problem) from error


def _int64(numbers: Iterable[Any]) -> array[int]:
    return array("q", map(int, numbers))


def _float32(numbers: Iterable[Any]) -> array[float]:
    """Return numbers in the precision in which losses are computed, where large ones are infinite; null is NaN."""
    return array("f", (math.nan if number is None else number for number in numbers))


def _check_finite(values: Sequence[float], counted: Sequence[bool], positions: int, path: str) -> None:
    """Refuse values that are not finite where `counted`; one value alone is that of every position."""
    for place, counts in enumerate(counted):
        if counts and not math.isfinite(values[place % len(values)]):
            position = place * positions // len(counted)
            raise InputError(path, f"must be finite where the loss has weight; see position {position}")

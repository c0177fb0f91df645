"""Tensors as on the wire: flat numbers, a dtype and a shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeGuard, runtime_checkable

import msgspec
from msgspec import Struct
from msgspec.structs import force_setattr

from .._values import Value
from ..errors import InputError
from .array_numbers import ArrayNumbers, array_numbers, keep_arrays, kept_numbers

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["ArrayLike", "TensorData"]

Number: TypeAlias = bool | int | float

FLOATS: Final = frozenset({"float32", "float16", "bfloat16", "float64"})
INTS: Final = frozenset({"int32", "int64", "int8"})
DTYPES = FLOATS | INTS | {"bool"}
_NUMBERS: frozenset[type] = frozenset({bool, int, float})
_DTYPE_OF: tuple[tuple[Any, str], ...] = ((list[int], "int64"), (list[float], "float32"), (list[bool], "bool"))
"""The default dtype of a list, by the type of its numbers."""


@runtime_checkable
class SupportsToList(Protocol):
    """The part of numpy arrays and torch tensors that is used here."""

    @property
    def dtype(self) -> Any: ...

    @property
    def shape(self) -> Any: ...

    def tolist(self) -> Any: ...


ArrayLike: TypeAlias = "TensorData | SupportsToList | Sequence[Number] | Sequence[Sequence[Number]]"


class TensorData(Value, Struct, frozen=True, kw_only=True):
    """A tensor: `data` flat in row-major order, `dtype`, and `shape` as a list of ints.

    `dtype` is one of float32, float16, bfloat16, float64, int32, int64, int8, bool. JSON has no NaN, so it is sent and
    received as ``null``; a ``null`` in a float tensor becomes NaN.

    Numbers given as a numpy array are copied and stay an array, until `data` is read or the tensor is sent: making the
    datums of a large batch takes little time. To encode such a tensor yourself, use `to_json` or `to_dict`, or read
    `data` before.

    Example:
        >>> from loops_async import TensorData
        >>> TensorData.from_list([[1, 2], [3, 4]], dtype="int64")
        TensorData(data=[1, 2, 3, 4], dtype='int64', shape=[2, 2])
    """

    data: list[Number | None]
    dtype: str
    shape: list[int]

    def __post_init__(self) -> None:
        held = kept_numbers(self, "data")
        if isinstance(held, ArrayNumbers):
            return
        numbers = array_numbers(held)
        if numbers is not None:
            force_setattr(self, "data", numbers)
        elif self.dtype in FLOATS and not _are_numbers(held):
            force_setattr(self, "data", [math.nan if x is None else x for x in held])

    @classmethod
    def of(cls, value: ArrayLike, dtype: str | None = None, *, path: str = "tensor") -> TensorData:
        """Make a tensor from a list, a nested list, a numpy array, a torch tensor or a `TensorData`.

        Args:
            value: the numbers.
            dtype: the dtype on the wire; None takes the array's, for lists int64, float32 or bool by their numbers.
            path: the name of the value in errors.

        Raises:
            InputError: the list is ragged, a value is not a number, or the dtype is unknown.
        """
        if isinstance(value, TensorData):
            if dtype in (None, value.dtype):
                return value
            return cls(data=value.numbers, dtype=_known(dtype, value.dtype, path), shape=value.shape)
        if is_list_like(value):
            shape = _shape_of(value)
            flat, own_dtype = _numbers(_flatten(value, shape, path), path)
        elif isinstance(value, SupportsToList):
            shape = [int(n) for n in value.shape] or [1]
            numbers: Any = array_numbers(value)
            if numbers is not None:
                return cls(data=numbers, dtype=_known(dtype, str(value.dtype), path), shape=shape)
            flat = value.tolist() if value.shape else [value.tolist()]
            for _ in shape[1:]:
                flat = list(chain.from_iterable(flat))
            own_dtype = str(value.dtype).removeprefix("torch.")
        else:
            raise InputError(path, f"expected a list, a numpy array or a torch tensor, got {type(value).__name__}")
        return cls(data=flat, dtype=_known(dtype, own_dtype, path), shape=shape)

    @classmethod
    def from_list(cls, data: Sequence[Any], dtype: str = "float32") -> TensorData:
        """Make a tensor from a flat or nested list, which must not be ragged."""
        return cls.of(data, dtype)

    @classmethod
    def from_numpy(cls, array: np.ndarray[Any, Any]) -> TensorData:
        """Make a tensor from a numpy array, with its dtype and shape."""
        return cls.of(array)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Make a tensor from a torch tensor, with its dtype and shape."""
        return cls.of(tensor.detach())

    @property
    def numbers(self) -> Any:
        """What holds the numbers: a list, or an `ArrayNumbers`, which has of a list what this library needs."""
        return kept_numbers(self, "data")

    def tolist(self) -> list[Any]:
        """Return the numbers as lists nested according to `shape`."""
        nested: list[Any] = list(self.data)
        for size in reversed(self.shape[1:]):
            nested = [nested[i : i + size] for i in range(0, len(nested), size)]
        return nested

    def to_numpy(self) -> np.ndarray[Any, Any]:
        """Return a numpy array of `shape` and `dtype`; bfloat16, which numpy lacks, becomes float32."""
        import numpy as np

        dtype = "float32" if self.dtype == "bfloat16" else self.dtype
        held = self.numbers
        return np.array(held.array if isinstance(held, ArrayNumbers) else held, dtype=dtype).reshape(self.shape)

    def to_torch(self) -> torch.Tensor:
        """Return a torch tensor of `shape` and `dtype`; needs the ``torch`` extra."""
        try:
            import torch
        except ImportError as missing:
            raise ImportError("TensorData.to_torch needs torch: pip install 'loops-async[torch]'") from missing
        return torch.tensor(self.data, dtype=getattr(torch, self.dtype)).reshape(self.shape)


keep_arrays(TensorData, "data")


def is_list_like(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether `value` is a sequence, e.g. a list or a tuple, but not text or bytes."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _known(wanted: str | None, own: str, path: str) -> str:
    """Return the dtype on the wire of numbers whose own dtype is `own`."""
    dtype = wanted or own
    if dtype not in DTYPES:
        raise InputError(path, f"dtype must be one of {', '.join(sorted(DTYPES))}; got {dtype!r}")
    if own in FLOATS and dtype not in FLOATS:
        raise InputError(path, f"holds {own} numbers, which {dtype} does not express; convert them first")
    return dtype


def plain_scalar(value: Any) -> Any:
    """Return the Python numbers of an array or a scalar of numpy or torch; every encoder uses this as its hook."""
    if type(value) is ArrayNumbers:
        return value.tolist()
    if isinstance(value, SupportsToList):
        plain: Any = value.tolist()
        if type(plain) is not type(value):  # Python has no number for numpy.longdouble
            return plain
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


def plain_number(value: Any) -> Any:
    """Return the Python number of a numpy or torch scalar; anything else as it is."""
    if type(value) in _NUMBERS:
        return value
    is_scalar = isinstance(value, SupportsToList) and len(value.shape) == 0
    return value.tolist() if is_scalar else value


def plain_scalars(values: Sequence[Any]) -> list[Any]:
    """Return Python numbers in place of numpy and torch scalars."""
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


def _are_numbers(data: list[Any]) -> bool:
    try:
        msgspec.convert(data, list[Number])  # three times faster than `None in data`
    except msgspec.ValidationError:
        return False
    return True


def _numbers(flat: list[Any], path: str) -> tuple[list[Any], str]:
    """Return the values as Python numbers, and their default dtype."""
    for kind, dtype in _DTYPE_OF:
        try:
            return msgspec.convert(flat, kind), dtype  # checks and copies several times faster than a loop
        except msgspec.ValidationError:
            continue
    plain = plain_scalars(flat)
    kinds = set(map(type, plain))
    if others := kinds - _NUMBERS:
        if any(map(is_list_like, plain)):
            raise InputError(path, "expected every row to have the same length")
        raise InputError(path, f"expected numbers, got {', '.join(sorted(kind.__name__ for kind in others))}")
    return plain, "bool" if kinds == {bool} else "float32" if float in kinds else "int64"


def _shape_of(value: Sequence[Any]) -> list[int]:
    shape: list[int] = []
    while is_list_like(value):
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return shape


def _flatten(value: Sequence[Any], shape: list[int], path: str) -> list[Any]:
    flat = list(value)
    for size in shape[1:]:
        if not all(is_list_like(row) and len(row) == size for row in flat):
            raise InputError(path, f"expected every row to have the same length of {size}")
        flat = list(chain.from_iterable(flat))
    return flat

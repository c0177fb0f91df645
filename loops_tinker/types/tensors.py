"""Tensors: flat numbers with a dtype and a shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from ._value import Value

if TYPE_CHECKING:
    import torch

__all__ = ["TensorData", "TensorDtype", "as_tensor"]

TensorDtype: TypeAlias = Literal["int64", "float32"]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class TensorData(Value):
    """A tensor of int64 or float32 numbers.

    `data` is flat and in row-major order, and is copied; `shape` may be None for one dimension. A sparse tensor in the
    CSR format has indices, and in `data` the numbers at these.

    Example:
        >>> from loops_tinker import TensorData
        >>> TensorData(data=[1, 2, 3, 4], dtype="int64", shape=[2, 2]).tolist()
        [[1, 2], [3, 4]]
    """

    data: list[Any]
    dtype: TensorDtype
    shape: list[int] | None
    sparse_crow_indices: list[int] | None
    sparse_col_indices: list[int] | None

    def __init__(
        self,
        data: Sequence[float] | NDArray[Any] | None = None,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        given = np.asarray([] if data is None else data)
        dtype = _dtype_of(given) if dtype is None else dtype
        if dtype not in ("int64", "float32"):
            raise ValueError(f"dtype must be int64 or float32; got {dtype!r}")
        if given.ndim != 1 and not isinstance(data, np.ndarray):
            raise ValueError("data must be flat; give `shape`, or make the tensor with from_numpy")
        for name, value in {
            "dtype": dtype,
            "shape": list(given.shape) if shape is None and isinstance(data, np.ndarray) else _listed(shape),
            "sparse_crow_indices": _listed(sparse_crow_indices),
            "sparse_col_indices": _listed(sparse_col_indices),
            "_array": np.array(given, dtype=dtype).ravel(),
        }.items():
            object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # a type checker would believe that every name exists

        def __getattr__(self, name: str) -> Any:
            """Make the list of numbers only where it is asked for."""
            if name != "data" or "_array" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            return self._flat.tolist()

    @property
    def _flat(self) -> NDArray[Any]:
        return cast("NDArray[Any]", self.__dict__["_array"])

    @classmethod
    def from_numpy(cls, array: NDArray[Any]) -> TensorData:
        """Make a tensor of an array of numbers, which become int64 or float32."""
        return cls(np.asarray(array), _dtype_of(np.asarray(array)), list(np.shape(array)))

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Make a tensor of a torch tensor of numbers, which become int64 or float32."""
        plain = tensor.detach().cpu()
        return cls.from_numpy((plain.float() if plain.is_floating_point() else plain).numpy())

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: float = 0) -> TensorData:
        """Make a sparse tensor of those numbers of a torch tensor (N, K) that are not `pad_value`."""
        dense = cls.from_torch(tensor).to_numpy()
        if dense.ndim != 2:
            raise ValueError(f"a sparse tensor must have two dimensions; got the shape {list(dense.shape)}")
        kept = dense != pad_value
        ends = [0, *np.cumsum(kept.sum(axis=1)).tolist()]
        return cls(dense[kept], _dtype_of(dense), list(dense.shape), ends, np.nonzero(kept)[1].tolist())

    def to_numpy(self, pad_value: float = 0) -> NDArray[Any]:
        """Return an array of `shape`; where a sparse tensor has no number, it is `pad_value`."""
        if self.sparse_crow_indices is None or self.sparse_col_indices is None:
            return self._flat.copy() if self.shape is None else self._flat.reshape(self.shape).copy()
        dense = np.full(cast("list[int]", self.shape), pad_value, dtype=self.dtype)
        rows = np.repeat(np.arange(len(dense)), np.diff(self.sparse_crow_indices))
        dense[rows, self.sparse_col_indices] = self._flat
        return dense

    def to_torch(self, pad_value: float = 0) -> torch.Tensor:
        """Return a torch tensor of `shape`; needs torch."""
        import torch

        array: Any = self.to_numpy(pad_value)
        return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType] - torch has no type for it

    def tolist(self, pad_value: float = 0) -> list[Any]:
        """Return the numbers as lists nested according to `shape`."""
        return cast("list[Any]", self.to_numpy(pad_value).tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.dtype == other.dtype and np.array_equal(self.to_numpy(), other.to_numpy(), equal_nan=True)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]  # holds lists, as every value that cannot be a key

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape}, data={np.array2string(self._flat, threshold=8)})"


def as_tensor(value: Any, dtype: TensorDtype | None) -> TensorData:
    """Make a tensor of a list, which needs a `dtype`, or of an array of numpy or torch."""
    if isinstance(value, TensorData):
        return value
    if isinstance(value, np.ndarray):
        return TensorData.from_numpy(cast("NDArray[Any]", value))
    if hasattr(value, "detach"):
        return TensorData.from_torch(value)
    return TensorData.from_numpy(np.array(value, dtype=dtype))


def _dtype_of(array: NDArray[Any]) -> TensorDtype:
    if array.dtype.kind == "f":
        return "float32"
    if array.dtype.kind == "i" or array.size == 0:
        return "int64"
    raise ValueError(f"numbers must be whole or floats; got an array of {array.dtype}")


def _listed(numbers: Sequence[int] | None) -> list[int] | None:
    return None if numbers is None else [int(each) for each in numbers]

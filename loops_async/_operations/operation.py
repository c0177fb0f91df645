"""What is submitted: an operation with its body, or bodies where it is sent in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeAlias, TypeVar

from msgspec.structs import replace

from .._http.body import Body
from ..protocol import (
    InitTrainerServerBody,
    LoadStateBody,
    OptimStepBody,
    SaveStateBody,
    SaveWeightsForSamplerBody,
    encode,
)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

SmallBody: TypeAlias = InitTrainerServerBody | OptimStepBody | SaveStateBody | SaveWeightsForSamplerBody | LoadStateBody

MakeBody: TypeAlias = Callable[[int], Body]
"""Makes a request's body from its `seq_id`, which is known only when its turn has come."""


class Encoded(Protocol[T]):
    """An operation that is ready to be sent."""

    @property
    def bodies(self) -> Sequence[MakeBody]:
        """One for each part."""
        ...

    def merge(self, results: Sequence[T]) -> T:
        """Make one result of those of the parts, which are in order."""
        ...


class Operation(Protocol[T]):
    """Something that a trainer is asked to do.

    The bodies of one that `is_dependent` depend on the operations before it, so it is encoded when its turn has come;
    any other is encoded while it waits.
    """

    @property
    def name(self) -> str:
        """What it is called on the wire."""
        ...

    @property
    def result(self) -> type[T]:
        """The type of its result."""
        ...

    @property
    def is_dependent(self) -> bool: ...

    async def encode(self) -> Encoded[T]: ...


class SmallOperation(Generic[T]):
    """An operation with a small body, which holds a `seq_id`."""

    is_dependent = False

    def __init__(self, name: str, result: type[T], body: SmallBody) -> None:
        self.name = name
        self.result = result
        self._body = body

    async def encode(self) -> SmallOperation[T]:
        return self

    @property
    def bodies(self) -> Sequence[MakeBody]:
        return [lambda seq_id: Body(encode(replace(self._body, seq_id=seq_id)))]

    def merge(self, results: Sequence[T]) -> T:
        return results[0]

"""The interface of operations: a name, a result type, and one request body for each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeAlias, TypeVar

from msgspec.structs import replace

from .._http.body import Body
from .._journal.content import Content
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
"""Makes the body of a request from its `seq_id`, which is only known when its turn starts."""


class Encoded(Protocol[T]):
    """An operation that is ready to send."""

    @property
    def bodies(self) -> Sequence[MakeBody]:
        """Functions that make the request bodies, one for each part."""
        ...

    @property
    def datums(self) -> Sequence[int]:
        """The number of datums in each part."""
        ...

    @property
    def trained_tokens(self) -> int:
        """The number of positions that are trained."""
        ...

    @property
    def tokens(self) -> int:
        """The number of positions of all datums."""
        ...

    def content(self) -> Content:
        """Return what identifies the operation; takes a while for a large one, and may be called in any thread."""
        ...

    def merge(self, results: Sequence[T]) -> T:
        """Merge the results of the parts, given in order, into one."""
        ...


class Operation(Protocol[T]):
    """An operation of a trainer.

    If it `is_dependent`, its bodies depend on earlier operations, so it is encoded when its turn starts; any other
    operation is encoded while it waits for its turn.
    """

    @property
    def name(self) -> str:
        """Its name on the wire."""
        ...

    @property
    def result(self) -> type[T]:
        """The type of its result."""
        ...

    @property
    def loss_fn(self) -> str | None:
        """The loss, if it has one."""
        ...

    @property
    def is_dependent(self) -> bool: ...

    async def encode(self) -> Encoded[T]: ...


class SmallOperation(Generic[T]):
    """An operation with a small body, which holds a `seq_id`."""

    is_dependent = False
    loss_fn: str | None = None
    datums = (0,)
    trained_tokens = 0
    tokens = 0

    def __init__(self, name: str, result: type[T], body: SmallBody) -> None:
        self.name = name
        self.result = result
        self._body = body

    async def encode(self) -> SmallOperation[T]:
        return self

    @property
    def bodies(self) -> Sequence[MakeBody]:
        return [lambda seq_id: Body(encode(replace(self._body, seq_id=seq_id)))]

    def content(self) -> Content:
        return Content(self.name, encode(self._body))

    def merge(self, results: Sequence[T]) -> T:
        return results[0]

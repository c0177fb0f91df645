"""What the generated classes have in common: the object of `loops_async` behind each of them."""
# ruff: noqa: SLF001 - the attributes of handles are private to their users, not to each other

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, NoReturn, ParamSpec, Self, TypeVar

from ._bridge import Bridge, Held, current

__all__ = ["Closing", "Handle", "Opened", "unwrap"]

P = ParamSpec("P")
C = TypeVar("C")


class Handle(Generic[C]):
    """The blocking form of one object of `loops_async`.

    It keeps the handle that made it: letting go of a service client closes it, so whatever came from one holds on.
    """

    _impl: C
    _bridge: Bridge
    _maker: Handle[Any] | None

    def __init__(self, impl: C, maker: Handle[Any] | None = None) -> None:
        self._impl = impl
        self._maker = maker
        self._bridge = current() if maker is None else maker._bridge

    def __repr__(self) -> str:
        return repr(self._impl)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._impl,)


class Closing(Handle[C]):
    """A handle that ``with`` closes."""

    def close(self) -> None:
        """Close what is behind it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bridge.is_of_this_process():  # else it is the parent's, who goes on using it
            self.close()


class Opened(Closing[C]):
    """A handle whose constructor opens what is behind it; `close`, ``with`` or letting go of it closes that again."""

    _held: Held[C]

    def _open(self, make: Callable[P, AbstractAsyncContextManager[C]], /, *args: P.args, **kwargs: P.kwargs) -> None:
        held = current().hold(make, *args, **kwargs)
        super().__init__(held.__enter__())
        self._held = held

    @classmethod
    def _opened(cls, make: Callable[P, AbstractAsyncContextManager[C]], /, *args: P.args, **kwargs: P.kwargs) -> Self:
        handle = cls.__new__(cls)
        handle._open(make, *args, **kwargs)
        return handle

    def close(self) -> None:
        """Close what is behind it; closing it again does nothing."""
        self._held.__exit__(None, None, None)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} belongs to its process: make another one there")


def unwrap(handle: Handle[C]) -> C:
    """Return the object of `loops_async` behind `handle`."""
    return handle._impl  # pyright: ignore[reportPrivateUsage] - private to users of handles, not to this module

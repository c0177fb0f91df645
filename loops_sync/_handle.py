"""What the generated classes have in common: the object of `loops_async` behind each of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import cached_property
from types import TracebackType
from typing import Any, Generic, NoReturn, ParamSpec, Self, TypeVar
from weakref import WeakValueDictionary

from ._bridge import Bridge, Held, current

__all__ = ["Closing", "Handle", "Opened", "unwrap"]

P = ParamSpec("P")
C = TypeVar("C")
H = TypeVar("H", bound="Handle[Any]")


class Handle(Generic[C]):
    """The blocking form of one object of `loops_async`.

    It keeps the handle that it comes from: letting go of a service client closes it, so whatever comes
    from one holds on to it.
    """

    _impl: C
    _bridge: Bridge
    _parent: Handle[Any] | None

    def __init__(self) -> None:
        # No docstring: constructors that do make something would seem to have it.
        raise TypeError(f"{type(self).__name__} is not made directly; help({type(self).__name__}) says what makes one")

    @classmethod
    def _of(cls, impl: C, parent: Handle[Any] | None = None) -> Self:
        """Wrap a core object."""
        handle = cls.__new__(cls)
        handle._impl = impl
        handle._parent = parent
        handle._bridge = current() if parent is None else parent._bridge
        return handle

    def _part(self, kind: type[H], impl: Any) -> H:
        """Wrap a core object that belongs to this one: in the same handle, for as long as anyone keeps that."""
        part: H = self._parts.setdefault(impl, kind._of(impl, self))
        return part

    @cached_property
    def _parts(self) -> WeakValueDictionary[Any, Any]:
        # Weak: a part keeps its parent, and in a cycle both would outlive the last reference to them.
        return WeakValueDictionary()

    def __repr__(self) -> str:
        return repr(self._impl)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._of, (self._impl,)


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
        self._bridge = current()
        self._parent = None
        held = self._bridge.hold(make, *args, **kwargs)
        self._impl = held.__enter__()
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

"""The base classes of the generated classes: each instance forwards to an object of `loops_async`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import cached_property
from types import TracebackType
from typing import Any, Generic, NoReturn, ParamSpec, Self, TypeVar
from weakref import WeakValueDictionary

from loops_async._copies import SameWhenCopied

from ._bridge import Bridge, Held, current

__all__ = ["Closing", "Handle", "Opened", "unwrap"]

P = ParamSpec("P")
C = TypeVar("C")
H = TypeVar("H", bound="Handle[Any]")


class Handle(SameWhenCopied, Generic[C]):
    """The blocking form of one object of `loops_async`.

    It keeps a reference to the handle that created it: a service client that is garbage collected is closed, so the
    objects that it created must keep it alive.
    """

    _impl: C
    _bridge: Bridge
    _parent: Handle[Any] | None

    def __init__(self) -> None:
        # No docstring, since subclasses with a public constructor would inherit it.
        name = type(self).__name__
        raise TypeError(f"{name} is not created directly; help({name}) says how to get one")

    @classmethod
    def _of(cls, impl: C, parent: Handle[Any] | None = None) -> Self:
        """Wrap a core object."""
        handle = cls.__new__(cls)
        handle._impl = impl
        handle._parent = parent
        handle._bridge = current() if parent is None else parent._bridge
        return handle

    def _part(self, kind: type[H], impl: Any) -> H:
        """Wrap a core object that belongs to this one; return the same handle while that is referenced."""
        part: H = self._parts.setdefault(impl, kind._of(impl, self))
        return part

    @cached_property
    def _parts(self) -> WeakValueDictionary[Any, Any]:
        # Weak: a part refers to its parent, and in a cycle both would outlive the last reference from outside.
        return WeakValueDictionary()

    def __repr__(self) -> str:
        return repr(self._impl)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._of, (self._impl,)


class Closing(Handle[C]):
    """A handle that ``with`` closes."""

    def close(self) -> None:
        """Close the object behind the handle."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bridge.is_of_this_process():  # otherwise the parent process still uses it
            self.close()


class Opened(Closing[C]):
    """A handle that opens its object when constructed; `close`, ``with`` or garbage collection closes that again."""

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
        """Close the object behind the handle; closing it again does nothing."""
        self._held.__exit__(None, None, None)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} belongs to its process and cannot be pickled: create another one there"
        )


def unwrap(handle: Handle[C]) -> C:
    """Return the object of `loops_async` behind `handle`."""
    return handle._impl  # pyright: ignore[reportPrivateUsage] - private to users of handles, not to this module

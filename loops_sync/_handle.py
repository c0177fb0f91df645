"""The base classes of the generated classes: each instance forwards to an object of `loops_async`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from functools import cached_property
from inspect import iscoroutinefunction
from types import TracebackType
from typing import Any, Concatenate, Generic, NoReturn, ParamSpec, Self, TypeVar
from weakref import WeakValueDictionary

from loops_async._copies import SameWhenCopied
from loops_async._other_names import KnowsOtherNames
from loops_async.errors import InputError

from ._bridge import Bridge, Held, current

__all__ = ["Closing", "Entered", "Handle", "Opened", "Scope", "unwrap"]

P = ParamSpec("P")
C = TypeVar("C")
T = TypeVar("T")
H = TypeVar("H", bound="Handle[Any]")


class Handle(SameWhenCopied, KnowsOtherNames, Generic[C]):
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

    def _create(self, make: Callable[P, C], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Wrap a new object, which belongs to the bridge's loop as all others do."""
        self._bridge = current()
        self._parent = None
        self._impl = self._bridge.call(make, *args, **kwargs)

    def _behind(self, bridge: Bridge) -> Self:
        """Return a handle of the same object whose calls go through another bridge."""
        handle = self._of(self._impl, self)
        handle._bridge = bridge
        return handle

    def _part(self, kind: type[H], impl: Any) -> H:
        """Wrap a core object that belongs to this one; return the same handle while that is referenced."""
        part: H = self._parts.setdefault(impl, kind._of(impl, self))
        return part

    def _in_threads(
        self, kind: type[H], name: str, function: Callable[Concatenate[H, P], T]
    ) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
        """Return a coroutine function for the core, which calls `function` in a thread with a `kind` of its argument.

        Raises:
            InputError: the argument `name` is a coroutine function, or cannot be called.
        """
        if iscoroutinefunction(function) or not callable(function):
            raise InputError(
                name, f"must be a plain function; coroutine functions are for loops_async; got {function!r}"
            )
        workers = self._bridge.workers
        # This handle itself may be a context that its garbage collection has to leave, so what runs must not keep it.
        parent = self if self._parent is None else self._parent

        async def called(impl: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return await workers.run(function, kind._of(impl, parent), *args, **kwargs)

        return called

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


class Entered(Handle[C]):
    """A handle whose object ``with`` enters and leaves; garbage collection leaves it, too."""

    _held: Held[Any]

    def __enter__(self) -> Self:
        impl: Any = self._impl
        held: Held[Any] = self._bridge.hold(lambda: impl)  # not `self._impl`: what holds it must not keep the handle
        held.__enter__()
        self._held = held
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, traceback)
        self._bridge.workers.join()


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


class Scope(AbstractContextManager[H]):
    """A context of the core whose value is an object with a twin; garbage collection leaves it, too."""

    def __init__(self, kind: type[H], held: Held[Any], parent: Handle[Any]) -> None:
        self._kind = kind
        self._held = held
        self._parent = parent

    def __enter__(self) -> H:
        impl = self._held.__enter__()
        return self._kind._of(impl, self._parent)  # pyright: ignore[reportPrivateUsage] - private to users of handles

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        return self._held.__exit__(kind, error, traceback)


def unwrap(handle: Handle[C]) -> C:
    """Return the object of `loops_async` behind `handle`."""
    return handle._impl  # pyright: ignore[reportPrivateUsage] - private to users of handles, not to this module

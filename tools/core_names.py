"""What `loops_async` exports, and which of its names get twins in which modules of `loops_sync`."""

from __future__ import annotations

from collections import abc
from contextlib import AbstractAsyncContextManager
from inspect import iscoroutinefunction
from types import FunctionType, ModuleType
from typing import Any, Final, get_args, get_origin

BY_HAND: Final = {"start": "_starting"}
"""Functions whose twins no rule makes, and the modules that define these."""

OF_BOTH: Final = frozenset({"CallFuture"})
"""A class for threads and event loops alike, which therefore has no twin."""

FROM_PRIVATE: Final = "_future"
"""The twins' module for handles that a private module of the core defines and no public module lists."""

NOT_PLAIN: Final = (
    AbstractAsyncContextManager,
    abc.AsyncGenerator,
    abc.AsyncIterable,
    abc.AsyncIterator,
    abc.Awaitable,
    abc.Coroutine,
)
"""Types that have no meaning in the blocking form."""


class Core:
    """The core package, and which of its names get twins in which modules."""

    def __init__(self, package: ModuleType) -> None:
        self.name = package.__name__
        self.exports = {name: getattr(package, name) for name in package.__all__}
        members = {name: getattr(package, name) for name in sorted(dir(package)) if name[0] != "_"}
        self.modules = {
            name: value
            for name, value in members.items()
            if isinstance(value, ModuleType) and hasattr(value, "__all__")
        }
        self._handles = {
            value: name for name, value in self.exports.items() if _is_handle(value) and name not in OF_BOTH
        }
        owners = {name: self._owner(name, value) for name, value in self.exports.items()}
        self.owners = {name: owner for name, owner in owners.items() if owner}
        """The names with twins, and beside which export each stands: itself, or the handle that it is an alias of."""
        self.twins = {name: self._module(owner) for name, owner in self.owners.items()}
        self.written_modules = set(self.twins.values())
        self.twins |= {name: module for name, module in BY_HAND.items() if name in self.exports}
        values = self.exports.keys() - self.twins.keys()
        self.value_modules = {name: value for name, value in self.modules.items() if set(value.__all__) <= values}
        """Public modules whose names are all exported and have no twins."""
        self.separate_modules = {
            name: module
            for name, module in self.modules.items()
            if self.exports.keys().isdisjoint(module.__all__)
            and not any(_has_twin(getattr(module, each)) for each in module.__all__)
        }
        """Public modules whose names the package does not export, and which mean the same in both forms."""

    def handle(self, value: Any) -> str | None:
        """Return the name of the handle that `value` is, or is an alias of."""
        kind = get_origin(value) or value
        return self._handles.get(kind) if isinstance(kind, type) else None

    def coroutine_function(self, value: Any) -> tuple[list[Any], Any] | None:
        """Return the parameters and the result of a type of coroutine functions whose first parameter is a handle."""
        parameters, result = get_args(value) if get_origin(value) is abc.Callable else (None, None)
        is_one = isinstance(parameters, list) and parameters and self.handle(parameters[0])
        is_awaited = get_origin(result) in (abc.Awaitable, abc.Coroutine)
        return (parameters, get_args(result)[-1]) if is_one and is_awaited else None

    def is_plain(self, value: Any) -> bool:
        """Whether a type means the same in both packages."""
        if isinstance(value, list):  # the arguments of a `Callable`
            return all(map(self.is_plain, value))
        parts = (get_origin(value), *get_args(value)) if get_origin(value) else ()
        return value not in NOT_PLAIN and not self.handle(value) and all(map(self.is_plain, parts))

    def _owner(self, name: str, value: Any) -> str | None:
        function = self.coroutine_function(value)
        return self.handle(function[0][0] if function else value) or (name if iscoroutinefunction(value) else None)

    def _module(self, owner: str) -> str:
        parts = home(self.exports[owner])["__name__"].split(".")[1:]
        if not any(part.startswith("_") for part in parts):
            return str(parts[-1])
        return next((name for name, module in self.modules.items() if owner in module.__all__), FROM_PRIVATE)


def _is_handle(value: Any) -> bool:
    members = vars(value) if isinstance(value, type) else {}
    coroutines = [name for name, member in members.items() if iscoroutinefunction(member)]
    return any(name == "__aenter__" or not name.startswith("_") for name in coroutines)


def _has_twin(value: Any) -> bool:
    return _is_handle(value) or iscoroutinefunction(value)


def home(value: Any) -> dict[str, Any]:
    """Return the namespace of the module that defines a function or a class.

    It is taken from a function, since the ``__module__`` of a public class may name the package instead.
    """
    is_function = isinstance(value, FunctionType)
    function = value if is_function else next(filter(None, map(function_of, vars(value).values())))
    return function.__globals__


def function_of(member: Any) -> FunctionType | None:
    """Return the function that a method, property or class method is made of."""
    function = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
    return function if isinstance(function, FunctionType) else None

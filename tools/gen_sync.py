"""Write the blocking package `loops_sync` from the signatures and docstrings of `loops_async`.

A class with public coroutines, or with ``async with``, that the core package exports is a *handle*. It gets a twin of
the same name, in a module of the same name, that holds the core object and forwards to it:

=================================================  ============================================================
in the core                                        in the twin
=================================================  ============================================================
coroutine                                          method that runs it on the bridge's loop
coroutine in `PROPERTIES`                          property that runs it at each access
plain method                                       method that runs it on that loop, which owns the state it reads
plain method in `FOR_ANY_THREAD`                   method that calls it
property                                           property; a handle gets the same twin each time
property that can be set                           the same; a handle is unwrapped
property that is a `Policy` of a handle            a `Policy` of the twin
method returning ``AsyncIterator[T]``              method returning `Items`, an ``Iterator[T]`` with ``close``
method returning an async context of a handle      method returning a `Scope`, a plain context of the twin
class with ``open``                                its constructor opens it, as do class methods that return it
class with ``close`` and ``async with``            ``close`` and ``with``
class with ``async with`` alone                    ``with``, which enters and leaves the core's object in one task
class in `CONSTRUCTED`                             its constructor creates the core's object on the bridge's loop
``__aiter__`` and ``__anext__``                    ``__iter__`` and ``__next__``
result that is a handle                            wrapped
argument that is one, or None                      unwrapped
``on_...: Callable[[E], object] | None`` argument  called in the thread that waits for the call
argument `blocking`                                the same, and True by default
argument in `OUTLIVING`                            passed on: the core calls it in a thread of its own
``Iterable[T] | AsyncIterable[T]`` argument        ``Iterable[T]``, stepped in worker threads
coroutine function of a handle, as an argument     function of the handle's twin, called in a thread of its own
coroutine function of values, as an argument       plain function, called in a thread, also in another process
other function with a result, as an argument       passed on: it computes where the core calls it
coroutine function                                 function
name in `BY_HAND`                                  imported from a module of the twin that is written by hand
class in `OF_BOTH`                                 imported from the core
alias of a handle, e.g. ``OperationFuture[T]``     the same alias of its twin, beside it
alias of coroutine functions of a handle           alias of functions of its twin, beside it
anything else that is exported                     imported from the core
public module with only such names                 module of the same name that imports them
=================================================  ============================================================

Docstrings keep their prose, which must be true of both forms: it must not mention awaiting, event loops and the like,
except in a paragraph that `PROSE` replaces. In their code blocks ``await`` is removed, or becomes ``.result()`` where
no call is awaited. A construct without a rule is an error that names it, never a guess.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import inspect
import re
import sys
import textwrap
from collections import abc
from collections.abc import Collection, Mapping
from importlib import import_module
from inspect import iscoroutinefunction
from pathlib import Path
from types import FunctionType, ModuleType, NoneType, UnionType
from typing import Any, Final, Generic, NamedTuple, TypeVar, Union, get_args, get_origin

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 - found in ROOT
from tools.blocking_docs import PROPERTIES, PROSE, TWIN, GenerationError, blocking_docstring
from tools.core_names import FROM_PRIVATE, Core, function_of, home
from tools.generated_files import BANNER, differences, formatted, write

CORE: Final = "loops_async"

CONSTRUCTED: Final = frozenset({"AgentGateway", "InLoopExecutor", "ProcessExecutor", "StalenessGate"})
"""Handles that users create, although there is nothing to open."""

OUTLIVING: Final = frozenset({"on_step"})
"""Callbacks that are still called when the call has returned, so that no thread waits for it."""

FOR_ANY_THREAD: Final = frozenset(
    {
        "AgentRollout.anthropic_client",
        "AgentRollout.openai_client",
        "InLoopExecutor.submit",
        "ProcessExecutor.submit",
        "ServiceClient.dump",
        "ServiceClient.inflight",
    }
)
"""Methods that belong to no loop, and do what is right for the thread that calls them.

The core calls some of them on the bridge's loop, where twins' other methods cannot be called; users call some of them
while that is held.
"""

BLOCKING: Final = "blocking"
"""The parameter of methods that return what is for code that blocks, or for coroutines."""

ADVICE: Final = ": change that, then run `make sync`."

RENAMED: Final = {"__aiter__": "__iter__", "__anext__": "__next__"}

COVERED: Final = ("__init__", "__aenter__", "__aexit__", "__await__", "__repr__", "__reduce__", "__class_getitem__")
"""Special methods that `loops_sync._handle` has in some form for all twins, or that ``result`` replaces."""

CORE_ONLY: Final = ("__del__", "SameWhenCopied", "KnowsOtherNames")
"""A special method that only the core's object needs, and a base class that `loops_sync._handle` has for all twins."""

FOREIGN: Final = ("builtins", "collections.abc", "concurrent.futures", "msgspec", "os", "typing")
"""Other modules whose types may appear in signatures."""

PACKAGE_DOC: Final = f"""The blocking form of `{CORE}`: the same classes and methods, as plain calls.

Submitting and waiting remain two steps: an operation returns a future, whose ``result`` waits. All network traffic
runs in one thread of its own, so any number of threads may make calls, including the main thread of a notebook."""


def _base(members: Mapping[str, Any]) -> str:
    """Return the name of the base class of the twin of a class with these members."""
    if "open" in members:
        return "Opened"
    if "__aenter__" in members:
        return "Closing" if "close" in members else "Entered"
    return "Handle"


class Place(NamedTuple):
    """Where a function is defined in the twin, and how it reaches its original."""

    original: str
    first: str = ""
    """``self``, ``cls`` or nothing."""
    decorator: str = ""

    @property
    def bridge(self) -> str:
        return "self._bridge" if self.first == "self" else "current()"


class Module:
    """One module of twins while it is generated."""

    def __init__(self, core: Core, name: str) -> None:
        self._core = core
        self._name = name
        self._twins = {twin: core.exports[twin] for twin in sorted(core.twins) if core.twins[twin] == name}
        public = core.modules.get(name)
        self._values = {name: core.exports[name] for name in public.__all__ if name in core.exports} if public else {}
        self._home = vars(public) if public else home(core.exports[core.owners[next(iter(self._twins))]])
        self._file = f"{self._home['__name__'].replace('.', '/')}.py"
        self._imports = {f"import {core.name} as _core"}
        self._variables: set[str] = set()
        self._at = "module"

    def write(self) -> str:
        """Return the source, not yet formatted."""
        try:
            doc = self._docstring(self._home["__doc__"])
            # Aliases last, since they are evaluated at import.
            ordered = sorted(self._twins.items(), key=lambda twin: get_origin(twin[1]) is not None)
            parts = [self._definition(name, value) for name, value in ordered]
            for name, value in self._values.items():
                self._use(name, value)
        except GenerationError as problem:
            raise GenerationError(f"{self._file}: {self._at}: {problem}") from None
        variables = [f'{name} = TypeVar("{name}")' for name in sorted(self._variables)]
        names = sorted({*self._twins, *self._values})
        head = [f"{BANNER}{self._file}{ADVICE}", doc, "from __future__ import annotations", *sorted(self._imports)]
        return "\n".join([*head, f"__all__ = {names}", "", *variables, *parts])

    def _definition(self, name: str, value: Any) -> str:
        self._at = name
        # What a module imports for type checking only is public elsewhere.
        self._home = {**self._core.exports, **home(self._core.exports[self._core.owners[name]])}
        if isinstance(value, type):
            return self._class(name, value)
        if isinstance(value, FunctionType):
            return self._function(value, Place(f"_core.{name}"))
        self._imports.add("from typing import TypeAlias")
        function = self._core.coroutine_function(value)
        return f"{name}: TypeAlias = {self._blocking_type(*function) if function else self._written(value)}"

    def _class(self, name: str, kind: type) -> str:
        if any(base not in (object, Generic) and base.__name__ not in CORE_ONLY for base in kind.__bases__):
            raise GenerationError("no rule for base classes")
        base = _base(vars(kind))
        self._use_runtime("_handle", base)
        variables = ", ".join(map(self._written, getattr(kind, "__parameters__", ())))
        parts = [f"class {name}({base}[_core.{name}{f'[{variables}]' if variables else ''}]):"]
        parts.append(textwrap.indent(self._docstring(kind.__doc__), "    "))
        if self._name == FROM_PRIVATE:
            parts.append(f'    __module__ = "{TWIN}"  # where users find it')
        for member, value in vars(kind).items():
            self._at = f"{name}.{member}"
            parts.append(textwrap.indent(self._member(name, member, value, base), "    "))
        return "\n".join(parts)

    def _member(self, owner: str, name: str, member: Any, base: str) -> str:
        function, is_opened = function_of(member), base == "Opened"
        if name == "__init__" and function and (is_opened or owner in CONSTRUCTED):
            opener = "self._open" if is_opened else "self._create"
            return self._function(function, Place(f"_core.{owner}", "self"), opener)
        if name == "__aiter__" and function and self._annotation(function, "return") in (owner, "Self"):
            self._imports.add("from typing import Self")
            return self._assembled(function, Place("", "self"), [], "Self", "return self")
        if name in RENAMED and function:
            return self._function(function, Place(f"self._impl.{name}", "self"))
        if name.startswith("__") and name not in (*COVERED, *CORE_ONLY) and function:
            raise GenerationError("no rule for this special method")
        if name == "__aexit__" and base == "Entered" and function and self._annotation(function, "return") != "None":
            raise GenerationError("no rule for a context that may end an error")
        if name.startswith("_") or (name == "open" and is_opened):
            return ""
        if not function or not isinstance(member, FunctionType | classmethod | property):
            raise GenerationError("no rule for such an attribute of a class")
        if isinstance(member, classmethod):
            is_opening = is_opened and self._annotation(function, "return") in (owner, "Self")
            place = Place(f"_core.{owner}.{name}", "cls", "@classmethod")
            return self._function(function, place, "return cls._opened" if is_opening else "")
        is_property = isinstance(member, property) or self._at in PROPERTIES
        place = Place(f"self._impl.{name}", "self", "@property" if is_property else "")
        if name == "close" and is_opened:
            return self._assembled(function, place, [], "None", "super().close()")
        if isinstance(member, property):
            return self._property(function, place) + self._setter(member, place)
        return self._function(function, place)

    def _property(self, function: FunctionType, place: Place) -> str:
        if iscoroutinefunction(function):
            raise GenerationError("a property that awaits must be a method in PROPERTIES")
        if sampler := re.fullmatch(r"Policy\[(\w+)\]", text := self._annotation(function, "return")):
            self._use("Policy", self._home["Policy"])
            self._use(sampler[1], self._home[sampler[1]])
            wrapped = f"return Policy(self._part({sampler[1]}, policy.sampler), policy.version)"
            return self._assembled(function, place, [], text, f"policy = {place.original}", wrapped)
        text, is_handle = self._result(function)
        body = f"return self._part({text}, {place.original})" if is_handle else f"return {place.original}"
        return self._assembled(function, place, [], text, body)

    def _setter(self, member: property, place: Place) -> str:
        function = function_of(member.fset)
        if function is None:
            return ""
        [declared], passed_on = self._parameters(function, place)
        value = passed_on.partition("=")[2]
        setter = Place(place.original, place.first, f"@{function.__name__}.setter")
        return self._assembled(function, setter, [declared], "None", f"{place.original} = {value}")

    def _function(self, function: FunctionType, place: Place, opener: str = "") -> str:
        declared, passed_on = self._parameters(function, place)
        call = f"({', '.join(filter(None, [place.original, passed_on]))})"
        is_coroutine = iscoroutinefunction(function)
        relayed = re.search(r"(\w+)=relay\.post", passed_on)
        scope = re.fullmatch(r"AbstractAsyncContextManager\[(\w+)\]", self._annotation(function, "return"))
        if (relayed and not (is_coroutine or scope)) or (declared and place.decorator == "@property"):
            raise GenerationError("no rule for these parameters")
        if opener:  # a constructor or an alternative one, which opens the new object
            self._imports.update({"from typing import Self"} if place.first == "cls" else ())
            return self._assembled(function, place, declared, "Self" if place.first == "cls" else "None", opener + call)
        if place.bridge == "current()":
            self._use_runtime("_bridge", "current")
        item = None if is_coroutine else re.fullmatch(r"AsyncIterator\[(.+)\]", self._annotation(function, "return"))
        if item and self._is_plain(item[1]):
            self._use_runtime("_bridge", "Items")
            body = f"return {place.bridge}.iterate{call}"
            return self._assembled(function, place, declared, f"Items[{item[1]}]", body)
        run = "advance" if function.__name__ == "__anext__" else "run" if is_coroutine else "hold" if scope else "call"
        value = f"{'relay' if relayed else place.bridge}.{run}{call}"
        if self._at in FOR_ANY_THREAD:
            value = f"{place.original}({passed_on})"
        lines = [f"relay = {place.bridge}.relay({relayed[1]})"] if relayed else []
        if scope and place.first == "self" and self._core.handle(self._home.get(scope[1])):
            self._use(scope[1], self._home[scope[1]])
            self._use_runtime("_handle", "Scope")
            self._imports.add("from contextlib import AbstractContextManager")
            text, value = f"AbstractContextManager[{scope[1]}]", f"Scope({scope[1]}, {value}, self)"
            return self._assembled(function, place, declared, text, *lines, f"return {value}")
        text, is_handle = self._result(function)
        if is_handle:
            value = f"{text}._of({value}{', self' if place.first == 'self' else ''})"
        return self._assembled(function, place, declared, text, *lines, value if text == "None" else f"return {value}")

    def _assembled(self, function: FunctionType, place: Place, declared: list[str], result: str, *body: str) -> str:
        parameters = ", ".join(filter(None, [place.first, *declared]))
        lines = filter(None, [self._docstring(function.__doc__), *body])
        name = RENAMED.get(function.__name__, function.__name__)
        head = f"\n{place.decorator}\ndef {name}({parameters}) -> {result}:\n"
        return head + textwrap.indent("\n".join(lines), "    ")

    def _annotation(self, function: FunctionType, name: str) -> str:
        text = function.__annotations__.get(name)
        if not isinstance(text, str):
            raise GenerationError(f"{name} has no annotation, or its module no `from __future__ import annotations`")
        return text

    def _parameters(self, function: FunctionType, place: Place) -> tuple[list[str], str]:
        """Return the declarations of the parameters, and the arguments of the call of the original."""
        declared: list[str] = []
        passed_on: list[str] = []
        parameters = list(inspect.signature(function).parameters.values())[1 if place.first else 0 :]
        is_variadic = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        for parameter in parameters:
            name, default, kind = parameter.name, parameter.default, parameter.kind
            default = True if name == BLOCKING else default
            if kind in (parameter.POSITIONAL_ONLY, parameter.VAR_KEYWORD):
                raise GenerationError(f"no rule for parameter {parameter}")
            if kind is parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in declared):
                declared.append("*")
            text, value = self._argument(name, self._annotation(function, name), place)
            if default is not None and not isinstance(
                default, bool | int | float | str | tuple | type(parameter.empty)
            ):
                self._use(repr(default), default)
            star = "*" if kind is parameter.VAR_POSITIONAL else ""
            declared.append(f"{star}{name}: {text}" + ("" if default is parameter.empty else f" = {default!r}"))
            # By keyword where that is possible: a parameter renamed in the core is then a type error in a stale twin.
            is_positional = star or (is_variadic and kind is parameter.POSITIONAL_OR_KEYWORD)
            passed_on.append(f"{star}{value}" if is_positional else f"{name}={value}")
        return declared, ", ".join(passed_on)

    def _argument(self, name: str, annotation: str, place: Place) -> tuple[str, str]:
        """Return the declared type of a parameter, and the expression that the original is called with."""
        results = re.findall(r"Callable\[(?:\[.*?\]|\.\.\.), (\w+)", annotation)
        is_callback = re.fullmatch(r"Callable\[\[.+\], object\] \| None", annotation) is not None
        # A function whose result is used computes; another one reports, so it must be a callback.
        has_rule = is_callback if results and name.startswith("on_") else {"object", "None"}.isdisjoint(results)
        if has_rule and self._is_plain(annotation):
            return annotation, "relay.post" if is_callback and name not in OUTLIVING else name
        handle = annotation.removesuffix(" | None")
        if self._core.handle(self._home.get(handle)):
            self._use(handle, self._home[handle])
            self._use_runtime("_handle", "unwrap")
            return annotation, (
                f"unwrap({name})" if handle == annotation else f"None if {name} is None else unwrap({name})"
            )
        stepped = re.fullmatch(r"(Iterable\[(.+)\]) \| AsyncIterable\[\2\]", annotation)
        if stepped and self._is_plain(stepped[1]):
            self._use_runtime("_bridge", "stepped_in_worker_threads")
            return stepped[1], f"stepped_in_worker_threads({name})"
        awaited = re.fullmatch(r"Callable\[(\[.+\]), Awaitable\[(\w+)\]\]", annotation)
        has_result = awaited is not None and isinstance(self._home.get(awaited[2]), TypeVar)
        if awaited and has_result and self._is_plain(text := f"Callable[{awaited[1]}, {awaited[2]}]"):
            self._use_runtime("_workers", "InThread")
            return text, f"InThread({name})"
        value = eval(annotation, self._home)
        if place.first == "self" and (function := self._core.coroutine_function(value)):
            is_alias = self._core.exports.get(annotation) is value
            if is_alias:
                self._use(annotation, value)
            text = annotation if is_alias else self._blocking_type(*function)
            return text, f'self._in_threads({self._written(function[0][0])}, "{name}", {name})'
        raise GenerationError(f"no rule for parameter {name}: {annotation}")

    def _result(self, function: FunctionType) -> tuple[str, bool]:
        """Return the type of a result, and whether it is a handle."""
        text = self._annotation(function, "return")
        if self._is_plain(text):
            return text, False
        outer, _, inner = text.partition("[")
        handle = self._core.handle(self._home.get(outer))
        is_opened = handle and "open" in vars(self._core.exports[handle])
        if not handle or is_opened or (inner and not self._is_plain(inner[:-1])):
            raise GenerationError(f"no rule for the result {text}")
        self._use(outer, self._home[outer])
        return text, True

    def _is_plain(self, annotation: str) -> bool:
        """Whether an annotation means the same in both packages; if so, import the names in it."""
        nodes = list(ast.walk(ast.parse(annotation, mode="eval")))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        if "Literal" not in names and any(isinstance(getattr(node, "value", None), str) for node in nodes):
            raise GenerationError(f"a type in quotes, whose names would not be found: {annotation}")
        values = {name: self._home.get(name, getattr(builtins, name, None)) for name in sorted(names)}
        is_plain = all(map(self._core.is_plain, values.values()))
        for name, value in values.items() if is_plain else ():
            self._use(name, value)
        return is_plain

    def _blocking_type(self, parameters: list[Any], result: Any) -> str:
        """Return the type of the functions that stand for coroutine functions."""
        self._use("Callable", abc.Callable)
        return f"Callable[[{', '.join(map(self._written, parameters))}], {self._written(result)}]"

    def _written(self, value: Any) -> str:
        """Return a type as source, and import the names in it."""
        origin, arguments = get_origin(value), get_args(value)
        if origin in (Union, UnionType):
            return " | ".join(map(self._written, arguments))
        kind = origin or value
        name = "None" if value is NoneType else self._core.handle(kind) or str(kind.__name__)
        self._use(name, kind)
        return f"{name}[{', '.join(map(self._written, arguments))}]" if arguments else name

    def _use(self, name: str, value: Any) -> None:
        """Import a name: that of the twin if there is one."""
        if isinstance(value, TypeVar):
            self._variables.add(name)
            self._imports.add("from typing import TypeVar")
        elif self._core.exports.get(name, self) is value:
            module = self._core.twins.get(name)
            if module != self._name:
                self._imports.add(f"from {f'.{module}' if module else self._core.name} import {name}")
        elif not hasattr(builtins, name):
            module = next((each for each in FOREIGN if getattr(import_module(each), name, self) is value), None)
            if module is None:
                raise GenerationError(f"{name} is in a public signature and is not exported by {self._core.name}")
            self._imports.add(f"from {module} import {name}")

    def _use_runtime(self, module: str, name: str) -> None:
        self._imports.add(f"from {TWIN}.{module} import {name}")

    def _docstring(self, doc: str | None) -> str:
        return blocking_docstring(doc, self._core.name, PROSE.get(self._at)) if doc else ""


# --- the package -----------------------------------------------------------------------------------------------------


def generate(package: ModuleType) -> dict[str, str]:
    """Return every file of the twin of a package, by name.

    Raises:
        GenerationError: a construct has no rule; the message names it.
    """
    core = Core(package)
    sources = {f"{name}.py": Module(core, name).write() for name in sorted(core.written_modules)}
    for name, module in core.value_modules.items():
        sources[f"{name}.py"] = _imported(core, module.__name__, module.__doc__ or "", module.__all__)
    for name, module in core.separate_modules.items():
        sources[f"{name}.py"] = _imported(
            core, module.__name__, module.__doc__ or "", module.__all__, of=module.__name__
        )
    others = [f"from . import {name} as {name}" for name in (*core.value_modules, *core.separate_modules)]
    others += [f"from .{module} import {name}" for name, module in core.twins.items()]
    sources["__init__.py"] = _imported(core, f"{core.name}/__init__.py", PACKAGE_DOC, core.exports, *others)
    return formatted(sources)


def _imported(core: Core, file: str, doc: str, names: Collection[str], *others: str, of: str = "") -> str:
    """Return a module that imports these values, `of` the core's package or module, with `others` as import lines."""
    values = f"from {of or core.name} import {', '.join(set(names) - core.twins.keys())}"
    head = [f"{BANNER}{file}{ADVICE}", blocking_docstring(doc, core.name), values]
    return "\n".join([*head, *others, f"__all__ = {sorted(names)}"])


def main(arguments: list[str] | None = None, root: Path = ROOT / TWIN) -> int:
    """Write the twin, or check it; exit with 1 when it is stale or a construct has no rule."""
    parser = argparse.ArgumentParser(description=f"Write {TWIN} from {CORE}.")
    parser.add_argument("--check", action="store_true", help="compare only, and fail when something differs")
    is_check = parser.parse_args(arguments).check
    try:
        files = generate(import_module(CORE))
    except GenerationError as problem:
        print(problem, file=sys.stderr)
        return 1
    stale = differences(files, root)
    print("\n".join(stale) or f"{root.name}: up to date with {CORE}")
    if not is_check:
        write(files, root)
    elif stale:
        print("run `make sync`", file=sys.stderr)
    return 1 if is_check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

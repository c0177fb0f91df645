"""Write the blocking package `loops_sync` from the signatures and docstrings of `loops_async`.

A class with public coroutines that the core package exports is a *handle*. It gets a twin of the same name, in a
module of the same name, that holds the core object and forwards to it:

===========================================  ==================================================================
in the core                                  in the twin
===========================================  ==================================================================
coroutine                                    method that runs it on the bridge's loop
coroutine marked `blocking_property`         property that runs it at each access
plain method                                 method that runs it on that loop, since what it reads lives there
property                                     property
method returning ``AsyncIterator[T]``        method returning `Items`, an ``Iterator[T]`` with ``close``
`asynccontextmanager`                        `contextmanager`
class with ``open``                          its constructor opens it, as do class methods that return it
class with ``close`` and ``async with``      ``close`` and ``with``
`OperationFuture`                            `loops_sync._future.OperationFuture`, written by hand
result that is a handle, or list or None     wrapped
argument that is one                         unwrapped
awaitable callback                           plain callback, called in a worker thread
``AsyncIterable[T]`` argument                ``Iterable[T]``, stepped in worker threads
coroutine function                           function
type alias of handles                        the same alias of their twins
anything else that is exported               imported from the core
===========================================  ==================================================================

In docstrings only code blocks change: ``await`` goes, or becomes ``.result()`` where no call is awaited. Whatever has
no rule is an error that names it, never a guess.

Usage: python tools/gen_sync.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import io
import keyword
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

ROOT: Final = Path(__file__).resolve().parent.parent

RUNTIME: Final = "loops_sync"
"""The package whose bridge every twin uses."""

BY_HAND: Final = {"OperationFuture": "_future"}
"""Core classes whose twins are written by hand, and the modules of `RUNTIME` where they stand."""

FILES_BY_HAND: Final = frozenset({"_bridge.py", "_future.py", "_handle.py"})

COVERED_BY_BASE: Final = frozenset(
    {"__init__", "__aenter__", "__aexit__", "__repr__", "__reduce__", "__getstate__", "__setstate__"}
)
"""Special methods that the classes of `loops_sync._handle` have for their twins."""

DECORATORS: Final = frozenset({"asynccontextmanager", "blocking_property", "classmethod", "property"})

ASYNC_ITERATORS: Final = frozenset({"AsyncGenerator", "AsyncIterator"})

NOT_PLAIN: Final = ASYNC_ITERATORS | {
    "AbstractAsyncContextManager",
    "AsyncContextManager",
    "AsyncIterable",
    "Awaitable",
    "Coroutine",
    "Future",
    "Self",
    "Task",
    "anyio",
    "asyncio",
}
"""Names in an annotation that mean something else, or nothing, on the other side."""

PACKAGE_DOC: Final = '''"""The blocking twin of `{core}`: the same classes and methods, without `await`.

Submitting and waiting stay two steps: what `{core}` awaits to get a result is ``.result()`` here. Everything runs
on one event loop in a thread of its own, so any thread may call, also one with an event loop, such as a notebook's.
"""'''

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


class GenerationError(Exception):
    """The core has something that no rule covers."""


# --- the core --------------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """What an imported name stands for: ``from module import name``, or ``import module`` where `name` is None."""

    module: str
    name: str | None


class Handle(NamedTuple):
    """A core class that gets a twin."""

    module: str
    name: str
    is_opened: bool


class Module:
    """One module of the core, parsed."""

    def __init__(self, package: str, path: Path) -> None:
        self.name = path.stem
        self.qualified = f"{package}.{path.stem}"
        self.file = f"{package}/{path.name}"
        self.text = path.read_text("utf-8")
        self.tree = ast.parse(self.text)
        self.imports = dict(_imports(self.tree, package))
        self.defined = dict(_definitions(self.tree))

    def source(self, node: ast.AST) -> str:
        """Return `node` as it was written."""
        text = ast.get_source_segment(self.text, node)
        assert text is not None
        return text


class Core:
    """The core package: its modules, and which of their names it exports."""

    def __init__(self, root: Path) -> None:
        self.name = root.name
        self.modules = {path.stem: Module(self.name, path) for path in sorted(root.glob("*.py"))}
        self.exports: dict[str, list[str]] = {}
        for node in self.modules["__init__"].tree.body:
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module in self.modules:
                self.exports.setdefault(node.module, []).extend(alias.name for alias in node.names)
        self._handles = {(handle.module, handle.name): handle for handle in self._find_handles()}
        self.twins = [module for module, names in self.exports.items() if self._needs_twin(module, names)]
        self.blocking_properties = frozenset(self._find_blocking_properties())

    def handle(self, module: Module, name: str) -> Handle | None:
        """Return the handle that `name` means in `module`, directly or as a type alias."""
        module, name = self.home(module, name)
        if (module.name, name) in self._handles:
            return self._handles[module.name, name]
        value = alias_value(module.defined.get(name))
        target = value.value if isinstance(value, ast.Subscript) else value
        return self.handle(module, target.id) if isinstance(target, ast.Name) else None

    def home(self, module: Module, name: str) -> tuple[Module, str]:
        """Return where the core defines `name` of `module`, and the name it has there."""
        origin = module.imports.get(name)
        inside = self.modules.get(origin.module.removeprefix(f"{self.name}.")) if origin else None
        return (inside, origin.name) if origin and origin.name and inside else (module, name)

    def _find_handles(self) -> Iterator[Handle]:
        for module, names in self.exports.items():
            for name in names:
                definition = self.modules[module].defined.get(name)
                if isinstance(definition, ast.ClassDef) and _is_handle(definition):
                    if module.startswith("_") and name not in BY_HAND:
                        raise GenerationError(f"{self.modules[module].file}: {name} has coroutines; name it without _")
                    yield Handle(module, name, "open" in methods_of(definition))

    def _needs_twin(self, module: str, names: list[str]) -> bool:
        def needs(name: str) -> bool:
            return isinstance(self.modules[module].defined.get(name), ast.AsyncFunctionDef) or bool(
                self.handle(self.modules[module], name)
            )

        return not module.startswith("_") and any(map(needs, names))

    def _find_blocking_properties(self) -> Iterator[str]:
        for module, name in self._handles:
            definition = self.modules[module].defined[name]
            assert isinstance(definition, ast.ClassDef)
            for method in methods_of(definition).values():
                if "blocking_property" in decorators_of(method):
                    yield method.name


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[str, Origin]]:
    """Yield what each imported name of a module stands for, also those imported for type checking only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name.split(".")[0], Origin(alias.name, None)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Modules with twins stand directly in their package, where one dot is enough.
            module = ".".join(filter(None, (package if node.level else None, node.module)))
            yield from ((alias.asname or alias.name, Origin(module, alias.name)) for alias in node.names)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node
        elif isinstance(node, ast.Assign):
            yield from ((target.id, node) for target in node.targets if isinstance(target, ast.Name))


def _is_handle(definition: ast.ClassDef) -> bool:
    return any(
        isinstance(method, ast.AsyncFunctionDef) and not name.startswith("_")
        for name, method in methods_of(definition).items()
    )


def alias_value(node: ast.stmt | None) -> ast.expr | None:
    """Return what a type alias stands for."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Name) and node.annotation.id == "TypeAlias":
        return node.value
    return None


def methods_of(definition: ast.ClassDef) -> dict[str, Function]:
    """Return the methods of a class by name."""
    return {node.name: node for node in definition.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def decorators_of(function: Function) -> set[str]:
    """Return the decorators as they are written."""
    return {ast.unparse(decorator) for decorator in function.decorator_list}


def yields(function: Function) -> bool:
    """Whether the function itself is a generator, whatever the functions inside it are."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            waiting.extend(ast.iter_child_nodes(node))
    return False


# --- one twin --------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A type as the twin has it, and how a value comes to it: from one expression to another."""

    text: str
    convert: Callable[[str], str]


class Place(NamedTuple):
    """Where a function stands in the twin, and how it reaches its original."""

    indent: str = ""
    first: str | None = None
    """``self`` or ``cls``."""
    core: str = "_core"
    bridge: str = "current()"

    def wrapped(self, handle: Handle, value: str) -> str:
        """Return the expression that wraps `value`; what an object makes keeps that object alive."""
        return f"{handle.name}({value}, self)" if self.first == "self" else f"{handle.name}({value})"


class Signature(NamedTuple):
    """Parameters as they are declared, and as they are handed on."""

    declared: str
    handed_on: list[str]

    def call(self, function: str, original: str) -> str:
        """Return the call of `function` with `original` and everything that is handed on."""
        return f"{function}({', '.join([original, *self.handed_on])})"


class Twin:
    """The twin of one module while it is written."""

    def __init__(self, core: Core, module: Module) -> None:
        self._core = core
        self._module = module
        self._imports: set[tuple[str, str]] = set()
        self._problems: list[str] = []

    def write(self) -> str:
        """Return the twin's source, not yet formatted."""
        exported = set(self._core.exports[self._module.name])
        with self._noting("exports"):
            if missing := exported - self._module.defined.keys():
                raise GenerationError(f"{', '.join(sorted(missing))} must be imported from where it is defined")
        parts = [self._definition(name) for name in self._module.defined if name in exported]
        doc = self._docstring(self._module.tree)
        if self._problems:
            raise GenerationError("\n".join(self._problems))
        imports = sorted(f"from {module} import {name}" for module, name in self._imports)
        all_names = f"__all__ = {sorted(exported)!r}"
        head = [_banner(self._module), doc, "from __future__ import annotations", *imports, all_names]
        return "\n".join([*head, "", *parts])

    def _definition(self, name: str) -> str:
        node = self._module.defined[name]
        handle = self._core.handle(self._module, name)
        with self._noting(name):
            if handle is not None and isinstance(node, ast.ClassDef):
                return self._class(node, handle)
            if handle is not None:
                self._use_names(node)
                return self._module.source(node)
            if isinstance(node, ast.AsyncFunctionDef):
                self._use(self._core.name, f"{self._module.name} as _core")
                self._use(f"{RUNTIME}._bridge", "current")
                return self._function(node, Place())
            self._use(self._module.qualified, f"{name} as {name}")
        return ""

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """Note what has no rule and go on, so that one run tells everything."""
        try:
            yield
        except GenerationError as problem:
            self._problems.append(f"{self._module.file}: {name}: {problem}")

    # --- classes ---

    def _class(self, node: ast.ClassDef, handle: Handle) -> str:
        methods = methods_of(node)
        base = "Opened" if handle.is_opened else "Closing" if "__aenter__" in methods else "Handle"
        self._check_class(node, methods, base)
        self._use(self._core.name, f"{self._module.name} as _core")
        self._use(f"{RUNTIME}._handle", base)
        parts = [f"class {node.name}({base}[_core.{node.name}]):", f"    {self._docstring(node)}"]
        for method in methods.values():
            with self._noting(f"{node.name}.{method.name}"):
                parts.append(self._method(method, handle))
        return "\n".join(parts)

    def _check_class(self, node: ast.ClassDef, methods: Mapping[str, Function], base: str) -> None:
        if node.bases or node.decorator_list:
            raise GenerationError("no rule for base classes and decorators")
        needed = {"Opened": {"__init__", "__aenter__", "__aexit__", "close"}, "Closing": {"__aexit__", "close"}}
        if missing := needed.get(base, set()) - methods.keys():
            raise GenerationError(f"a class with open or `async with` also needs {', '.join(sorted(missing))}")
        for statement in node.body:
            for name, _ in _definitions(ast.Module([statement], [])):
                if name not in methods and not name.startswith("_"):
                    raise GenerationError(f"no rule for the attribute {name} of a class")

    def _method(self, node: Function, handle: Handle) -> str:
        decorators = decorators_of(node)
        if node.name == "__init__" and handle.is_opened:
            return self._opening(node, Place("    ", "self", "_core"), f"_core.{handle.name}")
        if node.name.startswith("__") and node.name not in COVERED_BY_BASE:
            raise GenerationError("no rule for this special method")
        if node.name.startswith("_") or (handle.is_opened and node.name == "open"):
            return ""
        if "classmethod" not in decorators:
            return self._function(node, Place("    ", "self", "self._impl", "self._bridge"), handle)
        place = Place("    ", "cls", f"_core.{handle.name}")
        if handle.is_opened and isinstance(node, ast.FunctionDef) and self._returns(node, handle):
            return self._opening(node, place, f"_core.{handle.name}.{node.name}")
        self._use(f"{RUNTIME}._bridge", "current")
        return self._function(node, place)

    def _returns(self, node: Function, handle: Handle) -> bool:
        returned = node.returns
        return isinstance(returned, ast.Name) and (
            returned.id == "Self" or self._core.handle(self._module, returned.id) == handle
        )

    def _opening(self, node: Function, place: Place, original: str) -> str:
        """Write a constructor or an alternative one, which opens what it makes."""
        signature = self._signature(node, place)
        if node.name == "__init__":
            return self._assembled(node, place, signature, "None", signature.call("self._open", original))
        self._use("typing", "Self")
        body = f"return {signature.call('cls._opened', original)}"
        return self._assembled(node, place, signature, "Self", body, "@classmethod")

    # --- functions ---

    def _function(self, node: Function, place: Place, handle: Handle | None = None) -> str:
        decorators = decorators_of(node)
        if unknown := decorators - DECORATORS:
            raise GenerationError(f"no rule for the decorator {', '.join(sorted(unknown))}")
        if node.returns is None:
            raise GenerationError("it has no return annotation")
        signature = self._signature(node, place)
        original = f"{place.core}.{node.name}"
        above = "@classmethod" if "classmethod" in decorators else ""
        if "asynccontextmanager" in decorators:
            return self._context(node, place, signature, original)
        if self._is_iterator(node):
            item = self._item(node.returns)
            self._use_names(item)
            self._use(f"{RUNTIME}._bridge", "Items")
            body = f"return {signature.call(f'{place.bridge}.iterate', original)}"
            return self._assembled(node, place, signature, f"Items[{self._module.source(item)}]", body, above)
        form = self._result(node.returns, place)
        if handle is not None and handle.is_opened and node.name == "close":
            body = "super().close()"
        elif "property" in decorators:
            above, body = "@property", f"return {form.convert(original)}"
        else:
            above = "@property" if "blocking_property" in decorators else above
            verb = "run" if isinstance(node, ast.AsyncFunctionDef) else "call"
            value = signature.call(f"{place.bridge}.{verb}", original)
            body = value if form.text == "None" else f"return {form.convert(value)}"
        return self._assembled(node, place, signature, form.text, body, above)

    def _context(self, node: Function, place: Place, signature: Signature, original: str) -> str:
        assert node.returns is not None
        form = self._result(self._item(node.returns), place)
        self._use("collections.abc", "Iterator")
        self._use("contextlib", "contextmanager")
        held = signature.call(f"{place.bridge}.hold", original)
        body = f"with {held} as value:\n{place.indent}        yield {form.convert('value')}"
        return self._assembled(node, place, signature, f"Iterator[{form.text}]", body, "@contextmanager")

    def _assembled(
        self, node: Function, place: Place, signature: Signature, result: str, body: str, decorator: str = ""
    ) -> str:
        lines = [decorator, f"def {node.name}({signature.declared}) -> {result}:"]
        lines += [f"    {self._docstring(node)}", f"    {body}"]
        return "\n" + "\n".join(f"{place.indent}{line}" for line in lines if line.strip())

    def _is_iterator(self, node: Function) -> bool:
        is_plain_function = isinstance(node, ast.FunctionDef)
        return (is_plain_function or yields(node)) and _outer_name(node.returns) in ASYNC_ITERATORS

    def _item(self, returned: ast.expr) -> ast.expr:
        """Return ``T`` of ``AsyncIterator[T]`` or ``AsyncGenerator[T, ...]``."""
        if _outer_name(returned) not in ASYNC_ITERATORS or not isinstance(returned, ast.Subscript):
            raise GenerationError(f"no rule for the result {self._module.source(returned)}")
        inner = returned.slice
        return inner.elts[0] if isinstance(inner, ast.Tuple) else inner

    def _docstring(self, node: ast.Module | ast.ClassDef | Function) -> str:
        """Return the docstring's literal with its code blocks made blocking; nothing if there is none."""
        if ast.get_docstring(node) is None:
            return ""
        assert isinstance(node.body[0], ast.Expr)
        literal = self._module.source(node.body[0].value)
        return blocking_docstring(literal, self._core.name, self._core.blocking_properties)

    # --- parameters and results ---

    def _signature(self, node: Function, place: Place) -> Signature:
        arguments = node.args
        before = [*arguments.posonlyargs, *arguments.args][1 if place.first else 0 :]
        defaults = [None] * (len(before) - len(arguments.defaults)) + arguments.defaults[-len(before) :]
        declared = [place.first] if place.first else []
        handed_on = []
        for parameter, default in zip(before, defaults, strict=True):
            text, value = self._parameter(parameter, default)
            declared.append(text)
            # By keyword where that is possible: a parameter renamed in the core is then a type error in a stale twin.
            by_position = parameter in arguments.posonlyargs or arguments.vararg is not None
            handed_on.append(value if by_position else f"{parameter.arg}={value}")
        if arguments.posonlyargs:
            declared.insert(len(arguments.posonlyargs), "/")
        if arguments.vararg:
            declared.append(f"*{self._parameter(arguments.vararg, None, needs_plain=True)[0]}")
            handed_on.append(f"*{arguments.vararg.arg}")
        elif arguments.kwonlyargs:
            declared.append("*")
        for parameter, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            text, value = self._parameter(parameter, default)
            declared.append(text)
            handed_on.append(f"{parameter.arg}={value}")
        if arguments.kwarg:
            declared.append(f"**{self._parameter(arguments.kwarg, None, needs_plain=True)[0]}")
            handed_on.append(f"**{arguments.kwarg.arg}")
        if "blocking_property" in decorators_of(node) and handed_on:
            raise GenerationError("a property takes no arguments")
        return Signature(", ".join(declared), handed_on)

    def _parameter(self, parameter: ast.arg, default: ast.expr | None, *, needs_plain: bool = False) -> tuple[str, str]:
        """Return a parameter's declaration, and the expression that hands it on."""
        if parameter.annotation is None:
            raise GenerationError(f"parameter {parameter.arg} has no annotation")
        form = self._argument(parameter.annotation)
        if form is None or (needs_plain and form.convert("x") != "x"):
            raise GenerationError(f"no rule for parameter {parameter.arg}: {self._module.source(parameter.annotation)}")
        text = f"{parameter.arg}: {form.text}"
        if default is not None:
            self._use_names(default)
            text += f" = {self._module.source(default)}"
        return text, form.convert(parameter.arg)

    def _argument(self, annotation: ast.expr) -> Form | None:
        """Return how an argument is handed on; None if there is no rule."""
        if self._is_plain(annotation, self._module):
            self._use_names(annotation)
            return Form(self._module.source(annotation), _unchanged)
        members = _union(annotation)
        others = [member for member in members if not _is_none(member)]
        form = self._stepped(others) or (self._converted(others[0]) if len(others) == 1 else None)
        if form is None or len(others) == len(members):
            return form
        return Form(f"{form.text} | None", lambda value: f"None if {value} is None else {form.convert(value)}")

    def _stepped(self, members: list[ast.expr]) -> Form | None:
        """``AsyncIterable[T]``, alone or next to ``Iterable[T]``."""
        names = {_outer_name(member) for member in members}
        item = members[0].slice if isinstance(members[0], ast.Subscript) else None
        if item is None or not {"AsyncIterable"} <= names <= {"AsyncIterable", "Iterable"}:
            return None
        if not self._is_plain(item, self._module):
            return None
        self._use_names(item)
        self._use("collections.abc", "Iterable")
        self._use(f"{RUNTIME}._bridge", "stepped_in_worker_threads")
        return Form(f"Iterable[{self._module.source(item)}]", lambda value: f"stepped_in_worker_threads({value})")

    def _converted(self, annotation: ast.expr) -> Form | None:
        """A handle, a list of them, or an awaitable callback."""
        if self._handle(annotation):
            self._use_names(annotation)
            self._use(f"{RUNTIME}._handle", "unwrap")
            return Form(self._module.source(annotation), lambda value: f"unwrap({value})")
        if not isinstance(annotation, ast.Subscript):
            return None
        if _outer_name(annotation) in ("list", "Sequence") and self._handle(annotation.slice):
            self._use_names(annotation)
            self._use(f"{RUNTIME}._handle", "unwrap")
            return Form(self._module.source(annotation), lambda value: f"[unwrap(each) for each in {value}]")
        return self._callback(annotation)

    def _callback(self, annotation: ast.Subscript) -> Form | None:
        if _outer_name(annotation) != "Callable" or not isinstance(annotation.slice, ast.Tuple):
            return None
        taken, given = annotation.slice.elts
        if _outer_name(given) != "Awaitable" or not isinstance(given, ast.Subscript):
            return None
        if not (self._is_plain(taken, self._module) and self._is_plain(given.slice, self._module)):
            return None
        self._use_names(taken)
        self._use_names(given.slice)
        self._use("collections.abc", "Callable")
        self._use(f"{RUNTIME}._bridge", "in_worker_thread")
        text = f"Callable[{self._module.source(taken)}, {self._module.source(given.slice)}]"
        return Form(text, lambda value: f"in_worker_thread({value})")

    def _result(self, annotation: ast.expr, place: Place) -> Form:
        text = self._module.source(annotation)
        if self._is_plain(annotation, self._module):
            self._use_names(annotation)
            return Form(text, _unchanged)
        members = _union(annotation)
        others = [member for member in members if not _is_none(member)]
        outer = others[0] if len(others) == 1 else annotation
        is_list = isinstance(outer, ast.Subscript) and _outer_name(outer) == "list" and len(members) == 1
        handle = self._handle(outer.slice if is_list and isinstance(outer, ast.Subscript) else outer)
        if handle is None or handle.is_opened:
            raise GenerationError(f"no rule for the result {text}")
        self._use_names(annotation)
        self._use_handle(handle)
        if is_list:
            return Form(text, lambda value: f"[{place.wrapped(handle, 'each')} for each in {value}]")
        if len(others) < len(members):
            return Form(text, lambda value: f"None if (value := {value}) is None else {place.wrapped(handle, 'value')}")
        return Form(text, lambda value: place.wrapped(handle, value))

    def _handle(self, annotation: ast.expr) -> Handle | None:
        """Return the handle that an annotation names, also one of plain values such as ``OperationFuture[int]``."""
        if isinstance(annotation, ast.Name):
            return self._core.handle(self._module, annotation.id)
        if isinstance(annotation, ast.Subscript) and self._is_plain(annotation.slice, self._module):
            return self._handle(annotation.value)
        return None

    def _is_plain(self, node: ast.AST, module: Module) -> bool:
        """Whether an annotation means the same on both sides."""
        if isinstance(node, ast.Name):
            if node.id in NOT_PLAIN or self._core.handle(module, node.id):
                return False
            home, name = self._core.home(module, node.id)
            value = alias_value(home.defined.get(name))
            return value is None or self._is_plain(value, home)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return False  # a type in quotes, which would go unseen
        if isinstance(node, ast.Subscript) and _outer_name(node) == "Literal":
            return True
        return all(self._is_plain(child, module) for child in ast.iter_child_nodes(node))

    # --- imports ---

    def _use(self, module: str, name: str) -> None:
        self._imports.add((module, name))

    def _use_names(self, node: ast.AST) -> None:
        """Import everything that `node` names, twins where there are some."""
        for name in {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}:
            self._use_name(name)

    def _use_name(self, name: str) -> None:
        origin = self._module.imports.get(name)
        handle = self._core.handle(self._module, name)
        if handle is not None and handle.name == name:
            self._use_handle(handle)
        elif handle is not None:
            home, _ = self._core.home(self._module, name)
            if home.name not in self._core.twins:
                raise GenerationError(f"{name} stands for {handle.name}, but {home.name} has no twin")
            if home is not self._module:
                self._use(f".{home.name}", name)
        elif origin is not None:
            if origin.name is None:
                raise GenerationError(f"{name} is a module: signatures use names imported from it")
            self._use(origin.module, name if origin.name == name else f"{origin.name} as {name}")
        elif name in self._module.defined:
            if name.startswith("_"):
                raise GenerationError(f"{name} is private, and stands in a public signature")
            self._use(self._module.qualified, name)

    def _use_handle(self, handle: Handle) -> None:
        if handle.name in BY_HAND:
            self._use(f"{RUNTIME}.{BY_HAND[handle.name]}", handle.name)
        elif handle.module != self._module.name:
            self._use(f".{handle.module}", handle.name)


def _unchanged(value: str) -> str:
    return value


def _outer_name(annotation: ast.expr | None) -> str | None:
    target = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return target.id if isinstance(target, ast.Name) else None


def _union(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        return _union(annotation.left) + _union(annotation.right)
    return [annotation]


def _is_none(annotation: ast.expr) -> bool:
    return isinstance(annotation, ast.Constant) and annotation.value is None


def _banner(module: Module) -> str:
    return f"# Generated by tools/gen_sync.py from {module.file}: change that, then run `make sync`."


# --- the package -----------------------------------------------------------------------------------------------------


def package_init(core: Core) -> str:
    """Return the twin of the package's ``__init__``: the same names, twins where there are some."""
    module = core.modules["__init__"]
    lines = [_banner(module), PACKAGE_DOC.format(core=core.name)]
    for node in module.tree.body[1 if ast.get_docstring(module.tree) else 0 :]:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            lines += [_package_import(core, node.module, alias.name) for alias in node.names]
        elif _assigned(node) == "__all__":
            lines.append(module.source(node))
        elif not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            raise GenerationError(f"{module.file}: no rule for `{module.source(node)}`")
    return "\n".join(lines)


def _package_import(core: Core, module: str | None, name: str) -> str:
    if name == "*":
        if module in core.twins:
            raise GenerationError(f"{core.name}/__init__.py: name what is imported from {module}")
        return f"from {core.name}.{module} import *  # noqa: F403 - each module lists its public names in `__all__`"
    if module is None:
        return f"from . import {name}" if name in core.twins else f"from {core.name} import {name}"
    if name in BY_HAND:
        return f"from {RUNTIME}.{BY_HAND[name]} import {name}"
    return f"from .{module} import {name}" if module in core.twins else f"from {core.name}.{module} import {name}"


def _assigned(node: ast.stmt) -> str | None:
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else None


def generate(core_root: Path) -> dict[str, str]:
    """Return every file of the twin of the package at `core_root`, by name.

    Raises:
        GenerationError: something has no rule; the text names all of it, a line each.
    """
    core = Core(core_root)
    problems: list[str] = []
    sources: dict[str, str] = {}
    for name in core.twins:
        try:
            sources[f"{name}.py"] = Twin(core, core.modules[name]).write()
        except GenerationError as problem:
            problems.append(str(problem))
    if problems:
        raise GenerationError("\n".join(problems))
    sources["__init__.py"] = package_init(core)
    return {name: _formatted(source) for name, source in sources.items()}


def _formatted(source: str) -> str:
    # As a file of the project, so that its settings hold.
    place = ("--stdin-filename", str(ROOT / RUNTIME / "generated.py"), "-")
    for command in (("check", "--quiet", "--select=I", "--fix"), ("format", "--quiet")):
        ruff = [sys.executable, "-m", "ruff", *command, *place]
        source = subprocess.run(ruff, input=source, text=True, capture_output=True, check=True, cwd=ROOT).stdout
    return source


def differences(files: Mapping[str, str], twin_root: Path) -> list[str]:
    """Return a line for each file at `twin_root` that is stale, missing, or nobody's."""
    present = {path.name: path.read_text("utf-8") for path in twin_root.glob("*.py") if path.name not in FILES_BY_HAND}
    lines = [f"{name}: stale" for name, text in files.items() if present.get(name, text) != text]
    lines += [f"{name}: missing" for name in files if name not in present]
    lines += [f"{name}: has no source (any more)" for name in present if name not in files]
    return [f"{twin_root.name}/{line}" for line in sorted(lines)]


def write(files: Mapping[str, str], twin_root: Path) -> None:
    """Make the generated files at `twin_root` these, and no others."""
    for path in twin_root.glob("*.py"):
        if path.name not in files and path.name not in FILES_BY_HAND:
            path.unlink()
    for name, text in files.items():
        (twin_root / name).write_text(text, "utf-8")


# --- docstrings ------------------------------------------------------------------------------------------------------

UNTRANSLATED: Final = frozenset({"aclosing", "anyio", "async", "asyncio", "asynccontextmanager", "await"})


class Edit(NamedTuple):
    """A replacement of the text between two positions (row from 1, column from 0)."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str


def blocking_docstring(literal: str, core: str, blocking_properties: frozenset[str]) -> str:
    """Return a docstring's literal with its code blocks (``::`` and fences) made blocking, and its prose untouched."""
    lines = literal.split("\n")
    for start, end in _code_blocks(lines):
        block = lines[start:end]
        margin = min(len(line) - len(line.lstrip()) for line in block if line.strip())
        code = blocking_code("\n".join(line[margin:] for line in block), core, blocking_properties)
        lines[start:end] = [f"{' ' * margin}{line}" if line.strip() else line for line in code.split("\n")]
    return "\n".join(lines)


def _code_blocks(lines: list[str]) -> Iterator[tuple[int, int]]:
    row = 0
    while row < len(lines):
        line = lines[row]
        row += 1
        if line.strip().startswith("```"):
            end = next((n for n in range(row, len(lines)) if lines[n].strip().startswith("```")), len(lines))
        elif line.rstrip().endswith("::"):
            margin = len(line) - len(line.lstrip())
            end = next(
                (n for n in range(row, len(lines)) if lines[n].strip() and not lines[n].startswith(" " * (margin + 1))),
                len(lines),
            )
        else:
            continue
        if any(text.strip() for text in lines[row:end]):
            yield row, end
        row = end + 1 if line.strip().startswith("```") else end


def blocking_code(code: str, core: str, blocking_properties: frozenset[str]) -> str:
    """Return example code without ``async`` and ``await``, for the twin of `core`."""
    tokens = _tokens(code)
    edits = [edit for at in range(len(tokens)) for edit in _edits(tokens, at, core, blocking_properties)]
    lines = code.split("\n")
    for edit in sorted(edits, reverse=True):
        assert edit.start[0] == edit.end[0] or not edit.text
        first, last = edit.start[0] - 1, edit.end[0] - 1
        joined = lines[first][: edit.start[1]] + edit.text + lines[last][edit.end[1] :]
        lines[first : last + 1] = [joined]
    result = "\n".join(lines)
    for token in _tokens(result):
        if token.string in UNTRANSLATED or (token.type == tokenize.STRING and re.search(r"\bawait\b", token.string)):
            raise GenerationError(f"no rule for `{token.string}` in the example: {token.line.strip()}")
    return result


def _tokens(code: str) -> list[tokenize.TokenInfo]:
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    try:
        return [token for token in tokenize.generate_tokens(io.StringIO(code).readline) if token.type not in skipped]
    except (SyntaxError, tokenize.TokenError) as problem:
        raise GenerationError(f"an example is not Python: {problem}") from problem


def _edits(tokens: list[tokenize.TokenInfo], at: int, core: str, properties: frozenset[str]) -> Iterator[Edit]:
    token = tokens[at]
    if token.string == core and token.type == tokenize.NAME:
        yield Edit(token.start, token.end, RUNTIME)
    elif token.string == "async":
        yield Edit(token.start, tokens[at + 1].start, "")
    elif token.string == "await":
        yield from _await_edits(tokens, at, properties)


def _await_edits(tokens: list[tokenize.TokenInfo], at: int, properties: frozenset[str]) -> Iterator[Edit]:
    end, call = _primary(tokens, at + 1)
    yield Edit(tokens[at].start, tokens[at + 1].start, "")
    if call is None:
        yield Edit(tokens[end].end, tokens[end].end, ".result()")
    elif tokens[call - 1].string in properties:
        yield Edit(tokens[call].start, tokens[end].end, "")
    if _is_grouped(tokens, at, end):
        yield Edit(tokens[at - 1].start, tokens[at - 1].end, "")
        yield Edit(tokens[end + 1].start, tokens[end + 1].end, "")


def _primary(tokens: list[tokenize.TokenInfo], at: int) -> tuple[int, int | None]:
    """Return where the operand that begins at `at` ends, and where its last call opens, if that is what it ends in."""
    end = _closing(tokens, at) if tokens[at].string in "([{" else at
    call = None
    while end + 1 < len(tokens):
        following = tokens[end + 1].string
        if following == ".":
            end, call = end + 2, None
        elif following in ("(", "["):
            call = end + 1 if following == "(" else None
            end = _closing(tokens, end + 1)
        else:
            break
    return end, call


def _closing(tokens: list[tokenize.TokenInfo], at: int) -> int:
    depth = 0
    for place in range(at, len(tokens)):
        depth += (tokens[place].string in ("(", "[", "{")) - (tokens[place].string in (")", "]", "}"))
        if depth == 0:
            return place
    raise GenerationError("an example's brackets do not match")


def _is_grouped(tokens: list[tokenize.TokenInfo], at: int, end: int) -> bool:
    """Whether the parentheses around an awaited operand hold nothing else, and call nothing."""
    if at == 0 or end + 1 == len(tokens) or tokens[at - 1].string != "(" or tokens[end + 1].string != ")":
        return False
    before = tokens[at - 2] if at > 1 else None
    is_called = before is not None and (
        before.string in (")", "]") or (before.type == tokenize.NAME and not keyword.iskeyword(before.string))
    )
    # On a new line a parenthesis begins an expression, whatever ended the line before.
    return not is_called or (before is not None and before.start[0] < tokens[at - 1].start[0])


def main(arguments: list[str] | None = None) -> int:
    """Write the twin, or check it; exit with 1 when it is stale or something has no rule."""
    parser = argparse.ArgumentParser(description="Write loops_sync from loops_async.")
    parser.add_argument("--check", action="store_true", help="compare only, and fail when something differs")
    is_check = parser.parse_args(arguments).check
    twin_root = ROOT / RUNTIME
    try:
        files = generate(ROOT / "loops_async")
    except GenerationError as problem:
        print(problem, file=sys.stderr)
        return 1
    stale = differences(files, twin_root)
    if not is_check:
        write(files, twin_root)
    print("\n".join(stale) or f"{twin_root.name}: up to date with loops_async")
    if is_check and stale:
        print("run `make sync`", file=sys.stderr)
    return 1 if is_check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""The reference: which public name stands on which page, and how names in docstrings and signatures find it.

A line ``<!-- reference: KIND -->`` of a page is replaced by the entries of all names of this kind. What has a form of
its own in each colour stands in two tabs; what both packages share stands once, as ``loops_async.NAME``.
"""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import iscoroutinefunction
from operator import attrgetter
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_type_hints

from colours import tabs
from msgspec import Struct
from sphinx.domains.python import ObjectEntry, PythonDomain, PyXRefRole
from sphinx.errors import PycodeError
from sphinx.pycode import ModuleAnalyzer

import loops_async
import loops_local
import loops_sync
import loops_tinker
from loops_async import errors, types

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

LINE: Final = re.compile(r"^<!-- reference: (\w+) -->$", re.MULTILINE)

PACKAGES: Final = {
    package.__name__: package for package in (loops_async, loops_sync, loops_local, loops_tinker, loops_tinker.types)
}

OWN: Final[Mapping[str, ModuleType]] = {"local": loops_local, "tinker": loops_tinker}
"""The packages that have a page of their own."""


# --- entries ---


def has_twin(name: str) -> bool:
    """Whether each colour has a form of its own."""
    return getattr(loops_sync, name) is not getattr(loops_async, name)


def is_client(name: str) -> bool:
    value = getattr(loops_async, name)
    return has_twin(name) and isinstance(value, type) and any(map(iscoroutinefunction, vars(value).values()))


KINDS: Final[Mapping[str, Callable[[str], bool]]] = {
    "clients": is_client,
    "errors": lambda name: name in errors.__all__,
    "types": lambda name: name in types.__all__,
}
"""The names of each page; `helpers` has the rest, and those of `OWN` their packages."""

FIRST: Final = (
    *("ServiceClient", "TrainingClient", "SamplingClient", "OperationFuture"),
    *("LoopsError", "ApiError"),
    *("LocalService", "serve_in_thread"),
    *("RestClient", "APIFuture", "TinkerError", "APIError"),
)
"""What stands first on its page; the rest is in the order of the alphabet."""

MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "helpers": ("loops_async.agents", "loops_async.batch", "loops_async.testing"),
    "local": ("loops_local.faults", "loops_local.engine.base"),
    "tinker": ("loops_tinker.types",),
}
"""Public modules, of which a page has the names that their package does not export."""

NAMED_IN_SIGNATURES: Final[Mapping[str, tuple[str, ...]]] = {
    "clients": ("loops_sync._bridge.Items", "loops_sync._handle.Scope"),
    "local": ("loops_local.engine.base.SampleOutcome", "loops_local.faults.plan.Exchange"),
    "tinker": ("loops_tinker.errors.Response", "loops_tinker.futures.AwaitableConcurrentFuture"),
    "types": ("loops_async.types.tensors.SupportsToList",),
}
"""Types that calls take or return, but that nothing exports, since users never write their names."""


def entries(kind: str) -> str:
    """Return the Markdown of a page's entries, each with a heading."""
    if kind in OWN:
        found = {name: entry(f"{OWN[kind].__name__}.{name}") for name in exported(kind)}
    else:
        found = {name: in_its_colours(name) for name in exported(kind)}
    further = [f"{module}.{name}" for module in MODULES.get(kind, ()) for name in only_in(module)]
    for path in (*further, *NAMED_IN_SIGNATURES.get(kind, ())):
        found[path.rpartition(".")[2]] = entry(path)
    others = sorted(found.keys() - set(FIRST), key=str.lower)
    ordered = [*(name for name in FIRST if name in found), *others]
    return "\n".join(f"## {name.strip('_')}\n\n{found[name]}" for name in ordered)


def exported(kind: str) -> list[str]:
    if kind in OWN:
        return [name for name in OWN[kind].__all__ if not isinstance(getattr(OWN[kind], name), ModuleType)]
    is_wanted = KINDS.get(kind, lambda name: not any(belongs(name) for belongs in KINDS.values()))
    return list(filter(is_wanted, loops_async.__all__))


def only_in(module: str) -> list[str]:
    if find_spec(module) is None:
        return []
    return [name for name in import_module(module).__all__ if name not in PACKAGES[module.split(".")[0]].__all__]


def in_its_colours(name: str) -> str:
    if has_twin(name):
        return tabs([entry(f"loops_async.{name}"), entry(f"loops_sync.{name}")])
    return entry(f"loops_async.{name}")


def entry(path: str) -> str:
    """Return the autodoc directive of one name."""
    value = object_at(path)
    options = []
    if isinstance(value, type):
        kind = "exception" if issubclass(value, Exception) else "class"
        options += [":members:", ":undoc-members:"]
        if issubclass(value, Struct):
            value.__annotations__ = without_bounds(value)
        options += [":inherited-members: object"] if path.startswith("loops_sync") else []
        options += [":show-inheritance:"] if kind == "exception" else []
    else:
        kind = "function" if isinstance(value, FunctionType) else "data"
    lines = [f".. auto{kind}:: {path}", *(f"   {option}" for option in options)]
    return "```{eval-rst}\n" + "\n".join(lines) + "\n```\n"


def without_bounds(struct: type[Struct]) -> dict[str, Any]:
    """Return the types of a struct's own fields without what msgspec checks beside them."""
    hints = get_type_hints(struct)
    return {name: hints[name] for name in struct.__annotations__}


def object_at(path: str) -> Any:
    """Return what a dotted path names, or None."""
    module, _, name = path.rpartition(".")
    while module and find_module(module) is None:
        module, _, before = module.rpartition(".")
        name = f"{before}.{name}"
    try:
        return attrgetter(name)(find_module(module)) if module else None
    except AttributeError:
        return None


@cache
def find_module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def insert(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = LINE.sub(lambda line: entries(line[1]), source[0])


# --- names ---


def shorten_signature(
    app: Sphinx, kind: str, path: str, value: Any, options: Any, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Leave out the arguments of a class that users never call, such as a client that a method returns."""
    name = path.rpartition(".")[2]
    is_twin = name in loops_async.__all__ and has_twin(name)
    is_created = "__init__" in vars(getattr(loops_sync, name)) if is_twin else "._" not in path
    if kind == "class" and (not is_created or signature == "(*args, **kwargs)"):
        return "", None
    return signature and signature.replace("<factory>", "..."), result


def before_napoleon(app: Sphinx, kind: str, path: str, value: Any, options: Any, lines: list[str]) -> None:
    """Give a constant or an alias the text below it in the module that defines it, not that of its type."""
    if kind == "data":
        name = path.rpartition(".")[2]
        lines[:] = next(
            (texts[name] for texts in map(texts_below, modules_of(path.split(".")[0])) if name in texts), []
        )
    if kind in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment; without it, napoleon reads what stands before a colon as a type


def modules_of(package: str) -> list[str]:
    return sorted(name for name in sys.modules if name.split(".")[0] == package)


@cache
def texts_below(module: str) -> Mapping[str, list[str]]:
    """Return the string literals that stand below the names of a module."""
    try:
        found = ModuleAnalyzer.for_module(module).find_attr_docs()
    except PycodeError:  # an empty file
        return {}
    return {name: text for (owner, name), text in found.items() if not owner}


class Names(PythonDomain):
    """Names in docstrings and signatures: one that several packages have is that of `loops_async` outside `OWN`'s."""

    def find_obj(
        self,
        env: BuildEnvironment,
        modname: str | None,
        classname: str | None,
        name: str,
        type: str | None,  # noqa: A002 - the name that the domain has
        searchmode: int = 0,
    ) -> list[tuple[str, ObjectEntry]]:
        """Return what a name may mean."""
        if hasattr(builtins, name):  # else it may be an attribute of this name
            return []
        found = super().find_obj(env, modname, classname, name, type, searchmode)
        here = (modname or "").partition(".")[0]
        package = here if here in {own.__name__ for own in OWN.values()} else loops_async.__name__
        return [each for each in found if each[0].startswith(f"{package}.")] or found


def resolve(app: Sphinx, environment: BuildEnvironment, node: pending_xref, content: nodes.TextElement) -> Any:
    """Find a name that the domain has not found, or show it as code if it means nothing outside its docstring.

    Signatures name the module that defines a type, which may be private; users find it in the package.
    """
    target = node.get("reftarget", "")
    package, _, rest = target.partition(".")
    if node.get("refdomain") != "py":
        return None
    path: str | None
    if package in loops_async.__all__:
        path = f"loops_async.{target}"
    elif package not in PACKAGES:
        return content if node["reftype"] == "name" else None
    else:
        value = object_at(target)
        if isinstance(value, TypeVar):
            return content
        path = public_path(value, rest.rpartition(".")[2])
    domain = environment.domains.python_domain
    return path and domain.resolve_xref(environment, node["refdoc"], app.builder, "obj", path, node, content)


def public_path(value: Any, name: str) -> str | None:
    """Return where users find a value that its module calls `name`."""
    found = (f"{package}.{name}" for package in PACKAGES if getattr(PACKAGES[package], name, None) is value)
    return next(found, None) if value is not None else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_domain(Names, override=True)
    app.connect("source-read", insert)
    app.connect("autodoc-process-docstring", before_napoleon, priority=100)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("missing-reference", resolve)
    app.add_role_to_domain("py", "name", PyXRefRole())
    app.add_role("name", PyXRefRole())
    return {"parallel_read_safe": True}

"""Check that imports point one way: each module imports only modules before it in the tables below.

Every `import` counts, also inside a function or under `TYPE_CHECKING`: a hidden import is still a dependency. Its place
matters only for heavy, optional libraries: they may be imported inside a function, since then importing the module is
cheap and works without them.

Usage: python tools/check_layers.py [ROOT]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ORDER: dict[str, tuple[str, ...]] = {
    "loops_async": (
        "_other_names",
        "_kinds",
        "_values",
        "errors",
        "_text",
        "_files",
        "_locks",
        "_copies",
        "_tasks",
        "_logs",
        "_waiting",
        "types",
        "_progress",
        "protocol",
        "drift",
        "_version",
        "_arguments",
        "_datums",
        "_journal",
        "_work",
        "_http",
        "_running",
        "control_plane",
        "_operations",
        "_futures",
        "_session",
        "_checkpoints",
        "_executors",
        "_sampling",
        "_telemetry",
        "sampling",
        "_batch",
        "batch",
        "dpo",
        "_training",
        "_agents",
        "agents",
        "_rollouts",
        "executors",
        "_ray",
        "ray",
        "rollouts",
        "training",
        "client",
        "_cassettes",
        "testing",
        "cli",
    ),
    "loops_local": (
        "_threads",
        "engine",
        "_errors",
        "_storage",
        "_execution",
        "_resources",
        "faults",
        "_http",
        "_dashboard",
        "_routes",
        "_service",
        "pytest",
        "__main__",
    ),
    "loops_tinker": (
        "errors",
        "types",
        "paths",
        "settings",
        "convert",
        "futures",
        "endings",
        "sampling",
        "training",
        "rest",
        "service",
        "old_names",
        "_path",
        "__main__",
    ),
}
"""Modules and folders of a package in ascending order; each may import those before it. A folder counts as one."""

INTERNAL: dict[str, tuple[str, ...]] = {
    "loops_async": (),
    "loops_sync": ("loops_async",),
    "loops_local": (
        "loops_async.types",
        "loops_async.protocol",
        "loops_async.errors",
        "loops_async._tasks",
        "loops_async._http.decoding",
        "loops_async._version",
    ),
    "loops_tinker": ("loops_async", "loops_sync"),
}
"""Which parts of our other packages a package may import."""

INTERNAL_OF_MODULES: dict[str, tuple[str, ...]] = {"loops_local.pytest": ("loops_async", "loops_sync")}
"""What a module may import beside that."""

LIBRARIES: dict[str, frozenset[str]] = {
    "loops_async": frozenset({"anyio", "msgspec"}),
    "loops_async._http.errors": frozenset({"aiohttp"}),
    "loops_async._http.network": frozenset({"aiohttp"}),
    "loops_async._http.transport": frozenset({"aiohttp", "yarl"}),  # yarl: the URLs of aiohttp
    "loops_async._http.retry": frozenset({"backoff"}),
    "loops_async._telemetry": frozenset({"opentelemetry"}),  # the extra `otel`; only `setup` is imported without it
    "loops_async._ray": frozenset({"numpy", "pyarrow", "ray"}),  # the extra of that name
    "loops_async.ray": frozenset({"ray"}),
    "loops_async.cli": frozenset({"rich", "typer"}),  # the extra of that name
    "loops_sync": frozenset({"msgspec"}),
    "loops_local": frozenset({"msgspec"}),
    "loops_local.faults": frozenset({"aiohttp", "yarl"}),
    "loops_local._http": frozenset({"aiohttp", "yarl"}),
    "loops_local._dashboard": frozenset({"aiohttp"}),
    "loops_local._routes": frozenset({"aiohttp", "yarl"}),
    "loops_local._service": frozenset({"aiohttp", "yarl"}),
    "loops_local.pytest": frozenset({"pytest", "pytest_asyncio"}),
    "loops_tinker": frozenset({"numpy"}),  # the extra of that name brings it
    "loops_local.engine.pytorch": frozenset({"gguf", "numpy", "safetensors", "tokenizers", "torch", "transformers"}),
}
"""Libraries that a module, or the modules of a folder, may import at any place."""

OPTIONAL: dict[str, frozenset[str]] = {
    "loops_async": frozenset({"numpy", "tokenizers", "torch", "transformers", "wandb"}),
    "loops_tinker": frozenset({"torch"}),
    "loops_async._agents.server": frozenset({"aiohttp"}),
    "loops_async._agents.templates": frozenset({"jinja2"}),
}
"""Libraries that may be imported inside functions and for type checking only."""


class Import(NamedTuple):
    """One imported module: its absolute name, its line, and whether importing the file executes it."""

    name: str
    line: int
    at_import: bool


def check(root: Path) -> list[str]:
    """Return one line for each import under `root` that breaks a rule, and for each module missing from the tables."""
    sources = [path for package in INTERNAL for path in sorted((root / package).rglob("*.py"))]
    return [problem for path in sources for problem in _check_file(root, path)]


def _check_file(root: Path, path: Path) -> Iterator[str]:
    relative = path.relative_to(root)
    module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    package = relative.parts[0]
    if package in ORDER and "." in module and _part(module) not in ORDER[package]:
        yield f"{relative}: add {_part(module)!r} to the order of {package} in {Path(__file__).name}"
        return
    is_package = path.name == "__init__.py"
    for found in _imports(ast.parse(path.read_text()), module, is_package=is_package):
        if problem := _problem(module, found):
            yield f"{relative}:{found.line}: {problem}"


def _problem(module: str, found: Import) -> str | None:
    package, top = module.split(".")[0], found.name.split(".")[0]
    if top == package:
        return _order_problem(module, found.name)
    if top in INTERNAL:
        allowed = (*INTERNAL[package], *INTERNAL_OF_MODULES.get(module, ()))
        if any(_within(found.name, part) for part in allowed):
            return None
        return f"{package} may import {' and '.join(allowed) or 'no other package of ours'}, not {found.name}"
    if top in sys.stdlib_module_names or top in _granted(LIBRARIES, module):
        return None
    if top in _granted(OPTIONAL, module):
        return f"{top} is optional: import it inside the function that needs it" if found.at_import else None
    return f"{module} may not import {top}"


def _order_problem(module: str, target: str) -> str | None:
    package = module.split(".")[0]
    if package not in ORDER or module == package:
        return None
    own, other = _part(module), _part(target)
    if other not in ORDER[package]:
        return f"{own} imports {target}: name the module that defines it"
    order = ORDER[package]
    return None if order.index(other) <= order.index(own) else f"{own} comes before {other} and may not import it"


def _imports(tree: ast.AST, module: str, *, is_package: bool, at_import: bool = True) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(name, node.lineno, at_import) for name in _names_from(node, module, is_package))
        else:
            deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(node)
            yield from _imports(node, module, is_package=is_package, at_import=at_import and not deferred)


def _names_from(node: ast.ImportFrom, module: str, is_package: bool) -> list[str]:
    if not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    source = ".".join([*base, *([node.module] if node.module else [])])
    return [f"{source}.{alias.name}" for alias in node.names]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _part(module: str) -> str:
    """Return the name of a module in `ORDER`: that of the module or folder below the package."""
    return module.split(".")[1] if "." in module else ""


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _granted(table: dict[str, frozenset[str]], module: str) -> frozenset[str]:
    return frozenset().union(*(libraries for part, libraries in table.items() if _within(module, part)))


def main() -> int:
    """Print every broken rule; exit with 1 when there is any."""
    problems = check(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    print("\n".join(problems) or "layers: every import points the right way")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether `loops_sync` offers exactly what `loops_async` offers, as it really is and not as its source says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest

import loops_async
import loops_sync
from tools.core_names import BY_HAND, OF_BOTH
from tools.gen_sync import BLOCKING, FOR_ANY_THREAD

ASYNC = re.compile(r"\b(Async\w+|Awaitable|Coroutine|asyncio|Future|Task)\b")

BIRTH = {"open"}
"""Coroutines that the constructor of a twin stands for."""


def is_coroutine(member: object) -> bool:
    return inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)


def public(kind: type) -> dict[str, Any]:
    return {
        name: inspect.getattr_static(kind, name) for name in dir(kind) if not name.startswith("_") and name != "mro"
    }


HANDLES = [
    name
    for name in loops_async.__all__
    if inspect.isclass(kind := getattr(loops_async, name))
    and (any(map(is_coroutine, public(kind).values())) or hasattr(kind, "__aenter__"))
    and name not in OF_BOTH
]

COROUTINES = [name for name in loops_async.__all__ if is_coroutine(getattr(loops_async, name))]

ALIASES = ["ForwardBackwardFuture"]

FUNCTION_TYPES = ["Rollout"]
"""Aliases of coroutine functions, which are plain functions in the twin."""

CONSTRUCTED = ["AgentGateway", "InLoopExecutor", "ProcessExecutor", "ServiceClient", "StalenessGate"]
"""Handles that users create themselves."""

STEPS = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__", "__anext__": "__next__"}

MEMBERS = [(kind, name) for kind in HANDLES for name in public(getattr(loops_async, kind)) if name not in BIRTH]


def unwrapped(member: Any) -> Any:
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return inspect.unwrap(member)


def parameters(member: Any) -> list[tuple[str, Any, Any]]:
    signature = inspect.signature(unwrapped(member))
    return [(each.name, each.kind, each.default) for each in signature.parameters.values()]


def parameters_of_twin(core: Any) -> list[tuple[str, Any, Any]]:
    return [(name, kind, True if name == BLOCKING else default) for name, kind, default in parameters(core)]


def annotations(member: Any) -> Iterator[str]:
    yield from map(str, inspect.get_annotations(unwrapped(member)).values())


def test_handles_are_found() -> None:
    assert {"ServiceClient", "TrainingClient", "SamplingClient", "ControlPlane", "OperationFuture"} <= set(HANDLES)
    assert {"RolloutStream", "RolloutContext", "StalenessGate"} <= set(HANDLES)
    assert len(MEMBERS) > 50


def test_same_names() -> None:
    assert sorted(loops_sync.__all__) == sorted(loops_async.__all__)


@pytest.mark.parametrize(
    "name", sorted({*loops_async.__all__} - {*HANDLES, *COROUTINES, *ALIASES, *FUNCTION_TYPES, *BY_HAND})
)
def test_values_and_errors_are_the_same_objects(name: str) -> None:
    assert getattr(loops_sync, name) is getattr(loops_async, name)


@pytest.mark.parametrize("name", ALIASES)
def test_aliases_are_of_the_twins(name: str) -> None:
    twin, core = getattr(loops_sync, name), getattr(loops_async, name)
    assert (twin.__origin__, twin.__args__) == (loops_sync.OperationFuture, core.__args__)


@pytest.mark.parametrize("name", FUNCTION_TYPES)
def test_coroutine_functions_as_arguments_are_functions(name: str) -> None:
    twin, core = get_args(getattr(loops_sync, name)), get_args(getattr(loops_async, name))
    assert twin[0][0] is getattr(loops_sync, core[0][0].__name__) is not core[0][0]
    assert (twin[0][1:], twin[1]) == (core[0][1:], *get_args(core[1]))


@pytest.mark.parametrize("name", COROUTINES)
def test_coroutine_functions_have_twins(name: str) -> None:
    twin, core = getattr(loops_sync, name), getattr(loops_async, name)
    assert not is_coroutine(twin)
    assert parameters(twin) == parameters(core)


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_functions_written_by_hand_take_the_same(name: str) -> None:
    twin, core = getattr(loops_sync, name), getattr(loops_async, name)
    assert twin is not core
    assert parameters(twin) == parameters(core)


@pytest.mark.parametrize("name", HANDLES)
def test_handles_have_twins_of_their_own(name: str) -> None:
    twin, core = getattr(loops_sync, name), getattr(loops_async, name)
    assert twin.__name__ == core.__name__
    assert not issubclass(twin, core)
    assert public(twin).keys() == public(core).keys() - BIRTH
    assert [hasattr(twin, name) for name in STEPS.values()] == [hasattr(core, name) for name in STEPS]
    assert not any(hasattr(twin, name) for name in STEPS)


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_member(kind: str, name: str) -> None:
    core, twin = (inspect.getattr_static(getattr(package, kind), name) for package in (loops_async, loops_sync))
    assert not is_coroutine(twin)
    assert parameters(twin) == parameters_of_twin(core)
    assert isinstance(twin, classmethod) == isinstance(core, classmethod)
    if not is_coroutine(core):
        assert isinstance(twin, property) == isinstance(core, property)
    if f"{kind}.{name}" not in FOR_ANY_THREAD:  # a future of `concurrent.futures` is the same in both
        assert [text for text in annotations(twin) if ASYNC.search(text.replace("OperationFuture", ""))] == []
    assert bool(inspect.getdoc(unwrapped(twin))) == bool(inspect.getdoc(unwrapped(core)))


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_the_constructor_takes_what_the_cores_takes(name: str) -> None:
    assert parameters(getattr(loops_sync, name).__init__) == parameters(getattr(loops_async, name).__init__)


def documented() -> Iterator[tuple[str, str]]:
    """Yield every public docstring of `loops_sync`, and where it stands."""
    for path in sorted(Path(loops_sync.__file__).parent.glob("[a-z_]*.py")):
        if path.name == "__init__.py" or not path.name.startswith(("_", "ray")):  # Ray is not in this environment
            module = loops_sync if path.name == "__init__.py" else import_module(f"loops_sync.{path.stem}")
            yield module.__name__, module.__doc__ or ""
    for name in [name for name in loops_sync.__all__ if name not in OF_BOTH]:
        value = getattr(loops_sync, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value.__doc__ or ""
        for each, member in public(value).items() if inspect.isclass(value) else ():
            if not isinstance(member, type):
                yield f"{name}.{each}", getattr(unwrapped(member), "__doc__", None) or ""


DOCUMENTED = dict(documented())


def test_docstrings_are_found() -> None:
    assert {"loops_sync", "loops_sync.client", "OperationFuture.result", "Datum", "ClosedError"} <= DOCUMENTED.keys()
    assert sum("Example:" in doc for doc in DOCUMENTED.values()) > 5


def test_nothing_that_is_documented_is_asynchronous() -> None:
    words = re.compile(
        r"event loop|corouti|\bawait|\basync(?!io\.CancelledError|OpenAI|Anthropic)|`open\b|open`", re.IGNORECASE
    )
    assert [where for where, doc in DOCUMENTED.items() if words.search(doc)] == []
    assert [where for where, doc in DOCUMENTED.items() if "loops_async" in doc.partition("::\n")[2]] == []

"""Whether `loops_sync` offers exactly what `loops_async` offers, as it really is and not as its source says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import loops_async
import loops_sync

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
    if inspect.isclass(kind := getattr(loops_async, name)) and any(map(is_coroutine, public(kind).values()))
]

COROUTINES = [name for name in loops_async.__all__ if is_coroutine(getattr(loops_async, name))]

ALIASES = ["ForwardBackwardFuture"]

MEMBERS = [(kind, name) for kind in HANDLES for name in public(getattr(loops_async, kind)) if name not in BIRTH]


def unwrapped(member: Any) -> Any:
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return inspect.unwrap(member)


def parameters(member: Any) -> list[tuple[str, Any, Any]]:
    signature = inspect.signature(unwrapped(member))
    return [(each.name, each.kind, each.default) for each in signature.parameters.values()]


def annotations(member: Any) -> Iterator[str]:
    yield from map(str, inspect.get_annotations(unwrapped(member)).values())


def test_handles_are_found() -> None:
    assert {"ServiceClient", "TrainingClient", "SamplingClient", "ControlPlane", "OperationFuture"} <= set(HANDLES)
    assert len(MEMBERS) > 50


def test_same_names() -> None:
    assert sorted(loops_sync.__all__) == sorted(loops_async.__all__)


@pytest.mark.parametrize("name", sorted({*loops_async.__all__} - {*HANDLES, *COROUTINES, *ALIASES}))
def test_values_and_errors_are_the_same_objects(name: str) -> None:
    assert getattr(loops_sync, name) is getattr(loops_async, name)


@pytest.mark.parametrize("name", ALIASES)
def test_aliases_are_of_the_twins(name: str) -> None:
    twin, core = getattr(loops_sync, name), getattr(loops_async, name)
    assert (twin.__origin__, twin.__args__) == (loops_sync.OperationFuture, core.__args__)


@pytest.mark.parametrize("name", COROUTINES)
def test_coroutine_functions_have_twins(name: str) -> None:
    twin, core = getattr(loops_sync, name), getattr(loops_async, name)
    assert not is_coroutine(twin)
    assert parameters(twin) == parameters(core)


@pytest.mark.parametrize("name", HANDLES)
def test_handles_have_twins_of_their_own(name: str) -> None:
    twin, core = getattr(loops_sync, name), getattr(loops_async, name)
    assert twin.__name__ == core.__name__
    assert not issubclass(twin, core)
    assert public(twin).keys() == public(core).keys() - BIRTH
    assert hasattr(twin, "__enter__") == hasattr(core, "__aenter__")


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_member(kind: str, name: str) -> None:
    core, twin = (inspect.getattr_static(getattr(package, kind), name) for package in (loops_async, loops_sync))
    assert not is_coroutine(twin)
    assert parameters(twin) == parameters(core)
    assert isinstance(twin, classmethod) == isinstance(core, classmethod)
    if not is_coroutine(core):
        assert isinstance(twin, property) == isinstance(core, property)
    assert [text for text in annotations(twin) if ASYNC.search(text.replace("OperationFuture", ""))] == []
    assert bool(inspect.getdoc(unwrapped(twin))) == bool(inspect.getdoc(unwrapped(core)))


def test_the_constructor_takes_what_the_cores_takes() -> None:
    assert parameters(loops_sync.ServiceClient.__init__) == parameters(loops_async.ServiceClient.__init__)


@pytest.mark.parametrize("name", HANDLES)
def test_examples_are_blocking(name: str) -> None:
    twin = getattr(loops_sync, name)
    for doc in filter(None, map(inspect.getdoc, [twin, *map(unwrapped, public(twin).values())])):
        for example in doc.split("Example:")[1:]:
            assert not re.search(r"\b(async|await|loops_async)\b", example)

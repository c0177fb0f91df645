"""What `import loops_async` imports, and what it leaves until it is used."""

from __future__ import annotations

from importlib import import_module

import pytest

import loops_async
from tests.support.work import run_python

ONLY_FOR_SOME = {
    "difflib",
    "loops_async._agents",
    "loops_async._batch",
    "loops_async._cassettes",
    "loops_async._journal.file",
    "loops_async._rollouts",
    "multiprocessing",
    "numpy",
    "rich",
    "sqlite3",
    "torch",
    "typer",
}
"""Modules that only some programs need."""

IMPORTED = f"""
import sys
import aiohttp, anyio, backoff, msgspec
before = set(sys.modules)
import loops_async
print(sorted({ONLY_FOR_SOME} & (sys.modules.keys() - before)))
"""

WHOLE = """
import loops_async
assert set(loops_async.__all__) <= set(dir(loops_async))
from loops_async import *
print(AgentGateway is loops_async.agents.AgentGateway, AgentGateway.__module__)
print(RolloutStream is loops_async.rollouts.RolloutStream, loops_async.testing.replay.__name__)
print(sorted(name for name in loops_async.__all__ if name not in globals()))
"""


async def test_what_only_some_programs_need_is_not_imported() -> None:
    assert await run_python(IMPORTED) == "[]"


async def test_it_is_there_when_it_is_used() -> None:
    assert (await run_python(WHOLE)).splitlines() == [
        "True loops_async._agents.gateway",
        "True replay",
        "[]",
    ]


@pytest.mark.parametrize("name", ["agents", "batch", "dpo", "drift", "errors", "executors", "rollouts", "types"])
def test_the_package_has_the_names_of_its_public_modules(name: str) -> None:
    module = import_module(f"loops_async.{name}")
    assert getattr(loops_async, name) is module
    assert set(module.__all__) <= set(loops_async.__all__)
    assert all(getattr(loops_async, each) is getattr(module, each) for each in module.__all__)


def test_a_name_that_is_nowhere() -> None:
    with pytest.raises(AttributeError, match=r"^module 'loops_async' has no attribute 'AgentGatewai'$"):
        _ = loops_async.AgentGatewai  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue] - it is to be missing
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from loops_async import nothing")

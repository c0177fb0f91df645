"""Each rule of the generator on a small source, and what it refuses."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from tools import gen_sync

pytest.importorskip("ruff", reason="the generator formats with ruff, which only developers need")

HERE = Path(__file__).parent

HEAD = '''
"""Things."""
from __future__ import annotations
import asyncio
import datetime
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Literal, Self, TypeAlias
from loops_async import OperationFuture
from loops_async._facade import blocking_property
from .others import LIMIT, Mark, Other, Others, Value
_Hidden = int
Told: TypeAlias = Callable[[int], Awaitable[None]]
'''

OTHERS = '''
"""Others."""
from typing import TypeAlias
LIMIT = 3
Mark: TypeAlias = str
class Value: ...
class Other:
    async def go(self) -> None: ...
Others: TypeAlias = list[Other]
'''


def core_of(root: Path, classes: dict[str, str]) -> Path:
    """Write a core package with classes that have these members."""
    core = root / "thing_core"
    core.mkdir()
    (core / "__init__.py").write_text(f"from .others import Other, Value\nfrom .things import {', '.join(classes)}\n")
    (core / "others.py").write_text(OTHERS)
    bodies = {head: textwrap.indent(textwrap.dedent(members), "    ") for head, members in classes.items()}
    (core / "things.py").write_text(HEAD + "".join(f"class {head}:\n{body}\n" for head, body in bodies.items()))
    return core


RULES = {
    "coroutine": (
        'async def get(self, name: str, *, deep: bool = False) -> int:\n    """Get it."""',
        """
        def get(self, name: str, *, deep: bool = False) -> int:
            \"""Get it.\"""
            return self._bridge.run(self._impl.get, name=name, deep=deep)
        """,
    ),
    "coroutine without a result": (
        "async def get(self) -> None: ...",
        "def get(self) -> None:\n    self._bridge.run(self._impl.get)",
    ),
    "every kind of parameter": (
        "async def get(self, a: int, /, b: int = LIMIT, *c: int, d: int, **e: str) -> int: ...",
        """
        def get(self, a: int, /, b: int = LIMIT, *c: int, d: int, **e: str) -> int:
            return self._bridge.run(self._impl.get, a, b, *c, d=d, **e)
        """,
    ),
    "blocking property": (
        "@blocking_property\nasync def size(self) -> int: ...",
        "@property\ndef size(self) -> int:\n    return self._bridge.run(self._impl.size)",
    ),
    "property": (
        "@property\ndef size(self) -> int: ...",
        "@property\ndef size(self) -> int:\n    return self._impl.size",
    ),
    "property that is a handle": (
        "@property\ndef other(self) -> Other: ...",
        "@property\ndef other(self) -> Other:\n    return Other(self._impl.other, self)",
    ),
    "plain method": (
        "def size(self, of: int) -> int: ...",
        "def size(self, of: int) -> int:\n    return self._bridge.call(self._impl.size, of=of)",
    ),
    "class method": (
        "@classmethod\nasync def count(cls) -> int: ...",
        "@classmethod\ndef count(cls) -> int:\n    return current().run(_core.CLASS.count)",
    ),
    "async generator": (
        "async def all(self, limit: int) -> AsyncIterator[Value]:\n    yield Value()",
        "def all(self, limit: int) -> Items[Value]:\n    return self._bridge.iterate(self._impl.all, limit=limit)",
    ),
    "function that returns an async generator": (
        "def all(self) -> AsyncGenerator[int, None]: ...",
        "def all(self) -> Items[int]:\n    return self._bridge.iterate(self._impl.all)",
    ),
    "context manager": (
        "@asynccontextmanager\nasync def held(self) -> AsyncIterator[Other]:\n    yield Other()",
        """
        @contextmanager
        def held(self) -> Iterator[Other]:
            with self._bridge.hold(self._impl.held) as value:
                yield Other(value, self)
        """,
    ),
    "future": (
        "async def start(self) -> OperationFuture[Value]: ...",
        """
        def start(self) -> OperationFuture[Value]:
            return OperationFuture(self._bridge.run(self._impl.start), self)
        """,
    ),
    "handle result": (
        "async def other(self) -> Other: ...",
        "def other(self) -> Other:\n    return Other(self._bridge.run(self._impl.other), self)",
    ),
    "handle result or None": (
        "async def other(self) -> Other | None: ...",
        """
        def other(self) -> Other | None:
            return None if (value := self._bridge.run(self._impl.other)) is None else Other(value, self)
        """,
    ),
    "list of handles": (
        "async def others(self) -> list[Other]: ...",
        """
        def others(self) -> list[Other]:
            return [Other(each, self) for each in self._bridge.run(self._impl.others)]
        """,
    ),
    "handle arguments": (
        "async def join(self, one: Other, many: Sequence[Other], maybe: Other | None = None) -> None: ...",
        """
        def join(self, one: Other, many: Sequence[Other], maybe: Other | None = None) -> None:
            self._bridge.run(
                self._impl.join,
                one=unwrap(one),
                many=[unwrap(each) for each in many],
                maybe=None if maybe is None else unwrap(maybe),
            )
        """,
    ),
    "awaitable callback": (
        "async def tell(self, told: Callable[[int], Awaitable[None]]) -> None: ...",
        """
        def tell(self, told: Callable[[int], None]) -> None:
            self._bridge.run(self._impl.tell, told=in_worker_thread(told))
        """,
    ),
    "awaitable callback or None": (
        "async def tell(self, told: Callable[..., Awaitable[int]] | None = None) -> None: ...",
        """
        def tell(self, told: Callable[..., int] | None = None) -> None:
            self._bridge.run(self._impl.tell, told=None if told is None else in_worker_thread(told))
        """,
    ),
    "plain callback": (
        "async def tell(self, told: Callable[[int], None]) -> None: ...",
        "def tell(self, told: Callable[[int], None]) -> None:\n    self._bridge.run(self._impl.tell, told=told)",
    ),
    "async iterable argument": (
        "async def take(self, items: Iterable[int] | AsyncIterable[int]) -> None: ...",
        """
        def take(self, items: Iterable[int]) -> None:
            self._bridge.run(self._impl.take, items=stepped_in_worker_threads(items))
        """,
    ),
    "type alias of plain types": (
        "async def get(self, mark: Mark, kind: Literal['a', 'b'] = 'a') -> Mark | None: ...",
        """
        def get(self, mark: Mark, kind: Literal["a", "b"] = "a") -> Mark | None:
            return self._bridge.run(self._impl.get, mark=mark, kind=kind)
        """,
    ),
    "private members": ("_x: int = 1\n__slots__ = ()\nasync def _get(self) -> int: ...", ""),
    "what the base class has": ('def __repr__(self) -> str: return ""', ""),
}
"""What stands in the core's class, and what comes of it in the twin's."""

ALWAYS = "async def always(self) -> None: ...\n"
ALWAYS_TWIN = "def always(self) -> None:\n    self._bridge.run(self._impl.always)"


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bodies of the twins, by rule; all rules in one run."""
    classes = {f"Rule{at}": f"{ALWAYS}{textwrap.dedent(members)}" for at, (members, _) in enumerate(RULES.values())}
    source = gen_sync.generate(core_of(tmp_path_factory.mktemp("rules"), classes))["things.py"]
    parts = re.split(r"^class Rule\d+\(Handle\[_core\.Rule\d+\]\):\n", source, flags=re.MULTILINE)[1:]
    return dict(zip(RULES, map(textwrap.dedent, parts), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_rule(bodies: dict[str, str], rule: str) -> None:
    expected = textwrap.dedent(RULES[rule][1]).strip()
    assert re.sub(r"_core\.Rule\d+", "_core.CLASS", bodies[rule]).strip() == f"{ALWAYS_TWIN}\n\n{expected}".strip()


NO_RULE = {
    "future of handles": ("async def f(self) -> OperationFuture[Other]: ...", "the result OperationFuture[Other]"),
    "handles in a dict": ("async def f(self) -> dict[str, Other]: ...", "the result dict[str, Other]"),
    "alias of handles": ("async def f(self) -> Others: ...", "the result Others"),
    "coroutine that returns an iterator": ("async def f(self) -> AsyncIterator[int]: ...", "the result AsyncIterator"),
    "iterator over handles": ("async def f(self) -> AsyncIterator[Other]:\n    yield Other()", "iterator over Other"),
    "asyncio object": ("async def f(self, when: asyncio.Event) -> None: ...", "parameter when: asyncio.Event"),
    "awaitable argument": ("async def f(self, it: Awaitable[int]) -> None: ...", "parameter it: Awaitable[int]"),
    "alias of an awaitable callback": ("async def f(self, told: Told) -> None: ...", "parameter told: Told"),
    "callback that takes a handle": ("async def f(self, g: Callable[[Other], None]) -> None: ...", "parameter g"),
    "callback of both colours": (
        "async def f(self, g: Callable[[], Awaitable[int] | int]) -> None: ...",
        "parameter g",
    ),
    "type in quotes": ("async def f(self, it: 'Other') -> None: ...", "parameter it: 'Other'"),
    "iterables of different things": (
        "async def f(self, it: Iterable[int] | AsyncIterable[str]) -> None: ...",
        "parameter it: Iterable[int] | AsyncIterable[str]",
    ),
    "variadic handles": ("async def f(self, *them: Other) -> None: ...", "parameter them: Other"),
    "itself": ("async def f(self) -> Self: ...", "the result Self"),
    "no annotation": ("async def f(self, it) -> None: ...", "parameter it has no annotation"),
    "no result annotation": ("async def f(self): ...", "no return annotation"),
    "private name": ("async def f(self, it: _Hidden) -> None: ...", "_Hidden is private"),
    "name of a private module": (
        "async def f(self, it: blocking_property) -> None: ...",
        "private module loops_async._f",
    ),
    "module": ("async def f(self, it: datetime.date) -> None: ...", "datetime is a module"),
    "special method": ("def __len__(self) -> int: ...", "special method"),
    "decorator": ("@staticmethod\nasync def f() -> None: ...", "the decorator staticmethod"),
    "property with an argument": ("@blocking_property\nasync def f(self, it: int) -> int: ...", "takes no arguments"),
    "property that is a coroutine": ("@property\nasync def f(self) -> int: ...", "needs the mark blocking_property"),
    "property that is an iterator": (
        "@property\ndef f(self) -> AsyncIterator[int]: ...",
        "the result AsyncIterator[int]",
    ),
    "two decorators": (
        "@classmethod\n@asynccontextmanager\nasync def f(cls) -> AsyncIterator[int]:\n    yield 1",
        "asynccontextmanager, classmethod together",
    ),
    "open with an argument": (
        """
        def __init__(self) -> None: ...
        async def open(self, it: int = 1) -> Self: ...
        async def close(self) -> None: ...
        async def __aenter__(self) -> Self: ...
        async def __aexit__(self, *details: object) -> None: ...
        """,
        "open takes no arguments",
    ),
    "public attribute": ("size: ClassVar[int] = 3", "the attribute size"),
    "async with without close": ("async def __aenter__(self) -> Self: ...", "__aexit__, close"),
    "open without the rest": ("async def open(self) -> Self: ...", "__aenter__, __aexit__, __init__, close"),
    "asyncio in an example": (
        'async def f(self) -> None:\n    """Do.\n\n    ::\n\n        asyncio.run(f())\n    """',
        "`asyncio` in the example: asyncio.run(f())",
    ),
    "await in a string of an example": (
        'async def f(self) -> None:\n    """Do.\n\n    ::\n\n        print("await it")\n    """',
        "in the example",
    ),
    "prompts in an example": ('async def f(self) -> None:\n    """Do.\n\n    >>> await f()\n    """', "with prompts"),
    "an example in another language": (
        'async def f(self) -> None:\n    """Do.\n\n    ::\n\n        (\n    """',
        "not Python",
    ),
}
"""What stands in the core's class, and what the error says."""


@pytest.mark.parametrize("case", NO_RULE)
def test_no_rule_is_an_error(tmp_path: Path, case: str) -> None:
    members, words = NO_RULE[case]
    with pytest.raises(gen_sync.GenerationError) as error:
        gen_sync.generate(core_of(tmp_path, {"Thing": f"{ALWAYS}{textwrap.dedent(members)}"}))
    assert str(error.value).startswith("thing_core/things.py: Thing")
    assert words in str(error.value)


def test_an_error_names_everything_at_once(tmp_path: Path) -> None:
    with pytest.raises(gen_sync.GenerationError) as error:
        gen_sync.generate(core_of(tmp_path, {"Thing": "async def one(self): ...\nasync def two(self) -> Self: ...\n"}))
    assert [line.split(": ")[1] for line in str(error.value).splitlines()] == ["Thing.one", "Thing.two"]


def test_base_classes_have_no_rule(tmp_path: Path) -> None:
    core = core_of(tmp_path, {"Thing": ALWAYS})
    (core / "things.py").write_text((core / "things.py").read_text().replace("class Thing:", "class Thing(Base):"))
    with pytest.raises(gen_sync.GenerationError, match="Thing: no rule for base classes"):
        gen_sync.generate(core)


def test_a_class_with_coroutines_in_a_private_module_has_no_rule(tmp_path: Path) -> None:
    core = core_of(tmp_path, {"Thing": ALWAYS})
    (core / "others.py").rename(core / "_others.py")
    (core / "__init__.py").write_text('from ._others import Other\n__all__ = ["Other"]\n')
    with pytest.raises(gen_sync.GenerationError, match="Other has coroutines"):
        gen_sync.generate(core)


EXAMPLES = {
    "await g(x)": "g(x)",
    "x = await a.b(c)[0].d()": "x = a.b(c)[0].d()",
    "await step": "step.result()",
    "await self.step": "self.step.result()",
    "await steps[0]": "steps[0].result()",
    "loss = (await step).loss": "loss = step.result().loss",
    "print(await step)": "print(step.result())",
    "return (await f())": "return f()",
    "await (await f()).result(timeout=3)": "f().result(timeout=3)",
    "await (await f())": "f().result()",
    "x = [await f(x) for x in y]": "x = [f(x) for x in y]",
    "async with f() as x:\n    await x.y()": "with f() as x:\n    x.y()",
    "async for x in f():\n    pass": "for x in f():\n    pass",
    "async def f():\n    return 1": "def f():\n    return 1",
    "n = await trainer.size() + 1": "n = trainer.size + 1",
    "import loops_async as loops": "import loops_sync as loops",
    "x = (await f(  # why\n    a,\n)).b": "x = f(  # why\n    a,\n).b",
    "f\n(await g()).h": "f\ng().h",
    "# await nothing": "# await nothing",
}


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_code(code: str) -> None:
    assert gen_sync.blocking_code(code, frozenset({"size"})) == EXAMPLES[code]


def test_prose_is_left_alone() -> None:
    docstring = '''"""Then await f() in loops_async: that is `await`.

        ```python
        await f()
        ```

        And await g() again::

            await g()

        Last await h().
        """'''
    changed = gen_sync.blocking_docstring(docstring, frozenset())
    expected = docstring.replace("        await f()", "        f()").replace("            await g()", "            g()")
    assert changed == expected


@pytest.fixture(scope="module")
def sample() -> dict[str, str]:
    return gen_sync.generate(HERE / "sample_core")


def test_sample_package_is_up_to_date(sample: dict[str, str]) -> None:
    stale = gen_sync.differences(sample, HERE / "sample_sync")
    assert not stale, (
        "read the difference, then run tools/gen_sync.py tests/facade/sample_core tests/facade/sample_sync"
    )


@pytest.fixture
def twin(tmp_path: Path, sample: dict[str, str]) -> Path:
    """A directory with an up-to-date twin."""
    twin = tmp_path / "twin"
    twin.mkdir()
    gen_sync.write(sample, twin)
    (twin / "_bridge.py").write_text("# by hand\n")
    assert gen_sync.differences(sample, twin) == []
    return twin


@pytest.mark.parametrize("extra", ["\n", "x = 1\n"])
def test_one_line_too_many_is_stale(twin: Path, sample: dict[str, str], extra: str) -> None:
    (twin / "workers.py").write_text(sample["workers.py"] + extra)
    assert gen_sync.differences(sample, twin) == ["twin/workers.py: stale"]


def test_a_missing_file_is_missing(twin: Path, sample: dict[str, str]) -> None:
    (twin / "workers.py").unlink()
    assert gen_sync.differences(sample, twin) == ["twin/workers.py: missing"]


def test_a_file_whose_source_is_gone_is_removed(twin: Path, sample: dict[str, str]) -> None:
    (twin / "gone.py").write_text(sample["workers.py"])
    assert gen_sync.differences(sample, twin) == ["twin/gone.py: has no source (any more)"]
    gen_sync.write(sample, twin)
    assert gen_sync.differences(sample, twin) == []


def test_a_file_of_somebody_else_is_told_and_kept(twin: Path, sample: dict[str, str]) -> None:
    (twin / "somebodys.py").write_text("x = 1\n")
    gen_sync.write(sample, twin)
    assert gen_sync.differences(sample, twin) == ["twin/somebodys.py: has no source (any more)"]


def test_check_fails_and_writes_nothing(twin: Path) -> None:
    (twin / "workers.py").write_text("")
    assert gen_sync.main([str(HERE / "sample_core"), str(twin), "--check"]) == 1
    assert (twin / "workers.py").read_text() == ""


def test_what_has_no_rule_is_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    core = core_of(tmp_path, {"Thing": "async def f(self): ..."})
    assert gen_sync.main([str(core), str(tmp_path)]) == 1
    assert capsys.readouterr().err == "thing_core/things.py: Thing.f: it has no return annotation\n"
    assert list(tmp_path.glob("*.py")) == []


def test_the_banner_names_the_source() -> None:
    first = (HERE / "sample_sync" / "workers.py").read_text().splitlines()[0]
    assert first == "# Generated by tools/gen_sync.py from sample_core/workers.py: change that, then run `make sync`."

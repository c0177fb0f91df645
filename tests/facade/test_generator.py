"""Each rule of the generator on a small core, and what it refuses."""

from __future__ import annotations

import re
import textwrap
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import loops_async
from tools import blocking_docs, gen_sync

pytest.importorskip("ruff", reason="the generator formats with ruff, which only developers need")

HEAD = '''
"""Things."""
from __future__ import annotations
import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar
from msgspec import UNSET, UnsetType
T = TypeVar("T")
'''

OTHERS = """
class Value: ...
class Other:
    async def go(self) -> None: ...
class Job(Generic[T]):
    async def result(self) -> T: ...
    def __await__(self): ...
ValueJob: TypeAlias = Job[Value]
Mark: TypeAlias = str
Told: TypeAlias = Callable[[int], Awaitable[None]]
Work: TypeAlias = Callable[[Other, T], Awaitable[Value | list[Value] | None]]
class Hidden: ...
"""

WORK = "Work: TypeAlias = Callable[[Other, T], Value | list[Value] | None]\n"


def module(name: str, source: str, **names: object) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    exec(compile(HEAD + source, name, "exec"), vars(made))
    return made


def core_of(things: str, *exported: str, others: str = "thing_core._others") -> ModuleType:
    """Make a core package of things, which are exported, beside some others."""
    beside = vars(module(others, OTHERS))
    shared = {name: beside[name] for name in ("Value", "Other", "Job", "ValueJob", "Mark", "Told", "Work", "Hidden")}
    made = vars(module("thing_core.things", things, **shared))
    core = ModuleType("thing_core")
    core.__all__ = ["Value", "Other", "Job", "ValueJob", "Mark", "Told", "Work", *exported]
    vars(core).update({name: made[name] for name in core.__all__})
    return core


def class_of(name: str, members: str) -> str:
    return f"class {name}:\n{textwrap.indent(textwrap.dedent(members), '    ')}\n"


ALWAYS = "async def always(self) -> None: ...\n"
ALWAYS_TWIN = "def always(self) -> None:\n    self._bridge.run(self._impl.always)"

RULES = {
    "coroutine": (
        'async def get(self, name: str, *, deep: bool = False) -> int:\n    """Get it."""',
        """
        def get(self, name: str, *, deep: bool = False) -> int:
            \"""Get it.\"""
            return self._bridge.run(self._impl.get, name=name, deep=deep)
        """,
    ),
    "property": (
        "@property\ndef size(self) -> int: ...",
        "@property\ndef size(self) -> int:\n    return self._impl.size",
    ),
    "property that is a handle": (
        "@property\ndef other(self) -> Other: ...",
        "@property\ndef other(self) -> Other:\n    return self._part(Other, self._impl.other)",
    ),
    "plain method": (
        "def size(self, of: int) -> int: ...",
        "def size(self, of: int) -> int:\n    return self._bridge.call(self._impl.size, of=of)",
    ),
    "class method": (
        "@classmethod\nasync def count(cls) -> int: ...",
        "@classmethod\ndef count(cls) -> int:\n    return current().run(_core.CLASS.count)",
    ),
    "method that iterates": (
        "async def all(self, limit: int) -> AsyncIterator[Value]:\n    yield Value()",
        "def all(self, limit: int) -> Items[Value]:\n    return self._bridge.iterate(self._impl.all, limit=limit)",
    ),
    "handle": (
        "async def start(self) -> Job[Value]: ...",
        "def start(self) -> Job[Value]:\n    return Job[Value]._of(self._bridge.run(self._impl.start), self)",
    ),
    "alias of a handle": (
        "async def start(self) -> ValueJob: ...",
        "def start(self) -> ValueJob:\n    return ValueJob._of(self._bridge.run(self._impl.start), self)",
    ),
    "context of a handle": (
        """
        def borrow(
            self, *, on_event: Callable[[Value], object] | None = None
        ) -> AbstractAsyncContextManager[Other]: ...
        """,
        """
        def borrow(self, *, on_event: Callable[[Value], object] | None = None) -> AbstractContextManager[Other]:
            relay = self._bridge.relay(on_event)
            return Scope(Other, relay.hold(self._impl.borrow, on_event=relay.post), self)
        """,
    ),
    "property that can be set": (
        """
        @property
        def other(self) -> Other: ...
        @other.setter
        def other(self, other: Other) -> None: ...
        """,
        """
        @property
        def other(self) -> Other:
            return self._part(Other, self._impl.other)

        @other.setter
        def other(self, other: Other) -> None:
            self._impl.other = unwrap(other)
        """,
    ),
    "handle as an argument that may be missing": (
        "async def join(self, one: Other | None = None) -> None: ...",
        """
        def join(self, one: Other | None = None) -> None:
            self._bridge.run(self._impl.join, one=None if one is None else unwrap(one))
        """,
    ),
    "handle as an argument": (
        "async def join(self, one: Other) -> None: ...",
        "def join(self, one: Other) -> None:\n    self._bridge.run(self._impl.join, one=unwrap(one))",
    ),
    "callback": (
        "async def do(self, on_event: Callable[[Value], object] | None = None) -> Other: ...",
        """
        def do(self, on_event: Callable[[Value], object] | None = None) -> Other:
            relay = self._bridge.relay(on_event)
            return Other._of(relay.run(self._impl.do, on_event=relay.post), self)
        """,
    ),
    "iterable of both kinds": (
        "async def take(self, items: Iterable[int | Mark] | AsyncIterable[int | Mark]) -> None: ...",
        """
        def take(self, items: Iterable[int | Mark]) -> None:
            self._bridge.run(self._impl.take, items=stepped_in_worker_threads(items))
        """,
    ),
    "coroutine function of a handle": (
        "async def use(self, work: Callable[[Other, int], Awaitable[Value | None]], *, times: int = 1) -> Other: ...",
        """
        def use(self, work: Callable[[Other, int], Value | None], *, times: int = 1) -> Other:
            return Other._of(
                self._bridge.run(self._impl.use, work=self._in_threads(Other, "work", work), times=times), self
            )
        """,
    ),
    "alias of coroutine functions of a handle": (
        "def use(self, work: Work) -> int: ...",
        """
        def use(self, work: Work) -> int:
            return self._bridge.call(self._impl.use, work=self._in_threads(Other, "work", work))
        """,
    ),
    "function that computes": (
        "async def get(self, score: Mark | Callable[[list[float]], list[float]] = 'sum') -> None: ...",
        """
        def get(self, score: Mark | Callable[[list[float]], list[float]] = "sum") -> None:
            self._bridge.run(self._impl.get, score=score)
        """,
    ),
    "argument that is named after this form": (
        "def client(self, *, blocking: bool = False) -> int: ...",
        """
        def client(self, *, blocking: bool = True) -> int:
            return self._bridge.call(self._impl.client, blocking=blocking)
        """,
    ),
    "variadic": (
        "async def run(self, function: Callable[..., T], *args: Any, deep: bool = False) -> T: ...",
        """
        def run(self, function: Callable[..., T], *args: Any, deep: bool = False) -> T:
            return self._bridge.run(self._impl.run, function, *args, deep=deep)
        """,
    ),
    "coroutine function of values, with a result": (
        "async def run(self, function: Callable[[int], Awaitable[T]]) -> T: ...",
        """
        def run(self, function: Callable[[int], T]) -> T:
            return self._bridge.run(self._impl.run, function=InThread(function))
        """,
    ),
    "value whose name is like that of a callback": (
        "async def do(self, on_error: Literal['raise', 'skip'] = 'raise') -> None: ...",
        """
        def do(self, on_error: Literal["raise", "skip"] = "raise") -> None:
            self._bridge.run(self._impl.do, on_error=on_error)
        """,
    ),
    "iterator": (
        "def __aiter__(self) -> Self: ...\nasync def __anext__(self) -> Value: ...",
        """
        def __iter__(self) -> Self:
            return self

        def __next__(self) -> Value:
            return self._bridge.advance(self._impl.__anext__)
        """,
    ),
    "iterable": (
        "async def __aiter__(self) -> AsyncIterator[Value]:\n    yield Value()",
        "def __iter__(self) -> Items[Value]:\n    return self._bridge.iterate(self._impl.__aiter__)",
    ),
    "aliases and defaults": (
        """
        async def get(self, mark: Mark | UnsetType = UNSET, kind: Literal['a', 'b'] = 'a', t: float = 3e3) -> Mark: ...
        """,
        """
        def get(self, mark: Mark | UnsetType = UNSET, kind: Literal["a", "b"] = "a", t: float = 3000.0) -> Mark:
            return self._bridge.run(self._impl.get, mark=mark, kind=kind, t=t)
        """,
    ),
    "private members": ("_x = 1\n__slots__ = ()\nasync def _get(self) -> int: ...", ""),
    "what the base class has": ('def __repr__(self) -> str: return ""', ""),
}
"""What stands in the core's class, and what comes of it in the twin's."""


@pytest.fixture(scope="module")
def bodies() -> dict[str, str]:
    """The bodies of the twins, by rule; all rules in one run."""
    names = [f"Rule{at:02}" for at in range(len(RULES))]
    classes = [
        class_of(name, ALWAYS + textwrap.dedent(members))
        for name, (members, _) in zip(names, RULES.values(), strict=True)
    ]
    source = gen_sync.generate(core_of("".join(classes), *names))["things.py"]
    parts = re.split(r"^class Rule\d+\(Handle\[_core\.Rule\d+\]\):\n", source, flags=re.MULTILINE)[1:]
    return dict(zip(RULES, map(textwrap.dedent, parts), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_rule(bodies: dict[str, str], rule: str) -> None:
    expected = textwrap.dedent(RULES[rule][1]).strip()
    assert re.sub(r"_core\.Rule\d+", "_core.CLASS", bodies[rule]).strip() == f"{ALWAYS_TWIN}\n\n{expected}".strip()


OPENED = """
def __init__(self, name: str = "") -> None: ...
@classmethod
def local(cls) -> Self: ...
async def open(self) -> Self: ...
async def close(self) -> None: ...
async def __aenter__(self) -> Self: ...
async def __aexit__(self, *details: object) -> None: ...
"""


def test_classes_that_open_and_close_and_functions_and_aliases() -> None:
    closing = OPENED.replace("async def open(self) -> Self: ...", "").replace(
        "@classmethod\ndef local(cls) -> Self: ...", ""
    )
    function = "async def greet(to: Other) -> int: ...\n"
    core = core_of(class_of("Shop", OPENED) + class_of("Till", closing) + function, "Shop", "Till", "greet")
    files = gen_sync.generate(core)
    assert sorted(files) == ["__init__.py", "_future.py", "things.py"]
    for expected in (
        "class Shop(Opened[_core.Shop]):\n",
        '    def __init__(self, name: str = "") -> None:\n        self._open(_core.Shop, name=name)\n',
        "    @classmethod\n    def local(cls) -> Self:\n        return cls._opened(_core.Shop.local)\n",
        "    def close(self) -> None:\n        super().close()\n",
        "class Till(Closing[_core.Till]):\n    def close(self) -> None:\n        self._bridge.run(self._impl.close)\n",
        "def greet(to: Other) -> int:\n    return current().run(_core.greet, to=unwrap(to))\n",
        "from ._future import Other\n",
    ):
        assert expected in files["things.py"]
    assert "class Job(Handle[_core.Job[T]]):\n    __module__ = " in files["_future.py"]
    assert files["_future.py"].endswith("\n\nValueJob: TypeAlias = Job[Value]\n" + WORK)
    assert files["things.py"].startswith("# Generated by tools/gen_sync.py from thing_core/things.py: ")
    assert "from ._future import Job, Other, ValueJob, Work\n" in files["__init__.py"]
    assert "from thing_core import Mark, Told, Value\n" in files["__init__.py"]


def test_classes_that_are_entered_or_created() -> None:
    entered = OPENED.replace("open(", "again(").replace("close(", "end(")
    gate = "def __init__(self, *, size: int = 3) -> None: ...\n" + ALWAYS
    core = core_of(class_of("Stream", entered) + class_of("StalenessGate", gate), "Stream", "StalenessGate")
    source = gen_sync.generate(core)["things.py"]
    assert "class Stream(Entered[_core.Stream]):\n    @classmethod" in source
    assert "    def __init__(self, *, size: int = 3) -> None:\n        self._create(_core.StalenessGate, size" in source


def test_a_public_module_may_list_what_private_ones_define() -> None:
    """Its names in the twin are the twins, and the values of the core."""
    thing = class_of("Thing", "async def use(self, work: Work) -> Value: ...")
    core = core_of(thing, "Thing", others="thing_core._a.b")
    core.others = module("thing_core.others", "__all__ = ['Other', 'Value', 'ValueJob', 'Work', 'Unknown']")
    files = gen_sync.generate(core)
    assert sorted(files) == ["__init__.py", "_future.py", "others.py", "things.py"]
    for expected in (
        "# Generated by tools/gen_sync.py from thing_core/others.py: ",
        '"""Things."""',
        "from thing_core import Value\n",
        "from ._future import ValueJob\n",
        '__all__ = ["Other", "Value", "ValueJob", "Work"]\n',
        "class Other(Handle[_core.Other]):\n    def go(self)",
        WORK,
    ):
        assert expected in files["others.py"]
    assert "from .others import Other, Work\n" in files["things.py"]
    assert "from .others import Other, Work\n" in files["__init__.py"]


def test_a_class_may_pretend_to_live_elsewhere() -> None:
    core = core_of(class_of("Thing", ALWAYS), "Thing")
    core.Thing.__module__ = "thing_core"
    assert "things.py" in gen_sync.generate(core)


def test_modules_of_values_are_importable_from_the_twin() -> None:
    core = core_of(class_of("Thing", ALWAYS), "Thing")
    core.values = module("thing_core.values", "__all__ = ['Value', 'Mark']")
    files = gen_sync.generate(core)
    assert "from thing_core import Mark, Value\n" in files["values.py"]
    assert "from . import values as values\n" in files["__init__.py"]


NO_RULE = {
    "future of handles": ("async def f(self) -> Job[Other]: ...", "the result Job[Other]"),
    "handle or None": ("async def f(self) -> Other | None: ...", "the result Other | None"),
    "list of handles": ("async def f(self) -> list[Other]: ...", "the result list[Other]"),
    "coroutine that returns an iterator": ("async def f(self) -> AsyncIterator[int]: ...", "the result AsyncIterator"),
    "iterator over handles": (
        "async def f(self) -> AsyncIterator[Other]:\n    yield Other()",
        "the result AsyncIterator",
    ),
    "handles": ("async def f(self, them: Sequence[Other]) -> None: ...", "parameter them: Sequence[Other]"),
    "context of a value": ("def f(self) -> AbstractAsyncContextManager[Value]: ...", "the result AbstractAsync"),
    "awaitable": ("async def f(self, it: Awaitable[int]) -> None: ...", "parameter it: Awaitable[int]"),
    "awaitable callback": (
        "async def f(self, on_it: Callable[[int], Awaitable[None]] | None = None) -> None: ...",
        "parameter on_it",
    ),
    "alias of an awaitable callback": ("async def f(self, told: Told) -> None: ...", "parameter told: Told"),
    "callback by another name": ("async def f(self, it: Callable[[int], object] | None) -> None: ...", "parameter it"),
    "callback of what is no coroutine": (
        "def f(self, on_it: Callable[[int], object] | None) -> int: ...",
        "these parameters",
    ),
    "iterables of different things": (
        "async def f(self, it: Iterable[int] | AsyncIterable[str]) -> None: ...",
        "parameter it: Iterable[int] | AsyncIterable[str]",
    ),
    "type in quotes": ("async def f(self, it: 'Other') -> None: ...", "a type in quotes"),
    "variadic by keyword": ("async def f(self, **them: int) -> None: ...", "parameter **them"),
    "coroutine function of no handle": (
        "async def f(self, it: Callable[[int], Awaitable[None]]) -> None: ...",
        "parameter it",
    ),
    "coroutine function for a class method": (
        "@classmethod\nasync def f(cls, it: Callable[[Other], Awaitable[None]]) -> None: ...",
        "parameter it",
    ),
    "callback that returns None": ("async def f(self, it: Callable[[int], None]) -> None: ...", "parameter it"),
    "context that may end an error": (
        "async def __aenter__(self) -> Self: ...\nasync def __aexit__(self, *details: object) -> bool: ...",
        "a context that may end an error",
    ),
    "positional only": ("async def f(self, it: int, /) -> None: ...", "parameter it"),
    "default that is no value": ("async def f(self, it: Any = object()) -> None: ...", "is not exported"),
    "no annotation": ("async def f(self, it) -> None: ...", "it has no annotation"),
    "no result annotation": ("async def f(self): ...", "return has no annotation"),
    "name that is not exported": ("async def f(self, it: Hidden) -> None: ...", "Hidden is in a public signature"),
    "module": ("async def f(self, it: asyncio.Event) -> None: ...", "asyncio is in a public signature"),
    "special method": ("def __len__(self) -> int: ...", "special method"),
    "static method": ("@staticmethod\nasync def f() -> None: ...", "such an attribute"),
    "attribute": ("size = 3", "such an attribute"),
    "property that awaits": ("@property\nasync def f(self) -> int: ...", "must be a method in PROPERTIES"),
    "prompt in an example": ('async def f(self) -> None:\n    """Do.\n\n    >>> f()\n    """', "no rule for >>>"),
    "asyncio in an example": (
        'async def f(self) -> None:\n    """Do.\n\n    ::\n\n        asyncio.gather(f())\n    """',
        "the example: asyncio.gather(f())",
    ),
    "prose of one form": (
        'async def f(self) -> None:\n    """Do. Then\n    await it: it is quick. Done.\n    """',
        "true of one form only (see PROSE): Then await it:",
    ),
}
"""What stands in the core's class, and what the error says."""


@pytest.mark.parametrize("case", NO_RULE)
def test_no_rule_is_an_error_that_names_it(case: str) -> None:
    members, words = NO_RULE[case]
    with pytest.raises(gen_sync.GenerationError) as error:
        gen_sync.generate(core_of(class_of("Thing", ALWAYS + textwrap.dedent(members)), "Thing"))
    assert re.match(r"thing_core/things\.py: Thing\.(f|size|__len__|__aexit__): ", str(error.value))
    assert words in str(error.value)


def test_base_classes_have_no_rule() -> None:
    with pytest.raises(gen_sync.GenerationError, match="Thing: no rule for base classes"):
        gen_sync.generate(core_of(class_of("Thing(Value)", ALWAYS), "Thing"))


EXAMPLES = {
    "x = await a.b(c)[0].d()": "x = a.b(c)[0].d()",
    "await step": "step.result()",
    "loss = (await self.step).loss": "loss = self.step.result().loss",
    "first = (await f(x))[0]": "first = f(x)[0]",
    "print(batch.report(await step))": "print(batch.report(step.result()))",
    "episode.observe(await ctx.run(task.reply, answer.tokens))": "episode.observe(ctx.run(task.reply, answer.tokens))",
    "await step.result(timeout=3)": "step.result(timeout=3)",
    "async with f() as x:\n    await x.y()": "with f() as x:\n    x.y()",
    "async for x in f():\n    pass": "for x in f():\n    pass",
    "n = await trainer.policy_version() + 1": "n = trainer.policy_version + 1",
    "import loops_async as loops": "import loops_sync as loops",
    "import asyncio\n\nimport loops_local\n\n\nasyncio.run(main(1))": "import loops_local\n\n\nmain(1)",
    'service = await loops.ServiceClient(api_key="k").open()': 'service = loops.ServiceClient(api_key="k")',
    "async with loops_local.LocalService() as local:": "with loops_local.serve_in_thread() as local:",
}


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_code(code: str) -> None:
    assert blocking_docs.blocking_code(code, "loops_async") == EXAMPLES[code]


def test_the_blocking_form_of_a_block_is_made_or_written() -> None:
    assert blocking_docs.both_forms("await f()\n", "loops_async") == ("await f()\n", "f()\n")
    assert blocking_docs.both_forms("await f()\n%%\ng()\n", "loops_async") == ("await f()\n", "g()\n")


DOC = """Do it.

Call it before the event loop
ends.

Example:
    ::

        await f()

        await g()

    Text.
"""


def test_docstrings_change_in_code_and_in_the_paragraph_that_has_another() -> None:
    expected = DOC.replace("Call it before the event loop\nends.", "Call it once.").replace("await ", "")
    assert blocking_docs.blocking_docstring(DOC, "loops_async", "Call it once.") == f'"""{expected}"""'
    with pytest.raises(gen_sync.GenerationError, match="Call it before the event loop ends"):
        blocking_docs.blocking_docstring(DOC, "loops_async")
    with pytest.raises(gen_sync.GenerationError, match="no paragraph needs"):
        blocking_docs.blocking_docstring("Do it.", "loops_async", "Call it once.")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return gen_sync.generate(loops_async)


@pytest.fixture
def twin(tmp_path: Path, files: dict[str, str]) -> Path:
    """A directory with an up-to-date twin."""
    gen_sync.write(files, tmp_path)
    (tmp_path / "_bridge.py").write_text("# by hand\n")
    assert gen_sync.differences(files, tmp_path) == []
    return tmp_path


def test_what_differs_is_named(twin: Path, files: dict[str, str]) -> None:
    (twin / "client.py").write_text(files["client.py"] + "\n")
    (twin / "dpo.py").unlink()
    (twin / "gone.py").write_text(files["client.py"])
    (twin / "somebodys.py").write_text("x = 1\n")
    kinds = {"client": "stale", "dpo": "missing", "gone": "has no source", "somebodys": "has no source"}
    assert gen_sync.differences(files, twin) == [f"{twin.name}/{name}.py: {kind}" for name, kind in kinds.items()]
    gen_sync.write(files, twin)
    assert gen_sync.differences(files, twin) == [f"{twin.name}/somebodys.py: has no source"]


def test_check_fails_and_writes_nothing(twin: Path) -> None:
    (twin / "client.py").write_text("")
    assert gen_sync.main(["--check"], twin) == 1
    assert (twin / "client.py").read_text() == ""


def test_what_has_no_rule_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = core_of(class_of("Thing", "async def f(self): ..."), "Thing")
    monkeypatch.setattr(gen_sync, "import_module", lambda name: core if name == gen_sync.CORE else import_module(name))
    assert gen_sync.main([], tmp_path) == 1
    assert capsys.readouterr().err.startswith("thing_core/things.py: Thing.f: return has no annotation")
    assert list(tmp_path.iterdir()) == []

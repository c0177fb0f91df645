"""How values are shown, and how they become JSON and return: one rule for every public struct."""

from __future__ import annotations

import json
import math
import pickle
import sys
import types
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Meta, Struct, UnsetType, structs

import loops_async as loops
from loops_async._values import Value

STRUCTS: Final = sorted(
    {each for name in loops.__all__ if isinstance(each := getattr(loops, name), type) and issubclass(each, Struct)}
    - {loops.ImageAssetPointerChunk},  # which nothing can make
    key=lambda kind: kind.__name__,
)
SECRET: Final = "X-Signature=0123"
URL: Final = f"https://user:pass@files.example/folder/file?{SECRET}#token={SECRET}"
NASTY: Final = "<script>alert('&')</script>\x1b[31m\r\n\u202e\u2066\u200b\U000e0041\x00\"'"


# --- values of every kind --------------------------------------------------------------------------------------------


@cache
def values_of(kind: type[Struct]) -> st.SearchStrategy[Any]:
    """Any value of a struct, as its annotations allow it, with unusual texts."""
    if kind is loops.TensorData:
        return st.lists(st.integers(-9, 9), max_size=9).map(lambda data: loops.TensorData.of(data, dtype="int64"))
    if kind is loops.RolloutState:
        return st.builds(kind, next_index=st.just(9), pending=st.lists(st.integers(0, 8), unique=True), run_id=IDS)
    if kind is loops.FailurePolicy:
        kinds = st.lists(st.sampled_from([KeyError, loops.InputError, json.JSONDecodeError])).map(tuple)
        return st.builds(kind, retries=st.integers(0, 9), retry_on=kinds)
    hints = get_type_hints(kind, include_extras=True)
    fields = {field.name: optional(field, strategy(hints[field.name], field.name)) for field in structs.fields(kind)}
    return st.fixed_dictionaries(fields).map(lambda given: made(kind, given))


def optional(field: structs.FieldInfo, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return values if field.required else st.just(UNSET) | values


def made(kind: type[Struct], given: dict[str, Any]) -> Any:
    return kind(**{name: value for name, value in given.items() if value is not UNSET})


IDS: Final = st.sampled_from(["i", "5f0c8e9e-6a1f-4d1c-8f5f-0123456789ab", "i" * 256])
TEXTS: Final = st.sampled_from(
    ["", "short", "x" * 41, NASTY, NASTY * 20, f"see {URL} there", "é😀" * 30, "bt://loops:run/weights/" + "n" * 60]
)
TIMES: Final = st.integers(0, 1 << 32).map(lambda seconds: datetime.fromtimestamp(seconds + 0.25, UTC))
ERRORS: Final = st.sampled_from([loops.RateLimitError(NASTY, status=429, request_id="r-1"), loops.InputError("x", URL)])
SIMPLE: Final[dict[Any, st.SearchStrategy[Any]]] = {
    str: TEXTS,
    int: st.integers(-(1 << 63), (1 << 63) - 1),
    float: st.floats(allow_nan=False) | st.just(0.1),
    bool: st.booleans(),
    bytes: st.binary(max_size=9) | st.just(b"x" * 5000),
    type(None): st.none(),
    datetime: TIMES,
    Path: st.sampled_from([Path("/a/folder"), Path("relative")]),
    Any: st.none() | TEXTS | st.dictionaries(TEXTS, st.integers(0, 9), max_size=9),
    UnsetType: st.just(UNSET),
    loops.LoopsError: ERRORS,
}


def strategy(hint: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Values of an annotation; `name` is that of the field, which says whether a text is an id or a URL."""
    origin, args = get_origin(hint), get_args(hint)
    if hasattr(hint, "__metadata__"):
        return of_annotated(args[0], [each for each in args[1:] if isinstance(each, Meta)], name)
    if origin in (Union, types.UnionType):
        return st.one_of(strategy(each, name) for each in args)
    if str(origin) == "typing.Literal":
        return st.sampled_from(args)
    if origin in (list, tuple):
        items = st.lists(strategy(args[0], name), max_size=8 if args[0] in SIMPLE else 2)
        return st.tuples(*map(strategy, args)) if origin is tuple and ... not in args else items.map(origin)
    if origin is dict:
        return st.dictionaries(strategy(args[0]), strategy(args[1], name), max_size=2)
    if isinstance(hint, type) and issubclass(hint, Struct):
        return st.nothing() if hint is loops.ImageAssetPointerChunk else st.deferred(lambda: values_of(hint))
    if isinstance(hint, type) and hint not in SIMPLE:
        return st.sampled_from(list(hint))  # an enumeration
    if hint is str and name.endswith("url"):
        return st.sampled_from([URL.replace("user:pass@", ""), "https://files.example"])
    return IDS if hint is str and (name == "id" or name.endswith("_id")) else SIMPLE[hint]


def of_annotated(kind: Any, rules: list[Meta], name: str) -> st.SearchStrategy[Any]:
    rule = rules[0]
    if kind is str:
        return IDS if rule.max_length is None else st.just("i")
    if get_origin(kind) is list:
        return st.lists(strategy(get_args(kind)[0], name), min_size=1, max_size=8)
    if kind is datetime:
        return TIMES
    lowest = rule.ge if rule.ge is not None else rule.gt if rule.gt is not None else 0
    if kind is int:
        return st.integers(int(lowest) + 1, 1 << 40)
    return st.floats(0.25, 0.75)


@pytest.fixture(scope="module", params=STRUCTS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[Any]:
    found: type[Any] = request.param
    return found


fast: Final = settings(
    max_examples=5,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# --- every struct ----------------------------------------------------------------------------------------------------


def test_every_public_struct_is_a_value() -> None:
    assert all(issubclass(each, Value) for each in [*STRUCTS, loops.ImageAssetPointerChunk])
    assert len(STRUCTS) > 60


@fast
@given(data=st.data())
def test_a_value_is_one_short_line(kind: type[Any], data: st.DataObject) -> None:
    value = data.draw(values_of(kind))
    for shown in (repr(value), "".join(f"{name}={text!r}" for name, text in value.__rich_repr__())):
        assert len(shown) <= 300
        assert shown.isprintable()
        assert SECRET not in shown
    assert repr(value).startswith(f"{kind.__name__}(")
    assert repr(value).endswith(")")


@fast
@given(data=st.data())
def test_ids_are_whole_or_left_out(kind: type[Any], data: st.DataObject) -> None:
    value = data.draw(values_of(kind))
    shown = dict(value.__rich_repr__())
    ids = [name for name in kind.__struct_fields__ if name == "id" or name.endswith("_id")]
    for name in set(ids) & set(shown):
        assert repr(shown[name]) == repr(getattr(value, name))
    if ids and sum(len(str(getattr(value, name))) for name in ids) < 150:
        given = {name for name in ids if getattr(value, name) not in (None, UNSET, "")}
        assert given <= set(shown)


@fast
@given(data=st.data())
def test_a_value_returns_from_its_dict(kind: type[Any], data: st.DataObject) -> None:
    value = data.draw(values_of(kind))
    plain = value.to_dict()
    assert all(type(part) in (dict, list, str, int, float, bool, type(None)) for part in parts_of(plain))
    again = kind.from_dict(plain)
    assert same(again, value)
    assert json.loads(value.to_json()) == json.loads(value.to_json(indent=2))
    assert pickle.dumps(again)


@fast
@given(data=st.data())
def test_a_value_is_a_harmless_table(kind: type[Any], data: st.DataObject) -> None:
    table = data.draw(values_of(kind))._repr_html_()
    assert len(table.encode()) <= 20_000
    seen = Tags()
    seen.feed(table)
    seen.close()
    assert seen.open == []
    assert seen.kinds <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert seen.count["table"] == 1
    assert seen.attributes <= {("style", "text-align: left")}
    assert SECRET not in table
    assert table.isprintable()


def parts_of(plain: Any) -> Iterator[Any]:
    """Yield every part of JSON types, the keys of dicts included."""
    yield plain
    children = [*plain, *plain.values()] if isinstance(plain, dict) else plain if isinstance(plain, list) else []
    for child in children:
        yield from parts_of(child)


def same(one: Any, other: Any) -> bool:
    """Whether values are equal; errors, which are equal to themselves only, are compared by what they hold."""
    for name in one.__struct_fields__:
        pair = getattr(one, name), getattr(other, name)
        if all(isinstance(each, loops.LoopsError) for each in pair):
            held = [(type(each), each.args, each.__dict__ | {"retryable": each.retryable}) for each in pair]
            cleared = [structs.replace(each, **{name: None}) for each in (one, other)]
            return held[0] == held[1] and same(*cleared)
    return bool(one == other)


class Tags(HTMLParser):
    """Collects what a document consists of; raises `AssertionError` when a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.kinds: set[str] = set()
        self.count: dict[str, int] = {}
        self.attributes: set[tuple[str, str | None]] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.kinds.add(tag)
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes |= set(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# --- what is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (loops.AdamParams(), "AdamParams()"),
        (loops.AdamParams(learning_rate=1e-5), "AdamParams(learning_rate=1e-05)"),
        (loops.EncodedTextChunk([1, 2, 3]), "EncodedTextChunk(tokens=[1, 2, 3])"),
        (loops.EncodedTextChunk(list(range(1, 257))), "EncodedTextChunk(tokens=<256: 1, 2, 3, …>)"),
        (
            loops.SampleResponse(sequences=[loops.SampledSequence()] * 4, request_id="r" * 60),
            f"SampleResponse(sequences=<4 SampledSequence>, request_id='{'r' * 60}')",
        ),
        (loops.SampledSequence(text="x" * 40), f"SampledSequence(text='{'x' * 40}')"),
        (loops.SampledSequence(text="x" * 41), f"SampledSequence(text='{'x' * 40}…')"),
        (loops.SampledSequence(text="\x1b[2J\u202e"), r"SampledSequence(text='\x1b[2J\u202e')"),
        (loops.SampledSequence(logprobs=[-1 / 3] * 7), "SampledSequence(logprobs=<7: -0.3333, -0.3333, -0.3333, …>)"),
        (
            loops.ImageChunk(data=b"x" * 1234, format="png", expected_tokens=3),
            "ImageChunk(data=<1234 bytes>, format='png', expected_tokens=3)",
        ),
        (
            loops.CheckpointFile(url=f"https://files.example/a?{SECRET}", relative_file_name="a"),
            "CheckpointFile(url='https://files.example/a', relative_file_name='a')",
        ),
        (
            loops.Datum(model_input=[1] * 9, loss_fn_inputs={"weights": [0.5] * 9}),
            "Datum(model_input=ModelInput(chunks=<1 EncodedTextChunk>), loss_fn_inputs={'weights': <TensorData float32 [9]>})",  # noqa: E501 - one line
        ),
        (
            loops.OptimStepResponse(metrics={str(n): n / 3 for n in range(9)}),
            "OptimStepResponse(metrics=<9: '0': 0.0, '1': 0.3333333333333333, '2': 0.6666666666666666, …>)",
        ),
        (
            loops.SaveWeightsResponse(path=f"bt://loops:{'r' * 30}/weights/{'n' * 40}"),
            f"SaveWeightsResponse(path='bt://loops:{'r' * 30}/weights/{'n' * 40}')",
        ),
        (
            loops.SampledPrompt(index=1, error=loops.ClosedError("over")),
            "SampledPrompt(index=1, error=ClosedError('over'))",
        ),
        (
            loops.RolloutGroup(index=0, task=object(), version=1, episodes=[]),
            "RolloutGroup(index=0, task=<object>, version=1, episodes=[])",
        ),
    ],
)
def test_what_is_shown(value: Any, shown: str) -> None:
    assert repr(value) == shown


def test_a_run_shows_its_sampler_by_its_id() -> None:
    shown = repr(a_run())
    assert "sampler=<Sampler sampler-1>" in shown
    assert "created_at=2026-01-02T03:04:05+00:00" in shown
    assert "status=Status(name='ACTIVE')" in shown


def test_what_does_not_fit_is_left_out_but_ids_are_kept() -> None:
    run = structs.replace(
        a_run(), name="n" * 200, base_url=f"https://{'u' * 60}.example/{'p' * 200}", deployment_id="d" * 90
    )
    assert f"deployment_id='{'d' * 90}'" in repr(run)
    assert repr(run).endswith(", …)")
    assert len(repr(run)) <= 300


def test_texts_are_searched_for_urls() -> None:
    line = loops.LogLine(timestamp="1", message=f"PUT {URL} failed")
    assert repr(line) == "LogLine(timestamp='1', message='PUT https://files.example/folder/file fa…')"


def test_wrong_values_are_shown_too() -> None:
    wrong: list[Any] = [
        loops.AdamParams(learning_rate=10**5000),
        loops.ModelInput(chunks=None),  # type: ignore[arg-type] # the mistake to show
        loops.SampledSequence(tokens=object(), text=b"x"),  # type: ignore[arg-type] # the mistake to show
        loops.StepResult(forward_backward=None, optim=loops.ModelInput(chunks=3)),  # type: ignore[arg-type] # the same
    ]
    assert [repr(each) for each in wrong] == [
        "AdamParams(learning_rate=<int of 16610 bits>)",
        "ModelInput(chunks=None)",
        "SampledSequence(tokens=<object>, text=<1 bytes>)",
        "StepResult(forward_backward=None, optim=ModelInput(chunks=3))",
    ]


def test_an_endless_task_is_shown() -> None:
    task: list[Any] = []
    task.append(task)
    assert repr(loops.RolloutGroup(index=0, task=task, version=0, episodes=[])) == (
        "RolloutGroup(index=0, task=[[[<1>]]], version=0, episodes=[])"
    )


class Watched(list[float]):
    """A list that counts how many of its entries are touched."""

    touched = 0

    def __iter__(self) -> Iterator[float]:
        for each in super().__iter__():
            self.touched += 1
            yield each

    def __eq__(self, other: object) -> bool:
        raise AssertionError("a comparison may look at every entry")

    __hash__ = None  # type: ignore[assignment] # as of a list


def test_a_million_numbers_cost_no_more_than_a_few() -> None:
    numbers = Watched([0.5] * 1_000_000)
    shown = [
        repr(loops.SampledSequence(tokens=[1], logprobs=numbers)),
        repr(loops.Episode(logprobs=numbers)),
        loops.Episode(logprobs=numbers)._repr_html_(),
    ]
    assert all("000: 0.5, 0.5, 0.5, …" in each for each in shown)
    assert numbers.touched <= 20


def test_rich_shows_the_same_fields() -> None:
    console = pytest.importorskip("rich.console")
    out = StringIO()
    sequence = loops.SampledSequence(tokens=list(range(9)), text="a" * 50)
    console.Console(file=out, width=200).print(sequence)
    assert out.getvalue() == f"{sequence!r}\n"


def test_a_table_has_a_row_for_each_part() -> None:
    seen = Tags()
    seen.feed(loops.SampleResponse(sequences=[loops.SampledSequence(text="<b>")] * 30)._repr_html_())
    assert "sequences[19]SampledSequence(text='<b>')" in seen.text
    assert "… 10 more" in seen.text


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_has_null_for_what_is_not_finite() -> None:
    sequence = loops.SampledSequence(tokens=[1, 2, 3], logprobs=[math.nan, -math.inf, -0.5])
    assert json.loads(sequence.to_json())["logprobs"] == [None, None, -0.5]
    assert math.isnan(sequence.to_dict()["logprobs"][0])
    assert sequence.to_json(indent=2).startswith('{\n  "tokens"')
    assert "\n" not in sequence.to_json()


def test_signed_urls_stay_whole_as_data() -> None:
    file = loops.CheckpointFile(url=f"https://files.example/a?{SECRET}", relative_file_name="a")
    assert file.to_dict()["url"] == file.url
    assert SECRET in file.to_json()


def test_objects_of_your_own_have_no_json() -> None:
    group = loops.RolloutGroup(index=0, task=object(), version=0, episodes=[])
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        group.to_dict()


@pytest.mark.parametrize(
    ("kind", "fields", "path", "rule"),
    [
        (loops.SampledSequence, {"tokens": ["a"]}, "tokens[0]", "expected `int`, got `str`"),
        (loops.ExternalRef, {"uri": "x"}, "fields", "object missing required field `version`"),
        (loops.RolloutState, {"pending": [3]}, "fields", "pending: must be different numbers of tasks before next_"),
        (loops.FailurePolicy, {"retry_on": ["os.nothing"]}, "retry_on[0]", "expected the name of a class in a loaded"),
        (loops.FailurePolicy, {"retry_on": ["int"]}, "fields", "retry_on[0]: expected a class of exceptions"),
        (loops.SampledPrompt, {"index": 0, "error": {"type": 3}}, "error", "type: expected `str`, got `int`"),
        (loops.Datum, [], "fields", "expected `object`, got `array`"),
    ],
)
def test_a_dict_that_does_not_fit_is_refused(kind: type[Any], fields: Any, path: str, rule: str) -> None:
    with pytest.raises(loops.InputError) as refused:
        kind.from_dict(fields)
    assert str(refused.value).startswith(f"{path}: {rule}")


def test_reading_a_class_imports_nothing() -> None:
    assert "this" not in sys.modules
    with pytest.raises(loops.InputError, match="loaded module"):
        loops.FailurePolicy.from_dict({"retry_on": ["this.d"]})
    assert "this" not in sys.modules


def test_an_error_returns_with_what_it_knows() -> None:
    unfinished = loops.UnfinishedSubmission(operation="forward", keys=("k",), digest="d")
    lost = loops.LostAnswerError("lost", candidates=("run-1",))
    lost.unfinished = unfinished
    again = loops.SampledPrompt.from_dict(loops.SampledPrompt(index=0, error=lost).to_dict()).error
    assert isinstance(again, loops.LostAnswerError)
    assert (str(again), again.candidates, again.unfinished, again.retryable) == ("lost", ("run-1",), unfinished, False)
    unknown = {"index": 0, "error": {"type": "NewerError", "message": "m", "retryable": True}}
    newer = loops.SampledPrompt.from_dict(unknown).error
    assert type(newer) is loops.LoopsError
    assert newer.retryable


def test_values_are_encoded_and_replaced_as_before() -> None:
    tensor = loops.TensorData.of([1, 2])
    assert msgspec.json.encode(tensor) == b'{"data":[1,2],"dtype":"int64","shape":[2]}'
    assert hash(loops.AdamParams()) == hash(loops.AdamParams())
    assert not hasattr(tensor, "__dict__")


def a_run() -> loops.Run:
    time = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    sampler = loops.Sampler(id="sampler-1", base_url="https://s.example", base_model="m", created_at=time)
    return loops.Run(
        id="run-1",
        session_id="s",
        base_model="m",
        base_url="https://t.example",
        created_at=time,
        sampler=sampler,
        status=loops.Status("ACTIVE"),
    )

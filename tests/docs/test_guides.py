"""What the guides say of names and defaults is what the code has."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import loops_async
import loops_sync
from loops_async._http.endpoint import SAMPLE_SECONDS
from loops_async.sampling import VERSION_SECONDS

DOCS = Path(__file__).parents[2] / "docs"
MIGRATING = ("migrating-tinker", "migrating-baseten-loops")
NAME = re.compile(r"`(?P<dotted>\w+(?:\.\w+)*)(?:\((?P<arguments>[\w, ]+)\))?`")


def rows(page: str, begin: str) -> Iterator[list[str]]:
    """Yield the cells of the rows of the first table below a comment."""
    lines = (DOCS / f"{page}.md").read_text().split(f"<!-- {begin}", 1)[1].splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("| ---"))
    for line in lines[at + 1 :]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split(" | ")]


def found(module: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        module = getattr(module, name)
    return module


def default(dotted: str, argument: str) -> Any:
    return inspect.signature(found(loops_async, dotted)).parameters[argument].default


def test_the_defaults_of_time_limits() -> None:
    checked = 0
    for _, call, said, _ in rows("timeouts", "defaults of arguments"):
        name = NAME.fullmatch(call)
        assert name, call
        assert str(default(name["dotted"], name["arguments"])) == said, call
        checked += 1
    assert checked == 12


def test_the_defaults_that_stand_in_sentences() -> None:
    text = (DOCS / "timeouts.md").read_text()
    assert f"has {SAMPLE_SECONDS:g} s, too" in text
    assert f"None is {VERSION_SECONDS:g} |" in text
    assert "`scale_down_delay_seconds` (3,600 by default" in (DOCS / "cost.md").read_text()
    assert default("ServiceClient.create_lora_training_client", "scale_down_delay_seconds") == 3600
    assert default("ServiceClient.create_lora_training_client", "rank") == 32
    adam = loops_async.AdamParams()
    assert (adam.learning_rate, adam.grad_clip_norm) == (1e-4, 1.0)


def test_the_fixed_limits() -> None:
    checked = 0
    for _, constant, seconds in rows("timeouts", "fixed limits"):
        module, _, name = constant.strip("`").rpartition(".")
        assert getattr(import_module(module), name) == float(seconds), constant
        checked += 1
    assert checked == 9


def names(page: str) -> Iterator[tuple[str, str, str]]:
    """Yield the old name, the new one and the error of each row; a row may have two pairs of names."""
    for old, new, error in rows(page, "names;"):
        pairs = list(NAME.finditer(old)), list(NAME.finditer(new))
        for number, one in enumerate(pairs[0]):
            yield one["dotted"], pairs[1][number]["dotted"] if pairs[1] else "", error.strip("| ")


@pytest.mark.parametrize("page", MIGRATING)
def test_every_new_name_is_there_in_both_colours(page: str) -> None:
    listed = [new for _, new, _ in names(page) if new]
    assert len(listed) > 40
    for new in listed:
        assert found(loops_async, new) is not None
        assert found(loops_sync, new) is not None


@pytest.mark.parametrize("page", MIGRATING)
def test_an_old_name_is_missing_where_the_page_says_so(page: str) -> None:
    for old, _, error in names(page):
        if old.split(".")[0] in ("RestClient", "types", "helpers"):
            continue
        if "`AttributeError`" in error and ".result()" not in error:
            for colour in (loops_async, loops_sync):
                with pytest.raises(AttributeError):
                    found(colour, old)
        elif "." in old:
            assert found(loops_async, old) is not None, old


@pytest.mark.parametrize("page", MIGRATING)
def test_an_old_argument_is_refused_where_the_page_says_so(page: str) -> None:
    refused = 0
    for old, new, error in rows(page, "names;"):
        listed, said, _ = error.strip("| ").partition(": `TypeError`")
        if not said or "TensorData" in listed or not new.startswith("`"):
            continue
        called = NAME.match(old)
        assert called, old
        parameters = inspect.signature(found(loops_async, called["dotted"])).parameters
        for name in NAME.finditer(listed):
            assert name["dotted"] not in parameters, f"{old} has {name['dotted']}"
            refused += 1
    assert refused >= 5


CLIENT = re.compile(r"^[^#\n]*ServiceClient\((?:on_exit=\"\w+\")?\)", re.MULTILINE)
"""A client that finds its service in the environment."""


def test_a_page_whose_examples_need_a_service_says_how_to_start_one() -> None:
    pages = [path for path in DOCS.glob("*.md") if CLIENT.search(path.read_text())]
    silent = [path.name for path in pages if "loops-local serve" not in path.read_text()]
    assert len(pages) > 12
    assert not silent

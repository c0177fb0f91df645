"""Parsers of tool calls: what they read, and what they leave as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops_async._agents.parsers import PARSERS, parser_for
from tests.support.templates import LLAMA31, MISTRAL, QWEN3

A = ("a", '{"x": 1}')


@pytest.mark.parametrize(
    ("parser", "text", "content", "calls", "failures"),
    [
        ("hermes", '<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>', "", [A], 0),
        ("hermes", 'so <tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call> then', "so  then", [A], 0),
        ("hermes", '<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "b"}', "", [("a", "{}"), ("b", "{}")], 0),
        ("hermes", '<tool_call>{"name": "a"</tool_call>', '<tool_call>{"name": "a"</tool_call>', [], 1),
        ("hermes", "no call", "no call", [], 0),
        (
            "hermes",
            '<tool_call>{</tool_call><tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>',
            "<tool_call>{</tool_call>",
            [A],
            1,
        ),
        ("hermes", '<tool_call>{"name": "a", "arguments": "x"}</tool_call>', None, [], 1),
        ("llama3_json", '{"name": "a", "parameters": {"x": 1}}', "", [A], 0),
        ("llama3_json", '<|python_tag|>{"name": "a", "parameters": {"x": 1}}; {"name": "b"}', "", [A, ("b", "{}")], 0),
        ("llama3_json", '{"name": "a"', '{"name": "a"', [], 1),
        ("llama3_json", '{"city": "Rome"}', '{"city": "Rome"}', [], 1),
        ("llama3_json", "no call", "no call", [], 0),
        ("mistral", '[TOOL_CALLS] [{"name": "a", "arguments": {"x": 1}}]', "", [A], 0),
        ("mistral", 'so[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS]{}', "so", [A, ("b", "{}")], 0),
        ("mistral", "[TOOL_CALLS] [{", "[TOOL_CALLS] [{", [], 1),
        ("mistral", "[TOOL_CALLS]a[ARGS]1", "[TOOL_CALLS]a[ARGS]1", [], 1),
    ],
)
def test_calls_are_read_as_they_are_written(
    parser: str, text: str, content: str | None, calls: list[tuple[str, str]], failures: int
) -> None:
    parsed = PARSERS[parser].parse(text)
    assert (parsed.content, parsed.tool_calls, parsed.failures) == (
        text if content is None else content,
        calls,
        failures,
    )


@given(text=st.text('<tool_cal>/{}[]"name:TOOL_CALLS;|python_tag ', max_size=60), name=st.sampled_from(sorted(PARSERS)))
def test_whatever_is_written_is_read_or_stays(text: str, name: str) -> None:
    parsed = PARSERS[name].parse(text)
    assert parsed.tool_calls or parsed.content == text


@pytest.mark.parametrize(("template", "name"), [(QWEN3, "hermes"), (LLAMA31, "llama3_json"), (MISTRAL, "mistral")])
def test_the_template_says_how_calls_are_written(template: str, name: str) -> None:
    # Mistral's own template writes the mark.
    assert parser_for(template).name == name

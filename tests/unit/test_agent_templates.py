"""What chat templates are given, and what becomes of one that fails."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from loops_async._agents.errors import RefusedCall
from loops_async._agents.messages import Message, ToolCall
from loops_async._agents.templates import ChatTemplate, _compiled
from tests.support.agents import WEATHER

CALL = ToolCall("call_123456789", "weather", '{"city": "Rome"}')
ASKED = Message(role="assistant", tool_calls=(CALL,))


def rendered(template: str, *messages: Message, tools: Any = (), **variables: Any) -> str:
    return ChatTemplate(template, {"bos_token": "<s>"}).render(messages, tools, variables)


def test_arguments_are_objects_and_texts_where_a_template_adds_them_to_one() -> None:
    template = "{% set call = messages[0].tool_calls[0].function %}{{ WRITTEN }}{# tools #}"
    assert rendered(template.replace("WRITTEN", "call.arguments.city"), ASKED) == "Rome"
    assert rendered(template.replace("WRITTEN", "'x' + call.arguments"), ASKED) == 'x{"city": "Rome"}'
    with pytest.raises(RefusedCall, match="unsupported operand"):
        rendered("{{ 1 + [] }}", Message(role="user"))
    with pytest.raises(RefusedCall, match="unsupported operand"):
        rendered("{{ 1 + [] }}{# tools #}", ASKED)


def test_a_template_without_tools_has_them_in_its_texts() -> None:
    template = "{% for message in messages %}[{{ message.role }}:{{ message.content }}]{% endfor %}"
    results = [Message(role="tool", content=text) for text in ("20 C", "30 C")]
    text = rendered(template, Message(role="system", content="be kind"), ASKED, *results, tools=[WEATHER])
    assert text.startswith("[system:be kind\n\n# Tools")
    assert '"name": "weather", "arguments": {"city": "Rome"}' in text
    assert text.endswith("[user:<tool_response>\n20 C\n</tool_response>\n<tool_response>\n30 C\n</tool_response>]")


def test_names_reasoning_variables_and_tokens_are_given() -> None:
    template = "{{ bos_token }}{{ messages[0].name }}:{{ messages[0].content }}:{{ thinking }}"
    message = Message(role="assistant", content="yes", name="bob", reasoning="hm")
    assert rendered(template, message, thinking=True) == "<s>bob:<think>\nhm\n</think>\n\nyes:True"
    kept = "{{ messages[0].reasoning_content }}:{{ messages[0].content }}"
    assert rendered(kept, message) == "hm:yes"


def test_templates_may_use_what_transformers_has() -> None:
    template = "{% generation %}{{ {'a': '<'} | tojson }}{% endgeneration %}{{ strftime_now('%Y')[:2] }}"
    assert rendered(template) == '{"a": "<"}20'


def test_templates_can_change_nothing() -> None:
    with pytest.raises(RefusedCall, match="unsafe"):
        rendered("{{ messages.append(1) }}", Message(role="user"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"loops-async\[agents\]"):
        ChatTemplate("x", {})

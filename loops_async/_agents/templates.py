"""Chat templates: from messages to the text that a model reads, as its tokenizer would write it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from ..errors import ConfigError
from .errors import RefusedCall
from .messages import Message

__all__ = ["OWN_RULE", "OWN_VARIABLES", "ChatTemplate"]

CALL_ID_LENGTH: Final = 9
"""Mistral's templates accept ids of calls of exactly, or at least, this length."""

OWN_VARIABLES: Final = ("messages", "tools", "documents", "add_generation_prompt")
OWN_RULE: Final = "is no variable that can be set: it would change what a call is recorded with"

_TOOLS: Final = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class ChatTemplate:
    """A Jinja template with the names of the tokens that it may write.

    Args:
        text: the template; None: every call that has messages is refused.
        tokens: special tokens by the name of their variable, e.g. ``bos_token``.
    """

    def __init__(self, text: str | None, tokens: Mapping[str, str]) -> None:
        self.text: str = text or ""
        self._tokens = dict(tokens)
        self._render: Callable[..., str] | None = None if text is None else _compiled(text)
        self.has_tools: bool = "tools" in self.text
        self._has_reasoning: bool = "reasoning_content" in self.text

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        """Return the text of a conversation, up to where the model's reply begins.

        Raises:
            RefusedCall: there is no template, or it refuses the conversation.
        """
        if self._render is None:
            raise RefusedCall(
                400,
                "chat_template_missing",
                "the tokenizer has no chat template: give AgentGateway one as `chat_template`, or use /v1/completions",
                param="messages",
            )
        if not self.has_tools:
            messages, tools = _without_tools(messages, tools)
        try:
            return self._rendered(messages, tools, variables, as_text=False)
        except TypeError as problem:  # DeepSeek's adds the arguments to a text
            if not any(message.tool_calls for message in messages):
                raise _refused(problem) from problem
        except Exception as problem:  # a template may fail with anything
            raise _refused(problem) from problem
        try:
            return self._rendered(messages, tools, variables, as_text=True)
        except Exception as problem:
            raise _refused(problem) from problem

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        as_text: bool,
    ) -> str:
        assert self._render is not None  # noqa: S101 - `render` has checked it
        given = {
            **self._tokens,
            "messages": [self._plain(message, as_text=as_text) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": True,
            **variables,
        }
        return self._render(given)

    def _plain(self, message: Message, *, as_text: bool) -> dict[str, Any]:
        """Return a message as templates expect it."""
        plain: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name is not None:
            plain["name"] = message.name
        if message.reasoning is not None and self._has_reasoning:
            plain["reasoning_content"] = message.reasoning
        elif message.reasoning is not None:
            plain["content"] = f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"
        if message.tool_calls:
            plain["tool_calls"] = [
                {
                    "id": _short(call.id),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments if as_text else call.parsed},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            plain["tool_call_id"] = _short(message.tool_call_id)
        return plain


def _refused(problem: Exception) -> RefusedCall:
    return RefusedCall(400, "chat_template_error", f"the chat template refuses this: {problem}", param="messages")


def _short(call_id: str) -> str:
    end = call_id[-CALL_ID_LENGTH:]
    return end if len(end) == CALL_ID_LENGTH and end.isalnum() and end.isascii() else call_id


def _without_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """Write tools, calls and their results into the text, in the form of Hermes, for a template that has none."""
    plain: list[Message] = []
    is_result = False
    for message in messages:
        if message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if is_result:
                result = f"{plain.pop().content}\n{result}"
            plain.append(Message(role="user", content=result))
        elif message.tool_calls:
            calls = (
                f'<tool_call>\n{{"name": {_json(call.name)}, "arguments": {call.arguments}}}\n</tool_call>'
                for call in message.tool_calls
            )
            content = "\n".join(filter(None, [message.content, *calls]))
            plain.append(Message(role=message.role, content=content, reasoning=message.reasoning))
        else:
            plain.append(message)
        is_result = message.role == "tool"
    if tools:
        described = _TOOLS.format(tools="\n".join(map(_json, tools)))
        if plain and plain[0].role == "system":
            described = f"{plain.pop(0).content}\n\n{described}"
        plain.insert(0, Message(role="system", content=described))
    return plain, []


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # As transformers has it: Jinja's own filter escapes what HTML would read.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


@lru_cache(maxsize=16)  # compiling takes ten milliseconds, and many gateways have the same
def _compiled(text: str) -> Callable[..., str]:
    """Return the function that fills in a template, which can do nothing but write text."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as missing:
        raise ImportError("chat templates need jinja2: pip install 'loops-async[agents]'") from missing

    class Generation(Extension):
        """Passes over the marks around what a model writes, which only trainers of other libraries read."""

        tags = {"generation"}  # noqa: RUF012 - as in the base class

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    names: dict[str, Any] = environment.globals
    names |= {"raise_exception": refuse, "strftime_now": _now}
    try:
        return environment.from_string(text).render
    except TemplateError as problem:
        raise ConfigError(f"chat_template: not a Jinja template: {problem}") from problem

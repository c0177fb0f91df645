"""``POST messages``, Anthropic's API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import Struct

from ..._kinds import dict_or_empty
from ..errors import RefusedCall, bad_request
from ..messages import Message, ToolCall
from ..records import Call
from ..requests import AgentRequest
from .base import (
    Answer,
    Body,
    Dialect,
    Fields,
    checked,
    content_of,
    error_kind,
    event,
    finish_reason,
    function_tools,
    joined_text,
    reply_form,
    tool_call,
    tool_calls_of,
    uses_tools,
)

__all__ = ["Messages"]

SAMPLING: Final = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "stop_sequences": "stop",
}

REFUSED: Final = {"container": (), "mcp_servers": ()}

KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

REASONS: Final = {"length": "max_tokens", "tool_calls": "tool_use"}


class _Block(Struct):
    type: str
    text: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}
    tool_use_id: str = ""
    content: Any = None


class _Message(Struct):
    role: str
    content: Any


class _Tool(Struct):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] = {}


class _Choice(Struct):
    type: str


class _Format(Struct):
    type: str
    schema: dict[str, Any] | None = None


class _Config(Struct):
    format: _Format | None = None


class Messages(Dialect):
    """The dialect of messages."""

    route = "messages"
    path = "messages"

    def read(self, fields: Fields) -> AgentRequest:
        fields.refuse(REFUSED)
        tools = _tools(fields)
        choice = fields.get("tool_choice", _Choice, _Choice("auto")).type
        return AgentRequest(
            route=self.route,
            model=fields.get("model", str, ""),
            messages=_messages(fields),
            tools=tools,
            uses_tools=uses_tools(choice, tools),
            variables=fields.variables(),
            params={**fields.sampling(SAMPLING), **_structured_outputs(fields)},
            stream=fields.get("stream", bool, False),
        )

    def check(self, request: AgentRequest) -> None:
        if request.messages and request.messages[-1].role == "assistant":  # which the reply would continue
            problem = "must not end with one of the assistant: the beginning of a reply cannot be given"
            raise bad_request("messages", problem, "unsupported_value")

    def answer(self, answer: Answer) -> Body:
        [call] = answer.calls
        return {**_head(answer), "content": _blocks(call), **_end(call), "usage": _usage(answer, answer.size)}

    def events(self, answer: Answer) -> Iterator[bytes]:
        [call] = answer.calls
        begun: Body = {
            **_head(answer),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(answer, 0),
        }
        yield _event("message_start", message=begun)
        for index, block in enumerate(_blocks(call)):
            is_text = block["type"] == "text"
            empty: Body = {**block, "text": ""} if is_text else {**block, "input": {}}
            yield _event("content_block_start", index=index, content_block=empty)
            whole = msgspec.json.encode(block.get("input")).decode()
            delta = {"type": "text_delta", "text": block["text"]} if is_text else _json_delta(whole)
            yield _event("content_block_delta", index=index, delta=delta)
            yield _event("content_block_stop", index=index)
        yield _event("message_delta", delta=_end(call), usage={"output_tokens": answer.size})
        yield _event("message_stop")

    def error(self, refused: RefusedCall) -> Body:
        message = {
            "type": error_kind(refused, KINDS),
            "message": str(refused),
            "param": refused.param,
            "code": refused.code,
        }
        return {"type": "error", "error": message}

    def error_event(self, refused: RefusedCall) -> bytes:
        return event(self.error(refused), "error")


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)


def _json_delta(text: str) -> Body:
    return {"type": "input_json_delta", "partial_json": text}


def _head(answer: Answer) -> Body:
    return {"id": answer.id, "type": "message", "role": "assistant", "model": answer.request.model}


def _usage(answer: Answer, sampled: int) -> Body:
    return {"input_tokens": answer.prompt_size, "output_tokens": sampled}


def _end(call: Call) -> Body:
    reason = REASONS.get(finish_reason(call), "end_turn" if call.stop_string is None else "stop_sequence")
    return {"stop_reason": reason, "stop_sequence": call.stop_string}


def _blocks(call: Call) -> list[Body]:
    """Return the blocks of a reply; the reasoning is no part of it, since blocks of that kind carry a signature."""
    calls = tool_calls_of(call)
    text = content_of(call)
    blocks: list[Body] = [{"type": "text", "text": text}] if text or not calls else []
    return [
        *blocks,
        *({"type": "tool_use", "id": each.id, "name": each.name, "input": _input(each)} for each in calls),
    ]


def _input(call: ToolCall) -> Body:
    """Return the arguments, which must be an object here."""
    return dict_or_empty(call.parsed)


def _messages(fields: Fields) -> list[Message]:
    given = fields.needed("messages", list[_Message])
    if not given:
        raise bad_request("messages", "must have at least one message")
    system = fields.any("system")
    messages = [Message(role="system", content=joined_text(system, "system"))] if system else []
    for index, each in enumerate(given):
        messages += _parts(each, f"messages[{index}]")
    return messages


def _parts(given: _Message, path: str) -> Iterator[Message]:
    """Yield the messages that one is elsewhere: results of tools are messages of their own."""
    if given.role not in ("user", "assistant", "system"):
        raise bad_request(f"{path}.role", f"is not served: {given.role!r}", "unsupported_value")
    if isinstance(given.content, str):
        yield Message(role=given.role, content=given.content)
        return
    texts: list[str] = []
    calls: list[ToolCall] = []
    blocks = checked(given.content, list[_Block], f"{path}.content")
    for index, block in enumerate(blocks):
        place = f"{path}.content[{index}]"
        match block.type:
            case "text":
                texts.append(block.text)
            case "tool_use":
                arguments = msgspec.json.encode(block.input).decode()
                calls.append(tool_call(block.id, block.name, arguments, f"{place}.name"))
            case "tool_result":
                yield Message(
                    role="tool", content=joined_text(block.content, f"{place}.content"), tool_call_id=block.tool_use_id
                )
            case "thinking" | "redacted_thinking":
                continue
            case _:
                raise bad_request(place, f"content of type {block.type!r} is not served", "unsupported_value")
    if texts or calls or not blocks:
        yield Message(role=given.role, content="\n".join(texts), tool_calls=tuple(calls))


def _structured_outputs(fields: Fields) -> Body:
    """Return the sampling parameter that keeps replies in a form, which has had two places in this API."""
    form = fields.any("output_format")
    if form is None:
        config: _Config = fields.get("output_config", _Config, _Config())
        return {} if config.format is None else reply_form(config.format.type, config.format.schema, "output_config")
    given = checked(form, _Format, "output_format")
    return reply_form(given.type, given.schema, "output_format")


def _tools(fields: Fields) -> list[Body]:
    given = fields.get("tools", list[_Tool], [])
    for index, tool in enumerate(given):
        if tool.type not in (None, "custom"):
            problem = f"tools of the server are not served; got {tool.type!r}"
            raise bad_request(f"tools[{index}].type", problem, "unsupported_value")
    described = (
        {"name": tool.name, "description": tool.description, "parameters": tool.input_schema} for tool in given
    )
    return function_tools((tool, f"tools[{index}]") for index, tool in enumerate(described))

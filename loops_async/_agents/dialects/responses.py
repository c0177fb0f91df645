"""``POST responses``, OpenAI's newer API, without anything that a server would have to remember."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from ..errors import RefusedCall, bad_request
from ..messages import Message
from ..records import Call
from ..requests import AgentRequest
from .base import (
    Answer,
    Body,
    Dialect,
    Fields,
    checked,
    content_of,
    event,
    finish_reason,
    function_tools,
    joined_text,
    reply_form,
    tool_call,
    tool_calls_of,
    uses_tools,
)

__all__ = ["Responses"]

REFUSED: Final = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "top_logprobs": (0,),
}


class _Item(Struct):
    type: str = "message"
    role: str = "user"
    content: Any = None
    call_id: str = ""
    name: str = ""
    arguments: str = "{}"
    output: Any = None


class _Format(Struct):
    type: str = "text"
    schema: dict[str, Any] | None = None


class _Text(Struct):
    format: _Format | None = None


class Responses(Dialect):
    """The dialect of responses."""

    route = "responses"
    path = "responses"

    def read(self, fields: Fields) -> AgentRequest:
        fields.refuse(REFUSED)
        tools = _tools(fields)
        messages = list(_messages(fields))
        if not messages:
            raise bad_request("input", "must have at least one message")
        names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_output_tokens": "max_tokens"}
        return AgentRequest(
            route=self.route,
            model=fields.get("model", str, ""),
            messages=messages,
            tools=tools,
            uses_tools=uses_tools(fields.any("tool_choice"), tools),
            variables=fields.variables(),
            params={**fields.sampling(names), **_structured_outputs(fields)},
            stream=fields.get("stream", bool, False),
        )

    def answer(self, answer: Answer) -> Body:
        [call] = answer.calls
        is_cut = finish_reason(call) == "length"
        return {
            **_head(answer, "incomplete" if is_cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [item for item, _ in _items(call)],
            "usage": _usage(answer),
        }

    def events(self, answer: Answer) -> Iterator[bytes]:
        whole = self.answer(answer)
        begun: Body = {**_head(answer, "in_progress"), "incomplete_details": None, "output": [], "usage": None}
        events: list[tuple[str, Body]] = [
            ("response.created", {"response": begun}),
            ("response.in_progress", {"response": begun}),
        ]
        for index, (item, text) in enumerate(_items(answer.calls[0])):
            events += _item_events(item, text, index)
        events.append((f"response.{whole['status']}", {"response": whole}))
        for number, (name, fields) in enumerate(events):
            yield event({"type": name, "sequence_number": number, **fields}, name)

    def error_event(self, refused: RefusedCall) -> bytes:
        fields = {"message": str(refused), "code": refused.code, "param": refused.param}
        return event({"type": "error", "sequence_number": 0, **fields}, "error")


def _head(answer: Answer, status: str) -> Body:
    return {
        "id": answer.id,
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "error": None,
        "instructions": None,
        "metadata": {},
        "model": answer.request.model,
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [{**tool["function"], "type": "function", "strict": False} for tool in answer.request.tools],
        "top_p": None,
    }


def _usage(answer: Answer) -> Body:
    prompt, sampled = answer.prompt_size, answer.size
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": sampled,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + sampled,
    }


def _items(call: Call) -> Iterator[tuple[Body, str]]:
    """Yield the items of a reply, each with the text that a stream sends of it."""
    reasoning = None if call.reply is None else call.reply.reasoning
    if reasoning is not None:
        thought = {"type": "reasoning_text", "text": reasoning}
        yield {"id": f"rs_{call.id}", "type": "reasoning", "summary": [], "content": [thought]}, ""
    calls, status = tool_calls_of(call), "incomplete" if finish_reason(call) == "length" else "completed"
    text = content_of(call)
    if text or not calls:
        part: Body = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        item: Body = {
            "id": f"msg_{call.id}",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [part],
        }
        yield item, text
    for index, each in enumerate(calls):
        head = {"id": f"fc_{call.id}_{index}", "type": "function_call", "call_id": each.id, "name": each.name}
        yield {**head, "arguments": each.arguments, "status": status}, each.arguments


def _item_events(item: Body, text: str, index: int) -> Iterator[tuple[str, Body]]:
    """Yield the events of one item, by name."""
    place = {"output_index": index, "item_id": item["id"]}
    is_call, is_message = item["type"] == "function_call", item["type"] == "message"
    begun = {**item, "status": "in_progress"} if is_call or is_message else item
    if is_call:
        begun["arguments"] = ""
    elif is_message:
        begun["content"] = []
    yield "response.output_item.added", {"output_index": index, "item": begun}
    if is_call:
        yield "response.function_call_arguments.delta", {**place, "delta": text}
        yield "response.function_call_arguments.done", {**place, "name": item["name"], "arguments": text}
    elif is_message:
        [part] = item["content"]
        place["content_index"] = 0
        yield "response.content_part.added", {**place, "part": {**part, "text": ""}}
        yield "response.output_text.delta", {**place, "delta": text, "logprobs": []}
        yield "response.output_text.done", {**place, "text": text, "logprobs": []}
        yield "response.content_part.done", {**place, "part": part}
    yield "response.output_item.done", {"output_index": index, "item": item}


def _messages(fields: Fields) -> Iterator[Message]:
    """Yield the messages, with what one reply became put together again."""
    if instructions := fields.get("instructions", str, ""):
        yield Message(role="system", content=instructions)
    given = fields.needed_any("input")
    if isinstance(given, str):
        yield Message(role="user", content=given)
        return
    items = checked(given, list[_Item], "input")
    yield from _merged(_message(item, f"input[{i}]") for i, item in enumerate(items) if item.type != "reasoning")


def _message(item: _Item, path: str) -> Message:
    match item.type:
        case "message":
            role = "system" if item.role == "developer" else item.role
            if role not in ("system", "user", "assistant"):
                raise bad_request(f"{path}.role", f"is not served: {role!r}", "unsupported_value")
            return Message(role=role, content=joined_text(item.content, f"{path}.content"))
        case "function_call":
            call = tool_call(item.call_id, item.name, item.arguments, f"{path}.name")
            return Message(role="assistant", tool_calls=(call,))
        case "function_call_output":
            output = joined_text(item.output, f"{path}.output")
            return Message(role="tool", content=output, tool_call_id=item.call_id)
        case _:
            raise bad_request(f"{path}.type", f"is not served: {item.type!r}", "unsupported_value")


def _merged(messages: Iterable[Message]) -> Iterator[Message]:
    """Join the text of a reply with the calls after it, which are items of their own here."""
    last: Message | None = None
    for message in messages:
        if last is not None and last.role == message.role == "assistant" and message.tool_calls:
            last = replace(last, tool_calls=last.tool_calls + message.tool_calls)
            continue
        if last is not None:
            yield last
        last = message
    if last is not None:
        yield last


def _tools(fields: Fields) -> list[Body]:
    given = fields.get("tools", list[dict[str, Any]], [])
    for index, tool in enumerate(given):
        if tool.get("type") != "function":
            kind = f"only functions are served; got {tool.get('type')!r}"
            raise bad_request(f"tools[{index}].type", kind, "unsupported_value")
    return function_tools((tool, f"tools[{index}]") for index, tool in enumerate(given))


def _structured_outputs(fields: Fields) -> Body:
    form = fields.get("text", _Text, _Text()).format or _Format()
    return reply_form(form.type, form.schema, "text.format")

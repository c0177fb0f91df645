"""``POST chat/completions``, OpenAI's API for chats, with vLLM's fields for token ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from msgspec import Struct

from ..errors import bad_request
from ..messages import Message, ToolCall
from ..records import Call
from ..requests import AgentRequest
from .base import (
    Answer,
    Body,
    Dialect,
    Fields,
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

__all__ = ["DONE", "SAMPLING", "Chat", "most_samples", "structured_outputs", "usage"]

DONE: Final = b"data: [DONE]\n\n"

SAMPLING: Final = {
    name: name for name in ("temperature", "top_p", "top_k", "seed", "stop", "max_tokens", "structured_outputs")
}

MOST_SAMPLES: Final = 128

NEUTRAL: Final = {
    "top_logprobs": (0,),
    "logit_bias": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "functions": (),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    # of vLLM
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": (),
    "echo": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": (),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "stop_token_ids": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""What is not served, with the values that change nothing."""


class _Function(Struct):
    name: str
    arguments: str = "{}"


class _Call(Struct):
    function: _Function
    id: str | None = None


class _Message(Struct):
    role: str
    content: Any = None
    name: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    function_call: Any = None
    audio: Any = None


class _Tool(Struct):
    function: dict[str, Any] | None = None
    type: str = "function"


class _StreamOptions(Struct):
    include_usage: bool = False


class Chat(Dialect):
    """The dialect of chats."""

    route = "chat"
    path = "chat/completions"

    def read(self, fields: Fields) -> AgentRequest:
        fields.refuse(NEUTRAL)
        tools = _tools(fields)
        given = fields.needed("messages", list[_Message])
        if not given:
            raise bad_request("messages", "must have at least one message")
        # The newer name of `max_tokens` wins.
        names = {**SAMPLING, "max_completion_tokens": "max_tokens"}
        return AgentRequest(
            route=self.route,
            model=fields.get("model", str, ""),
            messages=[_message(each, f"messages[{index}]") for index, each in enumerate(given)],
            tools=tools,
            uses_tools=uses_tools(fields.any("tool_choice"), tools),
            variables=fields.variables(),
            params={**fields.sampling(names), **structured_outputs(fields)},
            count=most_samples(fields),
            stream=fields.get("stream", bool, False),
            include_usage=fields.get("stream_options", _StreamOptions, _StreamOptions()).include_usage,
            wants_logprobs=fields.get("logprobs", bool, False),
            wants_ids=fields.get("return_token_ids", bool, False),
        )

    def answer(self, answer: Answer) -> Body:
        request = answer.request
        choices = [self._choice(answer, index, call) for index, call in enumerate(answer.calls)]
        ids = {"prompt_token_ids": answer.calls[0].prompt.tokens()} if request.wants_ids else {}
        return {**_head(answer, "chat.completion"), "choices": choices, "usage": usage(answer), **ids}

    def events(self, answer: Answer) -> Iterator[bytes]:
        head = _head(answer, "chat.completion.chunk")
        with_usage = {"usage": None} if answer.request.include_usage else {}
        for index, call in enumerate(answer.calls):
            extra = _extras(answer, index, call)
            for delta in _deltas(call):
                block: Body = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **extra}
                yield event({**head, "choices": [block], **with_usage})
                extra = {}
            choice: Body = {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish_reason(call)}
            yield event({**head, "choices": [choice], **with_usage})
        if answer.request.include_usage:
            yield event({**head, "choices": [], "usage": usage(answer)})
        yield DONE

    def _choice(self, answer: Answer, index: int, call: Call) -> Body:
        message: Body = {"role": "assistant", "content": content_of(call) or None, "refusal": None}
        if call.reply is not None and call.reply.reasoning is not None:
            message["reasoning_content"] = call.reply.reasoning
        if calls := tool_calls_of(call):
            message["tool_calls"] = [_tool_call(each) for each in calls]
        else:
            message["content"] = content_of(call)
        extras = {"logprobs": None, **_extras(answer, index, call)}
        return {"index": index, "message": message, "finish_reason": finish_reason(call), **extras}


def _head(answer: Answer, kind: str) -> Body:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": answer.request.model}


def _deltas(call: Call) -> Iterator[Body]:
    """Yield the blocks of a reply."""
    yield {"role": "assistant", "content": ""}
    if call.reply is not None and call.reply.reasoning is not None:
        yield {"reasoning_content": call.reply.reasoning}
    if content := content_of(call):
        yield {"content": content}
    for index, each in enumerate(tool_calls_of(call)):
        yield {"tool_calls": [{"index": index, **_tool_call(each)}]}


def _extras(answer: Answer, index: int, call: Call) -> Body:
    extras: Body = {}
    if answer.request.wants_logprobs:
        entries = zip(answer.pieces[index], call.logprobs, strict=True)
        content = [
            {"token": text, "logprob": logprob, "bytes": _bytes(text), "top_logprobs": []} for text, logprob in entries
        ]
        extras["logprobs"] = {"content": content, "refusal": None}
    if answer.request.wants_ids:
        extras["token_ids"] = call.tokens
    return extras


def _bytes(text: str) -> list[int] | None:
    """Return the bytes of a token; None where it is a part of a character, whose bytes are not known."""
    return None if "\ufffd" in text else list(text.encode())


def _tool_call(call: ToolCall) -> Body:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def usage(answer: Answer) -> Body:
    """Return the numbers of tokens, as OpenAI's older APIs name them."""
    prompt, sampled = answer.prompt_size, answer.size
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def most_samples(fields: Fields) -> int:
    """Return the number of replies that are asked for."""
    count = fields.get("n", int, 1)
    if not 1 <= count <= MOST_SAMPLES:
        raise bad_request("n", f"must be 1 to {MOST_SAMPLES}; got {count}")
    return count


def _message(given: _Message, path: str) -> Message:
    if given.role not in ("system", "developer", "user", "assistant", "tool"):
        raise bad_request(f"{path}.role", f"is not served: {given.role!r}", "unsupported_value")
    for name in ("function_call", "audio"):
        if getattr(given, name) is not None:
            raise bad_request(f"{path}.{name}", "is not served", "unsupported_parameter")
    return Message(
        role="system" if given.role == "developer" else given.role,
        content=joined_text(given.content, f"{path}.content"),
        name=given.name,
        tool_calls=tuple(
            tool_call(each.id, each.function.name, each.function.arguments, f"{path}.tool_calls[{index}].function.name")
            for index, each in enumerate(given.tool_calls or ())
        ),
        tool_call_id=given.tool_call_id,
        reasoning=given.reasoning_content or given.reasoning or None,
    )


def _tools(fields: Fields) -> list[Body]:
    given = fields.get("tools", list[_Tool], [])
    for index, tool in enumerate(given):
        if tool.type != "function":
            problem = f"only functions are served; got {tool.type!r}"
            raise bad_request(f"tools[{index}].type", problem, "unsupported_value")
        if tool.function is None:
            raise bad_request(f"tools[{index}].function", "is required", "missing_required_parameter")
    return function_tools((tool.function, f"tools[{index}].function") for index, tool in enumerate(given))


class _Schema(Struct):
    schema: dict[str, Any]


class _Format(Struct):
    type: str
    json_schema: _Schema | None = None


def structured_outputs(fields: Fields) -> Body:
    """Return the sampling parameter that keeps replies in a form."""
    form = fields.get("response_format", _Format, _Format("text"))
    schema = None if form.json_schema is None else form.json_schema.schema
    return reply_form(form.type, schema, "response_format")

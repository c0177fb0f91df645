"""What dialects have in common: reading fields, refusing what is not served, and the lines of a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, TypeVar

import msgspec
from msgspec import Struct

from ..._values import place_and_rule
from ..errors import RefusedCall, bad_request
from ..messages import ToolCall
from ..records import Call, Route
from ..requests import AgentRequest, sampling_problem
from ..templates import OWN_RULE, OWN_VARIABLES

__all__ = ["Answer", "Dialect", "Fields", "error_body", "event", "finish_reason", "function_tools", "joined_text"]

Body = dict[str, Any]

KINDS: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

LINE_ENDS: Final = tuple((each.encode(), f"\\u{ord(each):04x}".encode()) for each in "\x85\u2028\u2029")
"""Characters that JSON may have, and at which many clients cut lines: as they stand, and as JSON escapes them."""

T = TypeVar("T")


class Answer(Struct, frozen=True, kw_only=True):
    """The calls that a request became, one for each reply, and the text of each token where it was asked for."""

    request: AgentRequest
    calls: list[Call]
    pieces: list[list[str]]

    @property
    def id(self) -> str:
        """The id of the first call, which is that of the answer."""
        return self.calls[0].id

    @property
    def created(self) -> int:
        """When it was asked, in seconds of Unix time."""
        return int(self.calls[0].started)

    @property
    def prompt_size(self) -> int:
        """How many tokens the prompt has."""
        return len(self.calls[0].prompt.tokens())

    @property
    def size(self) -> int:
        """How many tokens were sampled."""
        return sum(len(call.tokens) for call in self.calls)


class Dialect(ABC):
    """One API. `path` is that of its route below ``/v1``."""

    route: ClassVar[Route]
    path: ClassVar[str]

    @abstractmethod
    def read(self, fields: Fields) -> AgentRequest:
        """Return a request in the common form.

        Raises:
            RefusedCall: a field is wrong, or asks for what is not served.
        """

    def check(self, request: AgentRequest) -> None:  # noqa: B027 - most APIs have nothing of this kind
        """Refuse what can be counted, but not answered.

        Raises:
            RefusedCall: it cannot be answered.
        """

    @abstractmethod
    def answer(self, answer: Answer) -> Body:
        """Return the body of the answer."""

    @abstractmethod
    def events(self, answer: Answer) -> Iterator[bytes]:
        """Return the answer as a stream of events, each block of it in one piece."""

    def error(self, refused: RefusedCall) -> Body:
        """Return the body of an error."""
        return error_body(refused)

    def error_event(self, refused: RefusedCall) -> bytes:
        """Return an error as an event of a stream that has begun."""
        return event(self.error(refused))


class Fields:
    """The fields of a request, and which of them are not looked at."""

    def __init__(self, body: Any, ignore: Collection[str]) -> None:
        given: Body = checked(body, dict[str, Any], None)
        self._body: Body = {name: value for name, value in given.items() if name not in ignore}

    def __contains__(self, name: str) -> bool:
        return self._body.get(name) is not None

    def get(self, name: str, kind: type[T], default: T) -> T:
        """Return a field, checked; `default` where it is missing or null."""
        value = self._body.get(name)
        return default if value is None else checked(value, kind, name)

    def any(self, name: str) -> Any:
        """Return a field of any type; None where it is missing."""
        return self._body.get(name)

    def needed(self, name: str, kind: type[T]) -> T:
        """Return a field that must be there."""
        return checked(self.needed_any(name), kind, name)

    def needed_any(self, name: str) -> Any:
        """Return a field of any type that must be there."""
        if name not in self:
            raise bad_request(name, "is required", "missing_required_parameter")
        return self._body[name]

    def refuse(self, neutral: Mapping[str, Collection[Any]]) -> None:
        """Refuse what would change the meaning and is not served; `neutral` lists the values that change nothing."""
        for name, values in neutral.items():
            value = self._body.get(name)
            if value is not None and value not in values and value != [] and value != {}:
                allowed = f"; only {' or '.join(map(repr, values))} is" if values else ""
                raise bad_request(name, f"is not served here{allowed}", "unsupported_parameter")

    def sampling(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Return sampling parameters, given the name of each field and of the parameter that it is."""
        params: Body = {}
        for name, parameter in names.items():
            value = self._body.get(name)
            if value is None:
                continue
            if problem := sampling_problem({parameter: value}):
                place, rule = problem
                raise bad_request(name + place.removeprefix(parameter), rule.replace("`", ""))
            params[parameter] = value
        return params

    def variables(self) -> dict[str, Any]:
        """Return the variables of the chat template."""
        name = "chat_template_kwargs"
        given = self.get(name, dict[str, Any], {})
        for own in OWN_VARIABLES:
            if own in given:
                raise bad_request(f"{name}.{own}", OWN_RULE, "unsupported_parameter")
        return given


def checked(value: Any, kind: type[T], path: str | None) -> T:
    """Return a value if it is of a type."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        place, rule = place_and_rule(problem)
        whole = f"{path or ''}{'' if place.startswith('[') else '.'}{place}".strip(".")
        raise bad_request(whole or None, rule.replace("`", "")) from None


class _Text(Struct):
    type: str
    text: str = ""
    refusal: str = ""


TEXT_TYPES: Final = ("text", "input_text", "output_text", "refusal")


def joined_text(content: Any, path: str) -> str:
    """Return content that is a text, or a list of text parts, as one text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = checked(content, list[_Text], path)
    for index, part in enumerate(parts):
        if part.type not in TEXT_TYPES:
            raise bad_request(f"{path}[{index}]", f"content of type {part.type!r} is not served", "unsupported_value")
    return "\n".join(part.text or part.refusal for part in parts)


def tool_call(call_id: str | None, name: str, arguments: str, path: str) -> ToolCall:
    """Return a call that a request has; `path` is that of its name."""
    if not name:
        raise bad_request(path, "is required", "missing_required_parameter")
    return ToolCall(call_id or "", name, arguments)


class _Function(Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


def function_tools(given: Iterable[tuple[Any, str]]) -> list[Body]:
    """Return tools in the form of chat requests, given each function and where it stands."""
    tools: list[Body] = []
    for value, path in given:
        function = checked(value, _Function, path)
        described = {} if function.description is None else {"description": function.description}
        parameters = function.parameters or {"type": "object", "properties": {}}
        tools.append({"type": "function", "function": {"name": function.name, **described, "parameters": parameters}})
    return tools


def uses_tools(choice: Any, tools: Sequence[Body], *, auto: Collection[str] = ("auto",)) -> bool:
    """Whether tools may be called, given the choice that a request makes."""
    if choice is not None and choice != "none" and choice not in auto:
        message = f"only 'auto' and 'none' are served; got {choice!r:.100}"
        raise bad_request("tool_choice", message, "unsupported_value")
    return bool(tools) and choice != "none"


def finish_reason(call: Call) -> str:
    """Return why a reply has ended: one that was cut says so, since a cut tool call must not run."""
    if call.stop_reason == "length":
        return "length"
    return "tool_calls" if call.reply is not None and call.reply.tool_calls else "stop"


def content_of(call: Call) -> str:
    """Return the text of a reply."""
    return "" if call.reply is None else call.reply.content


def tool_calls_of(call: Call) -> tuple[ToolCall, ...]:
    """Return the tool calls of a reply."""
    return () if call.reply is None else call.reply.tool_calls


def error_body(refused: RefusedCall) -> Body:
    """Return the body of an error, as OpenAI's API has it."""
    kind = error_kind(refused, KINDS)
    return {"error": {"message": str(refused), "type": kind, "param": refused.param, "code": refused.code}}


def error_kind(refused: RefusedCall, kinds: Mapping[int, str]) -> str:
    """Return what an API calls an error, given its names for some statuses."""
    return kinds.get(refused.status, "invalid_request_error" if refused.status < 500 else "api_error")


def reply_form(kind: str, schema: Body | None, path: str) -> Body:
    """Return the sampling parameter that keeps replies in a form: a text, any JSON, or JSON of a schema."""
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"structured_outputs": {"json_object": True}}
    if kind == "json_schema":
        if schema is None:
            raise bad_request(path, "needs a schema", "missing_required_parameter")
        return {"structured_outputs": {"json": schema}}
    raise bad_request(path, f"is not served: {kind!r}", "unsupported_value")


def event(data: Any, name: str | None = None) -> bytes:
    """Return one event of a stream."""
    head = b"" if name is None else f"event: {name}\n".encode()
    body = msgspec.json.encode(data)
    for character, escaped in LINE_ENDS:
        body = body.replace(character, escaped)
    return head + b"data: " + body + b"\n\n"

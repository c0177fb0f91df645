"""Parsers: from the text that a model wrote to the tool calls in it. They never repair anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, runtime_checkable

import msgspec
from msgspec import Struct

from .._values import Value

__all__ = ["PARSERS", "ParsedReply", "ToolParser", "parser_for"]


class ParsedReply(Value, Struct, frozen=True):
    """What a parser found in a reply.

    `content` is the text outside the calls; `tool_calls` are ``(name, arguments as JSON text)``, in order; `failures`
    counts what looked like a call and could not be read: it stays in `content` as it is.
    """

    content: str
    tool_calls: list[tuple[str, str]] = []
    failures: int = 0


@runtime_checkable
class ToolParser(Protocol):
    """Reads tool calls: a `name`, and `parse`, which depends on nothing but the text.

    Example:
        ::

            class Fenced:
                name = "fenced"

                def parse(self, text: str) -> loops.ParsedReply:
                    head, found, call = text.partition("CALL ")
                    return loops.ParsedReply(head, [(call.strip(), "{}")] if found else [])
    """

    name: str

    def parse(self, text: str) -> ParsedReply:
        """Return the calls in `text`, which has special tokens as text, and no end token."""
        ...


class _Call(Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()

    def pair(self) -> tuple[str, str]:
        """Return the name, and the arguments as they were written: written again, they would differ from the tokens."""
        return self.name, (bytes(self.arguments) or bytes(self.parameters) or b"{}").decode()


_CALLS: Final[msgspec.json.Decoder[Any]] = msgspec.json.Decoder(list[_Call] | _Call)


def _read(text: str) -> list[tuple[str, str]] | None:
    """Return the call, or the list of calls, that is written as JSON; None if it is no such thing."""
    try:
        found: list[_Call] | _Call = _CALLS.decode(text.strip())
    except (msgspec.DecodeError, RecursionError):
        return None
    calls = [each.pair() for each in (found if isinstance(found, list) else [found])]
    return calls if all(_is_object(arguments) for _, arguments in calls) else None


def _is_object(arguments: str) -> bool:
    return isinstance(msgspec.json.decode(arguments), dict)


class _Marked:
    """Reads calls that stand behind a mark; `pattern` has the text of one or more calls as its group."""

    def __init__(self, name: str, pattern: str, read: Callable[[str], list[tuple[str, str]] | None]) -> None:
        self.name = name
        self._pattern: re.Pattern[str] = re.compile(pattern, re.DOTALL)
        self._read = read

    def parse(self, text: str) -> ParsedReply:
        """Return the calls that can be read; the others stay in the content."""
        calls: list[tuple[str, str]] = []
        outside: list[str] = []
        failures = at = 0
        for mark in self._pattern.finditer(text):
            found = self._read(mark[1])
            if found is None:
                failures += 1
                continue
            calls += found
            outside.append(text[at : mark.start()])
            at = mark.end()
        content = "".join([*outside, text[at:]])
        return ParsedReply(content.strip() if calls else content, calls, failures)


def _read_mistral(text: str) -> list[tuple[str, str]] | None:
    """Return the calls in a list; or, as newer models write it, one name with its arguments."""
    name, separator, arguments = text.partition("[ARGS]")
    if not separator:
        return _read(text)
    try:
        given = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return None
    return [(name.strip(), arguments.strip())] if isinstance(given, dict) else None


class _Llama:
    """Reads a reply that is a call as a whole, as Llama 3 writes it: ``{"name": ..., "parameters": {...}}``."""

    name = "llama3_json"
    _MARK: Final = "<|python_tag|>"

    def parse(self, text: str) -> ParsedReply:
        """Return the calls, if all can be read."""
        body = text.strip()
        is_marked = body.startswith(self._MARK)
        body = body.removeprefix(self._MARK)
        if not is_marked and not body.startswith("{"):
            return ParsedReply(text)
        calls: list[tuple[str, str]] = []
        for part in _objects(body):
            found = _read(part)
            if found is None:
                return ParsedReply(text, failures=1)
            calls += found
        return ParsedReply("", calls)


def _objects(text: str) -> Iterator[str]:
    """Yield the JSON values that are separated by semicolons; the rest in one piece where that is not so."""
    import json  # only it tells where a value ends

    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            yield text[at:]
            return
        yield text[at:end]
        at = end
        while at < len(text) and text[at] in "; \n":
            at += 1


PARSERS: Final[dict[str, ToolParser]] = {
    "hermes": _Marked("hermes", r"<tool_call>(.*?)(?:</tool_call>|\Z)", _read),
    "llama3_json": _Llama(),
    # To the end of the text: Mistral writes its calls last, as a list, or each with its own mark.
    "mistral": _Marked("mistral", r"\[TOOL_CALLS\](.*?)(?=\[TOOL_CALLS\]|\Z)", _read_mistral),
}


def parser_for(template: str) -> ToolParser:
    """Return the parser for what a template writes."""
    if "[TOOL_CALLS]" in template:
        name = "mistral"
    elif "<|python_tag|>" in template or "ipython" in template:
        name = "llama3_json"
    else:
        name = "hermes"
    return PARSERS[name]

"""The files of ``loops sample``: a prompt or its completions as one JSON object per line."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
from msgspec import Struct

from .._http.decoding import UnreadableError, decode_json
from ..errors import InputError
from ..types import SampleResponse

STANDARD: Final = Path("-")


class InputLine(Struct, kw_only=True):
    """A prompt: text or token ids, or messages for the chat template of the model."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None


class Completion(Struct, kw_only=True):
    """One completion of a prompt."""

    text: str | None
    tokens: list[int]
    logprobs: list[float] | None
    stop_reason: str


class OutputLine(Struct, kw_only=True):
    """The completions of one prompt; `index` is the number of its line in the input, from 0."""

    index: int
    completions: list[Completion]
    policy_version: int | None = None


def output_line(index: int, answer: SampleResponse) -> OutputLine:
    """Return the line for an answer."""
    completions = [
        Completion(text=each.text, tokens=each.tokens, logprobs=each.logprobs, stop_reason=each.stop_reason)
        for each in answer.sequences
    ]
    return OutputLine(index=index, completions=completions, policy_version=answer.policy_version)


def read_input(path: Path) -> Iterator[tuple[int, InputLine]]:
    """Yield the prompts of a file with their line numbers, from 0; empty lines are skipped."""
    with sys.stdin.buffer if path == STANDARD else path.open("rb") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = decode_json(line, InputLine)
            except UnreadableError as problem:
                raise InputError(f"{path}:{number + 1}", f"is not a prompt: {problem}") from None
            if (row.prompt is None) == (row.messages is None):
                raise InputError(f"{path}:{number + 1}", 'must have either "prompt" or "messages"')
            yield number, row


def count_input(path: Path) -> int | None:
    """Return the number of prompts in a file, None for standard input, which can be read only once."""
    if path == STANDARD:
        return None
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def finished(path: Path | None) -> set[int]:
    """Return the numbers of the prompts whose answers are in the output; an incomplete last line is removed."""
    if path is None or not path.exists():
        return set()
    found: set[int] = set()
    complete_bytes = 0
    with path.open("r+b") as lines:
        for number, line in enumerate(lines):
            if not line.endswith(b"\n"):
                break
            try:
                found.add(decode_json(line, OutputLine).index)
            except UnreadableError as problem:
                raise InputError(
                    f"{path}:{number + 1}",
                    f"is not a line that `loops sample` wrote: {problem}. Choose another --output",
                ) from None
            complete_bytes += len(line)
        lines.truncate(complete_bytes)
    return found


@contextmanager
def open_output(path: Path | None) -> Generator[BinaryIO]:
    """Open the output to append to it."""
    if path is None:
        yield sys.stdout.buffer
        return
    with path.open("ab") as file:
        yield file
        os.fsync(file.fileno())


def write_line(file: BinaryIO, line: OutputLine) -> None:
    """Write a line at once, so that a killed process loses at most this line."""
    file.write(msgspec.json.encode(line) + b"\n")
    file.flush()

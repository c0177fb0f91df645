"""The files of ``loops sample``: prompts in, completions out, one JSON object a line."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
from msgspec import Struct

from ..errors import InputError
from ..types import SampleResponse

STANDARD: Final = Path("-")


class Row(Struct, kw_only=True):
    """A line of the input: a text, token ids, or messages for the model's chat template."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None


class Completion(Struct, kw_only=True):
    """One completion of a prompt."""

    text: str | None
    tokens: list[int]
    logprobs: list[float] | None
    stop_reason: str


class Done(Struct, kw_only=True):
    """A line of the output; `index` is the number of the input's line, from 0."""

    index: int
    completions: list[Completion]
    policy_version: int | None = None


def done(index: int, answer: SampleResponse) -> Done:
    """Make the line for an answer."""
    completions = [
        Completion(text=each.text, tokens=each.tokens, logprobs=each.logprobs, stop_reason=each.stop_reason)
        for each in answer.sequences
    ]
    return Done(index=index, completions=completions, policy_version=answer.policy_version)


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the prompts of a file with the numbers of their lines; empty lines are left out."""
    with sys.stdin.buffer if path == STANDARD else path.open("rb") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = msgspec.json.decode(line, type=Row)
            except msgspec.MsgspecError as problem:
                raise InputError(f"{path}:{number + 1}", f"is no prompt: {problem}") from None
            if (row.prompt is None) == (row.messages is None):
                raise InputError(f"{path}:{number + 1}", 'must have either "prompt" or "messages"')
            yield number, row


def count_rows(path: Path) -> int | None:
    """Return how many prompts a file has, None when it can be read only once."""
    if path == STANDARD:
        return None
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def finished(path: Path | None) -> set[int]:
    """Return the numbers of the prompts that an output file has; half a line that a kill left is removed."""
    if path is None or not path.exists():
        return set()
    found: set[int] = set()
    whole = 0
    with path.open("r+b") as lines:
        for number, line in enumerate(lines):
            if not line.endswith(b"\n"):
                break
            try:
                found.add(msgspec.json.decode(line, type=Done).index)
            except msgspec.MsgspecError as problem:
                raise InputError(
                    f"{path}:{number + 1}", f"is no answer of `loops sample`: {problem}. Choose another --output"
                ) from None
            whole += len(line)
        lines.truncate(whole)
    return found


class Output:
    """Where answers go, each as soon as it is there."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, line: Done) -> None:
        """Write a line to its end, so that a kill loses at most this one."""
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()


@contextmanager
def output(path: Path | None) -> Generator[Output]:
    """Open the output, to go on where it ends."""
    if path is None:
        yield Output(sys.stdout.buffer)
        return
    with path.open("ab") as file:
        yield Output(file)
        os.fsync(file.fileno())

"""What a journal keeps of a request, to recognize it when its program makes it again, and to show what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import Struct

from .._kinds import is_dict

DIGEST_BYTES: Final = 16
"""The size of a digest: two different contents have the same one by chance in 1 of 10^38 cases."""

OF_THE_PLACE: Final = frozenset({"seq_id", "run_id", "model", "data"})
"""Fields of a body that its place in the order gives, and its datums, which have digests of their own."""


class Content(Struct, frozen=True):
    """An operation without its datums, of which only a digest each is kept, joined in their order."""

    operation: str
    body: bytes
    """JSON of the body."""
    datums: bytes = b""


class Difference(Struct, frozen=True):
    """The first field in which a request differs from the recorded one, with both values as text."""

    field: str
    recorded: str
    given: str

    def __str__(self) -> str:
        return f"{self.field}: the journal has {self.recorded}, the program asks for {self.given}"


def digest(*parts: bytes | bytearray | memoryview) -> bytes:
    """Return what identifies the joined parts."""
    made = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        made.update(part)
    return made.digest()


def first_difference(recorded: Content, given: Content) -> Difference | None:
    """Return where an operation first differs from the recorded one; None if they are equal."""
    if recorded.operation != given.operation:
        return Difference("operation", recorded.operation, given.operation)
    counts = [len(each.datums) // DIGEST_BYTES for each in (recorded, given)]
    if counts[0] != counts[1]:
        return Difference("number of datums", f"{counts[0]}", f"{counts[1]}")
    differing = first_difference_of_json(recorded.body, given.body)
    if differing is not None:
        return differing
    for index in range(counts[0]):
        place = slice(index * DIGEST_BYTES, (index + 1) * DIGEST_BYTES)
        if recorded.datums[place] != given.datums[place]:
            return Difference(f"data[{index}]", "other content", "this one")
    return None


def first_difference_of_json(recorded: bytes, given: bytes) -> Difference | None:
    """Return where a JSON object first differs from the recorded one; None if they are equal."""
    if recorded == given:
        return None
    ours, others = (dict(_leaves(msgspec.json.decode(each))) for each in (recorded, given))
    for field in dict.fromkeys((*ours, *others)):
        texts = [msgspec.json.encode(each[field]).decode() if field in each else "nothing" for each in (ours, others)]
        if texts[0] != texts[1]:
            return Difference(field, texts[0], texts[1])
    return None


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, each in value.items():
        if not prefix and name in OF_THE_PLACE:
            continue
        if is_dict(each):
            yield from _leaves(each, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", each

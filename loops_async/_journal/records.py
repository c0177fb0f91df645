"""What a journal holds of a creation, an operation and a sample."""

from __future__ import annotations

import msgspec
from msgspec import Struct


class RecordedPart(Struct):
    """A request of an operation, as far as it is known: its key, its id, and its result or failure, both JSON."""

    key: str
    operation_id: str | None = None
    outcome: bytes | None = None
    failure: bytes | None = None


class RecordedOperation(Struct):
    """The place of an operation and its parts. `is_earlier` is that of what an earlier process has recorded."""

    place: int
    parts: list[RecordedPart]
    begun: float
    is_refused: bool = False
    is_earlier: bool = False


class Creation(Struct, frozen=True):
    """What was asked for, and its id if it was made. `is_earlier` as in `RecordedOperation`."""

    number: int
    kind: str
    request: bytes
    begun: float
    id: str | None = None
    ended: float | None = None
    is_earlier: bool = False


class Completed(Struct, frozen=True, gc=False):
    """The answer to a sample: its body, the header with the version of the weights, and the id of the request."""

    body: bytes | msgspec.Raw
    version: str = ""
    request_id: str | None = None

    def __repr__(self) -> str:
        # As of `Answer`: tracebacks that show local variables must not show what a service echoed.
        return f"<Completed of request {self.request_id}>"


class RecordedSample(Struct, frozen=True):
    """A sample: its row, the key that it was sent under, and the answer if it has come."""

    number: int
    key: str
    answer: Completed | None = None

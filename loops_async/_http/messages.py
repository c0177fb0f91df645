"""A request, and the complete answer to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from .. import protocol
from .body import Body
from .redaction import PASSWORD

MOST_BYTES: Final = 64 << 20
"""The largest answer of most routes; a page of files or of log lines has a few megabytes."""
MOST_RESULT_BYTES: Final = 1 << 30
"""The largest completion or result of an operation; the logprobs of the largest batch have some hundred megabytes."""


class Request(Struct, kw_only=True, gc=False):
    """One HTTP request. `what` is its human-readable purpose, with which errors begin."""

    method: str
    url: str
    what: str
    body: bytes | Body | None = None
    headers: Mapping[str, str] = {}
    timeout: float | None = 60.0
    new_connection: bool = False
    """Whether to connect for this request alone."""
    idle_timeout: float | None = None
    """The longest time in seconds without new data, for bodies without a total time limit."""
    has_signed_url: bool = False
    """Whether the URL must be sent exactly as it is written."""
    most_bytes: int = MOST_BYTES
    """The largest answer that is read, before and after decompression."""

    @property
    def content(self) -> bytes:
        """The whole body; empty where there is none."""
        return b"".join(self.body.parts) if isinstance(self.body, Body) else self.body or b""

    @property
    def size(self) -> int:
        """The bytes of the body."""
        return self.body.size if isinstance(self.body, Body) else len(self.body or b"")

    @property
    def described(self) -> str:
        """How errors name it: without the query and the password of its URL."""
        url = PASSWORD.sub("", self.url.split("?", 1)[0])
        return f"{self.what} ({self.method} {url})"

    @property
    def host(self) -> str:
        """The host and port of its URL."""
        # Not with `urlsplit`, which raises an error of its own for some URLs.
        return self.url.partition("//")[2].partition("/")[0].rpartition("@")[2]


class Answer(Struct, gc=False):
    """A complete answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def __repr__(self) -> str:
        # Tracebacks that show local variables must not show what a service echoed, e.g. the key.
        return f"<Answer {self.status} of {len(self.body):,} bytes>"

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    @property
    def is_final(self) -> bool:
        """Whether a gateway reports an error that no retry can change (data-plane reference 3.3)."""
        source, code = self.headers.get(protocol.ERROR_SOURCE), self.headers.get(protocol.ERROR_CODE)
        return (source == "06" and self.status < 500) or (source == "01" and code == "631")

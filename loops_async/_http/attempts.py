"""What is told of each attempt of a request: a line of the log at level DEBUG, and what watchers make of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from time import perf_counter
from types import TracebackType
from typing import Final, NamedTuple, Protocol

from .._work.registry import Watcher
from .messages import Request

log = logging.getLogger("loops_async.http")

NUMBER: Final[ContextVar[int]] = ContextVar("attempt", default=1)
"""The number of the attempt that is being made; `retry` counts."""


class Content(Protocol):
    """A body that is being received; aiohttp's class has this."""

    total_bytes: int


class Answered(NamedTuple):
    """The beginning of an answer."""

    status: int
    headers: Mapping[str, str]
    content: Content


class Attempt:
    """One attempt of a request, for the time of a block; an exception that leaves the block ends it without an answer.

    Nothing is made for an attempt that is not watched. `headers` are those to send: watchers may add some.
    """

    def __init__(
        self,
        request: Request,
        *,
        headers: dict[str, str],
        watchers: Sequence[Watcher],
        clean: Callable[[str], str],
        translated: Callable[[BaseException], BaseException],
    ) -> None:
        self.headers: dict[str, str] = headers
        self._answer: Answered | None = None
        self._body: bytes | None = None
        self._is_complete = False
        self._request = request
        self._clean = clean
        self._translated = translated
        self._began = perf_counter()
        method, url, body = request.method, request.url, request.body
        self._told = [
            (watcher, watcher.request(method, url, headers, body, has_signed_url=request.has_signed_url))
            for watcher in watchers
        ]

    def answered(self, status: int, headers: Mapping[str, str], content: Content) -> None:
        """Note that an answer begins."""
        self._answer = Answered(status, headers, content)

    def read(self, body: bytes) -> None:
        """Note that the whole answer is there; without this, e.g. for a downloaded file, its body is not told."""
        self._body, self._is_complete = body, True

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ms = round((perf_counter() - self._began) * 1000, 1)
        if self._answer is not None and (error is None or self._is_complete):
            self._answered(self._answer, ms)
        elif error is not None:
            self._failed(self._translated(error), ms)

    def _answered(self, answer: Answered, ms: float) -> None:
        for watcher, sent in self._told:
            watcher.response(sent, ms, answer.status, answer.headers, self._body)
        self._log(str(answer.status), ms, answer)

    def _failed(self, error: BaseException, ms: float) -> None:
        for watcher, sent in self._told:
            watcher.error(sent, ms, error)
        self._log(type(error).__name__, ms, None)

    def _log(self, outcome: str, ms: float, answer: Answered | None) -> None:
        if not log.isEnabledFor(logging.DEBUG):
            return
        host, _, path = self._request.url.partition("//")[2].partition("/")
        id_ = None if answer is None else request_id(answer.headers)
        facts = {
            "method": self._request.method,
            "host": self._clean(host.rpartition("@")[2]),
            "path": self._clean("/" + path.partition("?")[0]),
            "status": None if answer is None else answer.status,
            "ms": ms,
            "attempt": NUMBER.get(),
            "request_id": None if id_ is None else self._clean(id_),
            "bytes_sent": self._request.size,
            "bytes_received": 0 if answer is None else answer.content.total_bytes,
        }
        log.debug(
            "%s %s -> %s in %.0f ms (attempt %d, %s%d B sent, %d B received)",
            facts["method"],
            facts["path"],
            outcome,
            ms,
            facts["attempt"],
            f"request id {facts['request_id']}, " if id_ else "",
            facts["bytes_sent"],
            facts["bytes_received"],
            extra={"loops": facts},
        )


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return the id of an answer to quote to support, if it has one."""
    return headers.get("X-Request-Id") or headers.get("X-Baseten-Request-Id")

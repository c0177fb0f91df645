"""A file with every request and answer, as JSON lines: for a bug report, or to see what a program really sends.

Two lines for each attempt, with the same `seq`. A thread makes and writes them, so that neither a slow disk nor a large
body holds the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Literal, TypeAlias, get_args

import anyio
from msgspec import Struct

from ..errors import ConfigError
from .body import Body
from .redaction import Redactor

log = logging.getLogger("loops_async.http")

Bodies: TypeAlias = Literal["short", "full", "none"]
"""How much of each body is written."""

VARIABLE: Final = "LOOPS_REQUEST_LOG"
BODIES_VARIABLE: Final = "LOOPS_REQUEST_LOG_BODIES"

SHORT: Final = 2000
"""How many characters of a body are written, unless all of it is wanted."""
SHORT_BYTES: Final = 16 * 1024
"""How much of such a body is kept for that; more than is shown, since secrets are removed from it."""
MOST_WAITING: Final = 20_000
"""With more lines that are not written yet, the log ends: a file that cannot keep up must not fill the memory."""
CLOSE_SECONDS: Final = 5.0
"""How long the end of a client waits until everything is written."""

_LAST_WORD: Final = re.compile(r"[^\s\"'<>]*\Z")


class RequestLogSettings(Struct, frozen=True):
    """Where the requests of a client are written, and how much of their bodies."""

    path: str
    bodies: Bodies = "short"


def request_log_settings(path: str | PathLike[str] | None) -> RequestLogSettings | None:
    """Return what an argument says, or else the environment; None for no log.

    Raises:
        ConfigError: ``LOOPS_REQUEST_LOG_BODIES`` is another word than those of `Bodies`.
    """
    if path is None:
        path = os.environ.get(VARIABLE) or None
    if path is None:
        return None
    if not isinstance(path, str | PathLike) or not os.fspath(path):
        raise ConfigError(f"request_log must be the path of a file; got {path!r}")
    bodies: Any = os.environ.get(BODIES_VARIABLE, "").strip().lower() or "short"
    if bodies not in get_args(Bodies):
        raise ConfigError(f"{BODIES_VARIABLE} must be short, full or none; got {bodies!r}")
    return RequestLogSettings(str(Path(os.fspath(path)).absolute()), bodies)


class _Kept(Struct, frozen=True):
    """A body, or its beginning, and the size of the whole."""

    size: int
    parts: tuple[bytes | bytearray, ...]


class RequestLog:
    """Writes the requests of one client."""

    def __init__(self, settings: RequestLogSettings, redactor: Redactor) -> None:
        self._bodies: Bodies = settings.bodies
        self._redactor = redactor
        self._writer = _writer_of(settings.path)

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: Body | bytes | None, *, has_signed_url: bool
    ) -> int:
        """Write a request that is about to be sent, and return its `seq`."""
        seq = next(self._writer.numbers)
        parts = body.parts if isinstance(body, Body) else () if body is None else (body,)
        kept = None if body is None else self._kept(*parts)
        fields = {"seq": seq, "kind": "request", "ts": time.time(), "method": method}
        self._writer.put(partial(self._request_line, fields, url, headers, kept, has_signed_url=has_signed_url))
        return seq

    def response(self, seq: int, ms: float, status: int, headers: Mapping[str, str], body: bytes | None) -> None:
        """Write an answer; `body` is None for what is never written, e.g. a downloaded file."""
        kept = None if body is None else self._kept(body)
        fields = {"seq": seq, "kind": "response", "ts": time.time(), "elapsed_ms": ms, "status": status}
        self._writer.put(partial(self._response_line, fields, headers, kept))

    def error(self, seq: int, ms: float, error: BaseException) -> None:
        """Write that a request ended without a complete answer."""
        fields = {"seq": seq, "kind": "error", "ts": time.time(), "elapsed_ms": ms, "error": type(error).__name__}
        self._writer.put(partial(self._error_line, fields, str(error)))

    async def close(self) -> None:
        """Wait until everything is written, 5 s at most."""
        await self._writer.close()

    # --- on the event loop, where only what is needed is kept ---

    def _kept(self, *parts: bytes | bytearray) -> _Kept | None:
        size = sum(map(len, parts))
        if self._bodies == "none":
            return None
        if self._bodies == "full":
            return _Kept(size, parts)
        beginning = b""
        for part in parts:
            beginning += part[: SHORT_BYTES - len(beginning)]
            if len(beginning) >= SHORT_BYTES:
                break
        return _Kept(size, (beginning,))

    # --- in the writer's thread ---

    def _request_line(
        self,
        fields: dict[str, Any],
        url: str,
        headers: Mapping[str, str],
        body: _Kept | None,
        *,
        has_signed_url: bool,
    ) -> dict[str, Any]:
        shown = self._redactor.url(url, is_signed=has_signed_url)
        path = "/" + url.partition("//")[2].partition("/")[2].partition("?")[0].partition("#")[0]
        headers = self._redactor.headers(headers)
        return fields | {"url": shown, "path": self._redactor.url(path), "headers": headers, "body": self._shown(body)}

    def _response_line(self, fields: dict[str, Any], headers: Mapping[str, str], body: _Kept | None) -> dict[str, Any]:
        return fields | {"headers": self._redactor.headers(headers), "body": self._shown(body)}

    def _error_line(self, fields: dict[str, Any], message: str) -> dict[str, Any]:
        return fields | {"message": self._redactor.text(message)}

    def _shown(self, body: _Kept | None) -> str | None:
        if body is None:
            return None
        text = b"".join(body.parts).decode("utf-8", "replace")
        is_cut = body.size > SHORT_BYTES and self._bodies == "short"
        # A secret of which only a half is here would not be recognized.
        text = self._redactor.text(_LAST_WORD.sub("", text) if is_cut else text)
        if self._bodies == "full" or (len(text) <= SHORT and not is_cut):
            return text
        return f"{body.size} B, which begin: {text[:SHORT]}…"


class _Writer:
    """A thread that appends lines to one file, for all clients of this process that log there."""

    def __init__(self, path: str) -> None:
        self.numbers: itertools.count[int] = itertools.count(1)
        self.is_working = True
        self._path = path
        self._queue: SimpleQueue[Callable[[], dict[str, Any] | None]] = SimpleQueue()
        threading.Thread(target=self._work, name="loops-request-log", daemon=True).start()

    def put(self, line: Callable[[], dict[str, Any] | None]) -> None:
        """Write what `line` returns as JSON; what is None is not written."""
        if self.is_working:
            self._queue.put(line)
            if self._queue.qsize() > MOST_WAITING:
                self._end(f"{MOST_WAITING:,} lines are not written yet")

    async def close(self) -> None:
        """Wait until what was put before is written."""
        is_written, loop = asyncio.Event(), asyncio.get_running_loop()

        def tell() -> None:
            with suppress(RuntimeError):  # that loop was closed meanwhile
                loop.call_soon_threadsafe(is_written.set)

        self._queue.put(tell)
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            while self.is_working and not is_written.is_set():
                with anyio.move_on_after(0.1):
                    await is_written.wait()

    def _work(self) -> None:
        try:
            descriptor = _opened(self._path)
            try:
                while self.is_working:
                    fields = self._queue.get()()
                    if fields is not None:
                        _write(descriptor, _encoded(fields))
            finally:
                os.close(descriptor)
        except Exception as error:
            self._end(f"{type(error).__name__}: {error}")

    def _end(self, reason: str) -> None:
        if self.is_working:
            self.is_working = False
            log.warning("the request log %s ends here: %s", self._path, reason)


_writers: dict[tuple[int, str], _Writer] = {}
"""By process and path: a forked child has no thread of its parent."""

_registering: Final = threading.Lock()


def _writer_of(path: str) -> _Writer:
    with _registering:
        writer = _writers.get((os.getpid(), path))
        if writer is None or not writer.is_working:
            writer = _writers[os.getpid(), path] = _Writer(path)
        return writer


def _opened(path: str) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):  # a terminal or a pipe keeps its own
        Path(path).chmod(0o600)
    return descriptor


def _encoded(fields: dict[str, Any]) -> bytes:
    fields["ts"] = datetime.fromtimestamp(fields["ts"], UTC).isoformat().replace("+00:00", "Z")
    return json.dumps(fields).encode() + b"\n"  # in ASCII: what could mislead a terminal is escaped


def _write(descriptor: int, line: bytes) -> None:
    while line:
        line = line[os.write(descriptor, line) :]

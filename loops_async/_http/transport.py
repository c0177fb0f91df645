"""The only module that speaks HTTP: a connection pool whose answers become values and errors."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec import Struct

from .. import protocol
from .._tasks import check_loop
from .._text import one_line
from .._version import __version__
from ..errors import (
    ApiError,
    AuthenticationError,
    BadRequestError,
    ClosedError,
    ConfigError,
    ConflictError,
    ConnectError,
    LoopsError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
)
from .body import Body
from .retry import RetryBudget
from .settings import Settings

T = TypeVar("T")

CONNECT_SECONDS: Final = 10.0
KEEPALIVE_SECONDS: Final = 60.0
PROBES: Final = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": 5}
"""TCP keep-alive: idle seconds before the first probe, seconds between probes, and the limit of unanswered probes."""
LONGEST_MESSAGE: Final = 2000
LONGEST_EXCERPT: Final = 200

_ERRORS: Final[dict[int, type[ApiError]]] = {
    status: kind
    for kind in (
        BadRequestError,
        AuthenticationError,
        PermissionDeniedError,
        NotFoundError,
        ConflictError,
        RateLimitError,
    )
    for status in kind.status_codes
}

_ADVICE: Final[dict[int, str]] = {
    401: "Check the API key (BASETEN_API_KEY or api_key=) and that it belongs to this service.",
    403: "The key is valid but not allowed to do this; ask the workspace's admin.",
    404: "Check the id and the base_url.",
    429: "Slow down, or ask for a higher limit.",
}

_QUERY: Final = re.compile(r"(?<=[^\s\"'<>])\?[^\s\"'<>]+")
"""The query of an absolute or relative URL: a question mark within a word and the rest of that word."""

_PASSWORD: Final = re.compile(r"//[^/@]*@")
"""The user and password of a URL."""

_NETWORK_ERRORS: Final = (aiohttp.ClientError, TimeoutError, ConnectionError)
"""Errors that end a request without an answer. Other system errors, e.g. a full disk, are not the network's."""


class Request(Struct, kw_only=True, gc=False):
    """One HTTP request. `what` is its human-readable purpose, with which errors begin."""

    method: str
    url: str
    what: str
    body: bytes | Any = None
    headers: Mapping[str, str] = {}
    timeout: float | None = 60.0
    new_connection: bool = False
    """Whether to connect for this request alone."""
    idle_timeout: float | None = None
    """The longest time in seconds without new data, for bodies without a total time limit."""


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


class Transport:
    """A pool of connections to one service, for one event loop."""

    def __init__(self, settings: Settings) -> None:
        _raise_trim_threshold()
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.retry_budget: RetryBudget = RetryBudget()
        self._session = _session(keepalive_timeout=KEEPALIVE_SECONDS)
        self._new_connections = _session(force_close=True)
        self._authorization = settings.authorization

    async def close(self) -> None:
        """Close every connection; afterwards each call raises `ClosedError`."""
        self._closed = True
        await self.retry_budget.close()
        await self._session.close()
        await self._new_connections.close()

    async def ask(self, request: Request) -> Answer:
        """Send a request and return its answer; raise the error of an answer that is not 2xx."""
        answer = await self.send(request)
        if answer.is_success:
            return answer
        raise self.error(request, answer)

    async def fetch(self, request: Request, kind: type[T]) -> T:
        """Send a request and decode the answer's body as `kind`; raise the error of an answer that is not 2xx."""
        return self.decode(request, await self.ask(request), kind)

    async def send(self, request: Request) -> Answer:
        """Send a request and return the answer, whatever its status."""
        try:
            async with self._start(request, self._authorization) as response:
                return Answer(response.status, response.headers, await response.read())
        except _NETWORK_ERRORS as cause:
            failure = self._transport_error(request, cause)
        # Not chained to aiohttp's error, which contains the request with the API key and the signature in its URL.
        raise failure

    @asynccontextmanager
    async def stream(self, request: Request) -> AsyncGenerator[aiohttp.ClientResponse]:
        """Yield a 2xx response of a file store to read piece by piece; raise the error of any other response.

        The API key is not sent: a signed URL carries its own permission, and the store is not the service.
        """
        try:
            async with self._start(request, {}) as response:
                if not 200 <= response.status < 300:
                    raise self.error(request, Answer(response.status, response.headers, await response.read()))
                yield response
                return
        except _NETWORK_ERRORS as cause:
            if isinstance(cause, LoopsError):
                raise
            failure = self._transport_error(request, cause)
        raise failure

    def _start(
        self, request: Request, authorization: Mapping[str, str]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        self.check_usable()
        headers = {**request.headers, **authorization}
        data: Any = request.body
        if data is not None:
            headers["Content-Type"] = "application/json"
        if isinstance(data, Body):
            headers["Content-Length"] = str(data.size)
            data = data.stream()
        session = self._new_connections if request.new_connection else self._session
        return session.request(
            request.method,
            request.url,
            data=data,
            headers=headers,
            timeout=_time_limit(request.timeout, request.idle_timeout),
            allow_redirects=False,
        )

    def decode(self, request: Request, answer: Answer, kind: type[T]) -> T:
        """Return the body as `kind`, or raise a `ProtocolError`."""
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except msgspec.MsgspecError as problem:
            raise self.protocol_error(request, answer, str(problem)) from problem

    def protocol_error(self, request: Request, answer: Answer, problem: str) -> ProtocolError:
        """Return the error for an answer that does not follow the Loops protocol."""
        kind = self._label(answer.headers.get("Content-Type")) or "no content type"
        return ProtocolError(
            f"{_described(request)}: answered {answer.status} with a body that is not what Loops sends "
            f"({self._label(problem)}; {kind}): {self._excerpt(_text_of(answer.body))}. "
            f"Is {_host(request.url)} a Loops service? Check base_url.",
            status=answer.status,
        )

    def error(self, request: Request, answer: Answer) -> LoopsError:
        """Return the error for an answer that is not 2xx."""
        status = answer.status
        if 300 <= status < 400:
            return self.protocol_error(
                request, answer, "a redirect, which is never followed, since it could leak the API key"
            )
        details = ErrorBody.read(answer.body)
        if details is None and status in (404, 405):
            return self.protocol_error(request, answer, "an error page without a message")
        kind = _ERRORS.get(status) or (ServerError if status >= 500 else ApiError)
        request_id = self._label(answer.headers.get("X-Request-Id") or answer.headers.get("X-Baseten-Request-Id"))
        text = self.clean(details.message) if details else self._excerpt(_text_of(answer.body))
        error = kind(
            " ".join(
                filter(
                    None,
                    (
                        f"{_described(request)}: answered {status}: {text}",
                        f"[request id {request_id}]" if request_id else "",
                        _ADVICE.get(status, ""),
                    ),
                )
            ),
            status=status,
            code=self._label(details.code) if details else None,
            reason=self._label(details.reason) if details else None,
            request_id=request_id,
            retry_after=_seconds(answer.headers.get("Retry-After")),
        )
        error.from_gateway = details is None
        if is_final(answer):
            error.retryable = error.may_have_acted = False
        elif status == 503:
            # A gateway also answers 503 when it lost its connection to a service that had the request.
            error.may_have_acted = error.from_gateway and "Retry-After" not in answer.headers
        return error

    def _transport_error(self, request: Request, cause: Exception) -> LoopsError:
        described, host = _described(request), _host(request.url)
        if self._closed:
            return ClosedError(f"{described}: the client was closed before the answer came")
        if isinstance(cause, aiohttp.ConnectionTimeoutError):
            return ConnectError(
                f"{described}: {host} did not accept a connection in {CONNECT_SECONDS:g} s", was_sent=False
            )
        if isinstance(cause, TimeoutError):
            seconds = request.idle_timeout if request.timeout is None else request.timeout
            return RequestTimeoutError(f"{described}: no answer within {seconds} s", timeout=seconds)
        if isinstance(cause, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
            return ConfigError(f"{described}: not a usable URL")
        if isinstance(cause, aiohttp.ClientConnectorError):
            hint = " Is the embedded service running (`loops-local serve`)?" if _is_loopback(request.url) else ""
            return ConnectError(
                f"{described}: could not connect to {host}: {_reason(cause)}. Check base_url and the network.{hint}",
                was_sent=False,
            )
        if isinstance(cause, aiohttp.ClientResponseError):
            problem = self._excerpt(cause.message)
            return ProtocolError(f"{described}: {host} does not follow HTTP: {problem}. Check base_url.")
        broke = f"{described}: the connection to {host} broke: {self._excerpt(_reason(cause))}"
        return ConnectError(broke, has_begun=isinstance(cause, aiohttp.ClientPayloadError))

    def check_usable(self) -> None:
        """Raise `ClosedError` if the transport is closed or belongs to another event loop."""
        if self._closed:
            raise ClosedError("this client is closed; create a new ServiceClient")
        check_loop(self._loop)

    def _excerpt(self, text: str) -> str:
        """Return the beginning of `text` as one line."""
        return self.clean(text, LONGEST_EXCERPT) or "(empty body)"

    def _label(self, text: str | None) -> str | None:
        """Return an id, a code or a header as it may be shown."""
        return None if text is None else self.clean(text, LONGEST_EXCERPT)

    def clean(self, text: str, most: int = LONGEST_MESSAGE) -> str:
        """Return text of a service as it may be shown and logged.

        It is one line of at most `most` characters, without secrets that the service might have put there, and with
        control characters made visible.
        """
        text = _QUERY.sub("?…", text)
        return one_line(self._settings.api_key.scrub(text) if self._settings.api_key else text, most)


class ErrorBody(Struct, kw_only=True):
    """The contents of an error body, from older and newer services."""

    message: str
    code: str | None = None
    reason: str | None = None

    @classmethod
    def read(cls, body: bytes) -> ErrorBody | None:
        """Read a JSON error body; None if it is anything else."""
        try:
            raw = msgspec.json.decode(body)
        except msgspec.MsgspecError:
            return None
        if not isinstance(raw, dict):
            return None
        fields = cast("dict[str, Any]", raw)
        texts = [
            source.get(key) for source in (fields, _dict(fields, "error")) for key in ("detail", "error", "message")
        ]
        return cls(
            message=next((text for text in texts if isinstance(text, str) and text), _text_of(body)),
            code=_text(fields.get("code")),
            reason=_text(_dict(fields, "details").get("reason")),
        )


@cache
def _raise_trim_threshold() -> None:
    """Make the C library keep freed memory, since large answers and batches are allocated again and again.

    glibc keeps at most twice the largest block that was freed so far; until one was large, it returns the memory of
    each answer to the system, and allocating it again costs a quarter of a sample's CPU time. The block that is freed
    here is never written to, so it uses no memory.
    """
    bytes(protocol.MAX_REQUEST_BYTES)


def _session(**connections: Any) -> aiohttp.ClientSession:
    # No limit here, since a long poll must never wait for a free connection; sampling has a limit of its own.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, socket_factory=_socket, **connections),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": f"loops-async/{__version__}", protocol.ACCEPT_ERROR: "1"},
    )


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """Open a socket that detects a lost peer by keep-alive probes: a sample has no time limit, so silence is normal."""
    opened = socket.socket(*address[:3])
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # not every system has every option
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return opened


@lru_cache(maxsize=64)
def _time_limit(seconds: float | None, idle_seconds: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS, sock_read=idle_seconds)


def _text_of(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def is_final(answer: Answer) -> bool:
    """Whether a gateway reports an error that no retry can change (data-plane reference 3.3)."""
    source, code = answer.headers.get(protocol.ERROR_SOURCE), answer.headers.get(protocol.ERROR_CODE)
    return (source == "06" and answer.status < 500) or (source == "01" and code == "631")


def _described(request: Request) -> str:
    url = _PASSWORD.sub("//", request.url.split("?", 1)[0])
    return f"{request.what} ({request.method} {url})"


def _host(url: str) -> str:
    # Not with `urlsplit`, which raises an error of its own for some URLs.
    return url.partition("//")[2].partition("/")[0].rpartition("@")[2]


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _reason(cause: Exception) -> str:
    inner = getattr(cause, "os_error", None) or cause
    return getattr(inner, "strerror", None) or str(inner) or type(cause).__name__


def _seconds(text: str | None) -> float | None:
    """Return the seconds of a ``Retry-After``, which may also be a date."""
    if not text:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return None
    return seconds if seconds > 0 else None  # a past date carries no information


def _dict(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None

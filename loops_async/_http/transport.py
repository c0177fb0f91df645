"""The one place where HTTP becomes values and errors: a connection pool, and what its answers mean."""

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
from .settings import Settings

T = TypeVar("T")

CONNECT_SECONDS: Final = 10.0
KEEPALIVE_SECONDS: Final = 60.0
PROBES: Final = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": 5}
"""When a silent connection is probed, in seconds, how often, and how many probes may stay unanswered."""
LONGEST_MESSAGE: Final = 2000

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

_NEXT: Final[dict[int, str]] = {
    401: "Check the API key (BASETEN_API_KEY or api_key=) and that it belongs to this service.",
    403: "The key is valid but not allowed to do this; ask the workspace's admin.",
    404: "Check the id and the base_url.",
    429: "Slow down, or ask for a higher limit.",
}

_QUERY: Final = re.compile(r"(?<=[^\s\"'<>])\?[^\s\"'<>]+")
"""A question mark within a word, and what follows: the query of a URL, also of a relative one."""

_NO_ANSWER: Final = (aiohttp.ClientError, TimeoutError, ConnectionError)
"""What ends a request without an answer. Other errors of the system, such as a full disk, are not the network's."""


class Request(Struct, kw_only=True, gc=False):
    """One HTTP request. `what` says in plain words what it is for; errors begin with it."""

    method: str
    url: str
    what: str
    body: bytes | Any = None
    headers: Mapping[str, str] = {}
    timeout: float | None = 60.0
    idle_timeout: float | None = None
    """How long the answer may be silent, for bodies that take as long as they take."""


class Answer(Struct, gc=False):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300


class Transport:
    """A pool of connections to one service, for one event loop."""

    def __init__(self, settings: Settings) -> None:
        _expect_large_blocks()
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._closed = False
        # Admission to sampling is limited by its own gate: a long poll must never wait for a free connection.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS, socket_factory=_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"loops-async/{__version__}", protocol.ACCEPT_ERROR: "1"},
        )
        self._authorization = settings.authorization

    async def close(self) -> None:
        """Close every connection; afterwards each call raises `ClosedError`."""
        self._closed = True
        await self._session.close()

    async def ask(self, request: Request) -> Answer:
        """Send a request; an answer that is not 2xx is raised as its error."""
        answer = await self.send(request)
        if answer.is_success:
            return answer
        raise self.error(request, answer)

    async def fetch(self, request: Request, kind: type[T]) -> T:
        """Send a request and return the answer's body as `kind`; an answer that is not 2xx is raised as its error."""
        return self.decoded(request, await self.ask(request), kind)

    async def send(self, request: Request) -> Answer:
        """Send a request and return whatever is answered."""
        try:
            async with self._start(request, self._authorization) as response:
                return Answer(response.status, response.headers, await response.read())
        except _NO_ANSWER as cause:
            failure = self._translated(request, cause)
        # Not chained to aiohttp's error, which holds the request: its key and the signature in its URL.
        raise failure

    @asynccontextmanager
    async def stream(self, request: Request) -> AsyncGenerator[aiohttp.ClientResponse]:
        """Give a 2xx response of a file store to read piece by piece; anything else is raised as its error.

        The API key is not sent: a signed URL carries its own permission, and the store is not the service.
        """
        try:
            async with self._start(request, {}) as response:
                if not 200 <= response.status < 300:
                    raise self.error(request, Answer(response.status, response.headers, await response.read()))
                yield response
                return
        except _NO_ANSWER as cause:
            if isinstance(cause, LoopsError):
                raise
            failure = self._translated(request, cause)
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
        return self._session.request(
            request.method,
            request.url,
            data=data,
            headers=headers,
            timeout=_time_limit(request.timeout, request.idle_timeout),
            allow_redirects=False,
        )

    def decoded(self, request: Request, answer: Answer, kind: type[T]) -> T:
        """Return the body as `kind`, or raise what is wrong with it."""
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except msgspec.MsgspecError as problem:
            raise self.not_loops(request, answer, str(problem)) from problem

    def not_loops(self, request: Request, answer: Answer, problem: str) -> ProtocolError:
        """Make the error for an answer that no Loops service gives."""
        kind = answer.headers.get("Content-Type", "no content type")
        return ProtocolError(
            f"{_asked(request)}: answered {answer.status} with a body that is not what Loops sends "
            f"({problem}; {kind}): {self._excerpt(_text_of(answer.body))}. "
            f"Is {_host(request.url)} a Loops service? Check base_url."
        )

    def error(self, request: Request, answer: Answer) -> LoopsError:
        """Make the error that an answer outside 2xx stands for."""
        status = answer.status
        if 300 <= status < 400:
            return self.not_loops(request, answer, "a redirect, which is not followed lest the key go elsewhere")
        said = ErrorBody.read(answer.body)
        if said is None and status in (404, 405):
            return self.not_loops(request, answer, "an error page without a message")
        kind = _ERRORS.get(status) or (ServerError if status >= 500 else ApiError)
        request_id = answer.headers.get("X-Request-Id") or answer.headers.get("X-Baseten-Request-Id")
        text = self.clean(said.message)[:LONGEST_MESSAGE] if said else self._excerpt(_text_of(answer.body))
        error = kind(
            " ".join(
                filter(
                    None,
                    (
                        f"{_asked(request)}: answered {status}: {text}",
                        f"[request id {request_id}]" if request_id else "",
                        _NEXT.get(status, ""),
                    ),
                )
            ),
            status=status,
            code=said.code if said else None,
            reason=said.reason if said else None,
            request_id=request_id,
            retry_after=_seconds(answer.headers.get("Retry-After")),
        )
        error.retryable = error.retryable and not is_final(answer)
        return error

    def _translated(self, request: Request, cause: Exception) -> LoopsError:
        asked, host = _asked(request), _host(request.url)
        if isinstance(cause, aiohttp.ConnectionTimeoutError):
            return ConnectError(f"{asked}: {host} did not accept a connection in {CONNECT_SECONDS:g} s", was_sent=False)
        if isinstance(cause, TimeoutError):
            seconds = request.idle_timeout if request.timeout is None else request.timeout
            return RequestTimeoutError(f"{asked}: no answer within {seconds} s", timeout=seconds)
        if isinstance(cause, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
            return ConfigError(f"{asked}: not a usable URL")
        if isinstance(cause, aiohttp.ClientConnectorError):
            hint = " Is the embedded service running (`loops-local serve`)?" if _is_here(request.url) else ""
            return ConnectError(
                f"{asked}: could not connect to {host}: {_reason(cause)}. Check base_url and the network.{hint}",
                was_sent=False,
            )
        if isinstance(cause, aiohttp.ClientResponseError):
            problem = self._excerpt(cause.message)
            return ProtocolError(f"{asked}: {host} does not speak HTTP as expected: {problem}. Check base_url.")
        return ConnectError(f"{asked}: the connection to {host} broke: {self._excerpt(_reason(cause))}")

    def check_usable(self) -> None:
        """Raise `ClosedError` when this is closed, or belongs to another event loop."""
        if self._closed:
            raise ClosedError("this client is closed; create a new ServiceClient")
        check_loop(self._loop)

    def _excerpt(self, text: str) -> str:
        """Return the beginning of a text in one line."""
        return " ".join(self.clean(text)[:200].split()) or "(empty body)"

    def clean(self, text: str) -> str:
        """Return `text` without secrets that a service might have put there."""
        text = _QUERY.sub("?…", text)
        return self._settings.api_key.scrub(text) if self._settings.api_key else text


class ErrorBody(Struct, kw_only=True):
    """What services put into the body of an error, whichever generation they are of."""

    message: str
    code: str | None = None
    reason: str | None = None

    @classmethod
    def read(cls, body: bytes) -> ErrorBody | None:
        """Return what a JSON error body says; None when it is something else."""
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
def _expect_large_blocks() -> None:
    """Teach the C library that large blocks of memory come and go, as answers and batches do.

    glibc keeps freed memory for the next block up to twice the largest that it saw freed; until then it returns the
    memory of each answer to the system, and getting it back costs a quarter of a sample's CPU. The first such block is
    never touched, so it takes no memory.
    """
    bytes(protocol.MAX_REQUEST_BYTES)


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """Make a socket that notices when its peer is gone: a sample may take any time, so silence says nothing."""
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # not every system has each
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


@lru_cache(maxsize=64)
def _time_limit(seconds: float | None, idle_seconds: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS, sock_read=idle_seconds)


def _text_of(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def is_final(answer: Answer) -> bool:
    """Whether a gateway says that asking again is useless (data-plane reference 3.3)."""
    source, code = answer.headers.get(protocol.ERROR_SOURCE), answer.headers.get(protocol.ERROR_CODE)
    return (source == "06" and answer.status < 500) or (source == "01" and code == "631")


def _asked(request: Request) -> str:
    return f"{request.what} ({request.method} {request.url.split('?', 1)[0]})"


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _is_here(url: str) -> bool:
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
    return seconds if seconds > 0 else None  # a date that is over says nothing


def _dict(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None

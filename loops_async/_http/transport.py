"""The only module that speaks HTTP: a connection pool whose answers become values and errors."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache, partial
from typing import Any, Final, TypeVar
from urllib.parse import urljoin, urlsplit

import aiohttp
from msgspec import Struct
from msgspec.structs import replace
from yarl import URL

from .. import protocol
from .._kinds import dict_or_empty, is_dict
from .._tasks import check_loop
from .._text import one_line
from .._version import __version__
from .._waiting import TimeLimit
from .._work.registry import CURRENT, Entry, Work
from .._work.waits import Waits
from .._work.watchdog import watchdog
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
from ..types.identifiers import split_http_url
from . import tape
from .attempts import NUMBER, Attempt, log, request_id
from .body import Body
from .compression import ACCEPTED_ENCODINGS, CompressionError, decompressed
from .decoding import UnreadableError, decode_answer, decode_json
from .network import Connector, Proxies, Resolver, keepalive_socket, tls_context
from .redaction import PASSWORD, Redactor, without_queries, without_queries_in
from .request_log import RequestLog
from .retry import RetryBudget
from .settings import Settings, is_loopback

T = TypeVar("T")

CONNECT_SECONDS: Final = 10.0
KEEPALIVE_SECONDS: Final = 30.0
"""How long an idle connection is kept: half of the 60 s that AWS load balancers allow (nginx 75 s, others longer).

A request is lost if the other side closes the connection at the same moment, and not every request may be repeated.
"""
HEADERS: Final = {
    "User-Agent": f"loops-async/{__version__}",
    "Accept-Encoding": ACCEPTED_ENCODINGS,
    protocol.ACCEPT_ERROR: "1",
}
"""Those of every request."""
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
MOST_REDIRECTS: Final = 5
LONGEST_HEADER: Final = 64 * 1024
MOST_BYTES: Final = 64 << 20
"""The largest answer of most routes; a page of files or of log lines has a few megabytes."""
MOST_RESULT_BYTES: Final = 1 << 30
"""The largest completion or result of an operation; the logprobs of the largest batch have some hundred megabytes."""
MOST_ERROR_BYTES: Final = 1 << 20
"""How much of the body of an error is read."""
LONGEST_MESSAGE: Final = 2000
LONGEST_EXCERPT: Final = 200
LONGEST_ERROR_BODY: Final = 16 * 1024
LONGEST_TEXT: Final = 64 * 1024
"""How many bytes of a body are looked through for what is shown of it."""

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
    407: "The proxy wants a user and a password: http://user:password@host:port.",
    429: "Slow down, or ask for a higher limit.",
}

_NETWORK_ERRORS: Final = (aiohttp.ClientError, TimeoutError, ConnectionError)
"""Errors that end a request without an answer. Other system errors, e.g. a full disk, are not the network's."""


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
        self._process = os.getpid()
        self._closed = False
        self.work: Work = Work(partial(_cleaned, settings))
        self.work.on_busy = watchdog.watch
        self.retry_budget: RetryBudget = RetryBudget()
        self._resolver = Resolver()
        pool = _connector(self._resolver, keepalive_timeout=KEEPALIVE_SECONDS)
        self.work.facts["connections"] = lambda: pool.counts
        self._session = _session(pool)
        self._new_connections = _session(_connector(self._resolver, force_close=True))
        self._authorization = settings.authorization
        self._redactor = Redactor.of(settings)
        self._proxies = Proxies(settings.proxy)
        self._routes: dict[tuple[object, ...], str | None] = {}
        """The proxy of each scheme and host, with and without the key."""
        self.waits: Waits = Waits()
        self._requests = _request_log(settings)
        if self._requests is not None:
            self.work.watchers.append(self._requests)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop, for other threads of its process."""
        if self._process != os.getpid():
            raise ClosedError(
                f"this client was opened in process {self._process} and does not work in its forked child: create a "
                "new ServiceClient in each process"
            )
        return self._loop

    async def close(self) -> None:
        """Close every connection; afterwards each call raises `ClosedError`."""
        self._closed = True
        self.waits.close()
        self.work.close()
        await self.retry_budget.close()
        await self._session.close()
        await self._new_connections.close()
        await self._resolver.close()
        if self._requests is not None:
            await self._requests.close()

    async def ask(self, request: Request) -> Answer:
        """Send a request and return its answer; raise the error of an answer that is not 2xx."""
        answer = await self.send(request)
        if answer.is_success:
            return answer
        raise self.error(request, answer)

    async def fetch(self, request: Request, kind: type[T]) -> T:
        """Send a request and decode the answer's body as `kind`; raise the error of an answer that is not 2xx."""
        return self.decode(request, await self.ask(request), kind)

    def send(self, request: Request) -> Awaitable[Answer]:
        """Send a request and return the answer, whatever its status."""
        if tape.current is None:
            return self._exchange(request)
        self.check_usable()
        return tape.current.exchange(request, self._settings, self._exchange)

    def _exchange(self, request: Request) -> Awaitable[Answer]:
        attempt = self._attempt(request, self._authorization)
        return self._send(request) if attempt is None else self._watched(request, attempt)

    async def _watched(self, request: Request, attempt: Attempt) -> Answer:
        with attempt:
            return await self._send(request, attempt)

    async def _send(self, request: Request, attempt: Attempt | None = None) -> Answer:
        entry = CURRENT.get()
        if entry.is_over:
            with self._entry(request):
                return await self._send(request, attempt)
        try:
            with TimeLimit(request.timeout):
                async with self._start(request, self._authorization, attempt) as response:
                    entry.last_status = response.status
                    if attempt is not None:
                        attempt.answered(response.status, response.headers, response.content)
                    answer = await self._read(request, response)
                    entry.counts.bytes_received += response.content.total_bytes
                    if attempt is not None:
                        attempt.read(answer.body)
                    return answer
            failure: LoopsError = _too_late(request, request.timeout)
        except (*_NETWORK_ERRORS, ValueError) as cause:
            failure = self._transport_error(request, cause)
        # Not chained to aiohttp's error, which contains the request with the API key and the signature in its URL.
        raise failure

    def _entry(self, request: Request) -> Entry:
        """Return an entry for a request that is no part of another one."""
        headers = request.headers
        return self.work.begin(
            "request",
            request.what,
            run_id=headers.get(protocol.RUN_ID),
            sampler_id=headers.get(protocol.SAMPLER_ID),
            attempt=NUMBER.get(),
        )

    def stream(self, request: Request) -> AbstractAsyncContextManager[tape.OpenAnswer]:
        """Yield a 2xx response of a file store to read piece by piece; raise the error of any other response.

        The API key is not sent: a signed URL carries its own permission, and the store is not the service. So
        redirects are followed. The body has the encoding in which the store keeps it.
        """
        if tape.current is None:
            return self._stream(request)
        self.check_usable()
        return tape.current.opened(request, self._settings, self._stream)

    @asynccontextmanager
    async def _stream(self, request: Request) -> AsyncGenerator[tape.OpenAnswer]:
        try:
            async with AsyncExitStack() as stack:
                response = await self._opened(request, stack)
                try:
                    yield tape.OpenAnswer(response.status, response.headers, response.content)
                finally:
                    CURRENT.get().counts.bytes_received += response.content.total_bytes
                return
        except _NETWORK_ERRORS as cause:
            if isinstance(cause, LoopsError):
                raise
            failure = self._transport_error(request, cause)
        raise failure

    async def _opened(self, request: Request, stack: AsyncExitStack) -> aiohttp.ClientResponse:
        """Follow redirects to a 2xx response, which `stack` closes."""
        for _ in range(MOST_REDIRECTS + 1):
            attempt = self._attempt(request, {})
            if attempt is not None:
                stack.enter_context(attempt)
            try:
                response = await stack.enter_async_context(self._start(request, {}, attempt))
                CURRENT.get().last_status = response.status
            except ValueError as cause:
                raise self._transport_error(request, cause) from None
            if attempt is not None:
                attempt.answered(response.status, response.headers, response.content)
            if 200 <= response.status < 300:
                return response
            place = response.headers.get("Location", "")
            if response.status not in REDIRECTS or not place:
                answer = await self._read(request, response)
                if attempt is not None:
                    attempt.read(answer.body)
                raise self.error(request, answer)
            request = replace(request, url=self._redirected(request, place))
            await stack.aclose()
        raise ProtocolError(f"{_described(request)}: redirected more than {MOST_REDIRECTS} times")

    def _redirected(self, request: Request, place: str) -> str:
        url = urljoin(request.url, place)
        parts = split_http_url(url)
        if parts is None or (parts.scheme == "http" and request.url.startswith("https:")):
            raise ProtocolError(f"{_described(request)}: redirected to {self._excerpt(place)}, which is not followed")
        return url

    async def _read(self, request: Request, response: aiohttp.ClientResponse) -> Answer:
        """Read a whole answer; of an error's body, its beginning."""
        answer = Answer(response.status, response.headers, b"")
        is_success = answer.is_success
        most = request.most_bytes if is_success else MOST_ERROR_BYTES
        length = response.content_length
        if length is not None and length <= most:
            answer.body = await response.read()
        elif length is not None and is_success:
            raise self._too_large(request, answer, most)
        else:
            answer.body = await _up_to(response, most)
        encoding = response.headers.get("Content-Encoding")
        if encoding is not None:
            await self._decompress(request, answer, encoding, most)
        if is_success and len(answer.body) > most:
            raise self._too_large(request, answer, most)
        return answer

    async def _decompress(self, request: Request, answer: Answer, encoding: str, most: int) -> None:
        body, answer.body = answer.body, b""
        try:
            answer.body = await decompressed(body, encoding, most)
        except CompressionError as problem:
            if answer.is_success:  # the status of an error says enough
                raise self.protocol_error(request, answer, str(problem)) from None

    def _too_large(self, request: Request, answer: Answer, most: int) -> ProtocolError:
        return ProtocolError(
            f"{_described(request)}: answered with more than {most:,} bytes, the most that is read",
            status=answer.status,
        )

    def _start(
        self, request: Request, authorization: Mapping[str, str], attempt: Attempt | None
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        self.check_usable()
        headers = _headers(request, authorization) if attempt is None else attempt.headers
        body = request.body
        counts = CURRENT.get().counts
        counts.requests += 1
        counts.bytes_sent += body.size if isinstance(body, Body) else len(body or b"")
        session = self._new_connections if request.new_connection else self._session
        return session.request(
            request.method,
            _as_written(request.url) if request.has_signed_url else request.url,
            data=body.stream() if isinstance(body, Body) else body,
            headers=headers,
            timeout=_time_limits(request.idle_timeout),
            allow_redirects=False,
            proxy=self._proxy(request, has_key=bool(authorization)),
        )

    def _attempt(self, request: Request, authorization: Mapping[str, str]) -> Attempt | None:
        """Return what watches an attempt, None if nothing does."""
        if not self.work.watchers and not log.isEnabledFor(logging.DEBUG):
            return None
        return Attempt(
            request.method,
            request.url,
            headers={**HEADERS, **_headers(request, authorization)},
            body=request.body,
            has_signed_url=request.has_signed_url,
            watchers=self.work.watchers,
            clean=self.clean,
            translated=partial(self._translated, request),
        )

    def _translated(self, request: Request, error: BaseException) -> BaseException:
        return self._transport_error(request, error) if isinstance(error, _NETWORK_ERRORS) else error

    def _proxy(self, request: Request, *, has_key: bool) -> str | None:
        """Return the proxy that a request goes through; check that the key may be sent there."""
        origin = *request.url.split("/", 3)[:3], has_key
        if origin not in self._routes:
            self._routes[origin] = self._route(request, has_key=has_key)
        return self._routes[origin]

    def _route(self, request: Request, *, has_key: bool) -> str | None:
        try:
            proxy = self._proxies.for_url(request.url)
        except ValueError:  # an invalid address or port
            raise ConfigError(f"{_described(request)}: not a usable URL") from None
        if has_key:
            self._settings.check_key_may_go_to(request.url, "the address of the trainer or sampler", proxy=proxy)
        return proxy

    def decode(self, request: Request, answer: Answer, kind: type[T]) -> T:
        """Return the body as `kind`, or raise a `ProtocolError`."""
        try:
            return decode_answer(answer.body, kind)
        except UnreadableError as problem:
            # The frames of its traceback hold the body, in which a service may have echoed the key.
            raise self.protocol_error(request, answer, str(problem)) from problem.with_traceback(None)

    def protocol_error(self, request: Request, answer: Answer, problem: str) -> ProtocolError:
        """Return the error for an answer that does not follow the Loops protocol."""
        kind = self._label(answer.headers.get("Content-Type")) or "no content type"
        quote = self._excerpt(_text_of(answer.body))
        error = ProtocolError(
            f"{_described(request)}: answered {answer.status} with a body that is not what Loops sends "
            f"({self._label(problem)}; {kind}): {quote}. "
            f"Is {_host(request.url)} a Loops service? Check base_url.",
            status=answer.status,
        )
        if answer.is_success:
            error.quote = quote
        return error

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
        text = self.clean(details.message) if details else self._excerpt(_text_of(answer.body))
        request_id = self.request_id(answer)
        quoted = f" [request id {request_id}]" if request_id else ""
        advice = f" {_ADVICE[status]}" if status in _ADVICE else ""
        error = kind(
            f"{_described(request)}: answered {status}: {text}{quoted}{advice}",
            status=status,
            code=self._label(details.code) if details else None,
            reason=self._label(details.reason) if details else None,
            request_id=request_id,
            retry_after=_seconds(answer.headers.get("Retry-After")),
            body=self._shown_body(answer.body),
        )
        error.from_gateway = details is None
        if is_final(answer):
            error.retryable = error.may_have_acted = False
        elif status == 503:
            # A gateway also answers 503 when it lost its connection to a service that had the request.
            error.may_have_acted = error.from_gateway and "Retry-After" not in answer.headers
        return error

    def _shown_body(self, body: bytes) -> Any:
        """Return the body of an error as a program may read it: without secrets, and not endless."""
        text = self._redactor.text(_text_of(body, 2 * LONGEST_ERROR_BODY))  # twice, since it may become shorter
        if len(body) <= LONGEST_ERROR_BODY:
            with suppress(UnreadableError):
                return without_queries_in(decode_json(text.encode(), object))
        return without_queries(text[:LONGEST_ERROR_BODY]) or None

    def request_id(self, answer: Answer) -> str | None:
        """Return the id of an answer to quote to support, if it has one."""
        return self._label(request_id(answer.headers))

    def _transport_error(self, request: Request, cause: Exception) -> LoopsError:
        described, host = _described(request), _host(request.url)
        if isinstance(cause, LoopsError):  # ours already, e.g. that the key may not be sent there
            return cause
        if self._closed:
            return ClosedError(f"{described}: the client was closed before the answer came")
        if isinstance(cause, aiohttp.ConnectionTimeoutError):
            return ConnectError(
                f"{described}: {host} did not accept a connection in {CONNECT_SECONDS:g} s", was_sent=False
            )
        if isinstance(cause, TimeoutError):
            return _too_late(request, request.idle_timeout)
        if isinstance(cause, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
            return ConfigError(f"{described}: not a usable URL")
        if isinstance(cause, aiohttp.ClientConnectorError):
            return _not_connected(request, cause)
        if isinstance(cause, aiohttp.ClientHttpProxyError):
            advice = _ADVICE[407] if cause.status == 407 else "Check the proxy, or list the host in NO_PROXY."
            reason = f"{cause.status} {self._excerpt(cause.message)}"
            refused = ConnectError(
                f"{described}: the proxy did not connect to {host}: {reason}. {advice}", was_sent=False
            )
            refused.retryable = cause.status >= 500
            return refused
        if isinstance(cause, aiohttp.ClientResponseError):
            problem = self._excerpt(cause.message)
            return ProtocolError(f"{described}: {host} does not follow HTTP: {problem}. Check base_url.")
        if isinstance(cause, ValueError):
            return ConfigError(f"{described}: cannot be sent: {self._excerpt(str(cause))}")
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
        return _cleaned(self._settings, text, most)


class ErrorBody(Struct, kw_only=True):
    """The contents of an error body, from older and newer services."""

    message: str
    code: str | None = None
    reason: str | None = None

    @classmethod
    def read(cls, body: bytes) -> ErrorBody | None:
        """Read a JSON error body; None if it is anything else."""
        try:
            raw = decode_json(body, object)
        except UnreadableError:
            return None
        if not is_dict(raw):
            return None
        sources = (raw, dict_or_empty(raw.get("error")))
        texts = [source.get(key) for source in sources for key in ("detail", "error", "message")]
        return cls(
            message=next((text for text in texts if isinstance(text, str) and text), _text_of(body)),
            code=_text(raw.get("code")),
            reason=_text(dict_or_empty(raw.get("details")).get("reason")),
        )


@cache
def _raise_trim_threshold() -> None:
    """Make the C library keep freed memory, since large answers and batches are allocated again and again.

    glibc keeps at most twice the largest block that was freed so far; until one was large, it returns the memory of
    each answer to the system, and allocating it again costs a quarter of a sample's CPU time. The block that is freed
    here is never written to, so it uses no memory.
    """
    bytes(protocol.MAX_REQUEST_BYTES)


def _connector(resolver: Resolver, **options: Any) -> Connector:
    # No limit here, since a long poll must never wait for a free connection; sampling has a limit of its own.
    return Connector(limit=0, resolver=resolver, ssl=tls_context(), socket_factory=keepalive_socket, **options)


def _session(connector: Connector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=HEADERS,
        # aiohttp would decompress answers of any size, and also the files that a store keeps compressed.
        auto_decompress=False,
        max_line_size=LONGEST_HEADER,
        max_field_size=LONGEST_HEADER,
    )


def _cleaned(settings: Settings, text: str, most: int = LONGEST_MESSAGE) -> str:
    text = without_queries(text)
    return one_line(settings.api_key.scrub(text) if settings.api_key else text, most)


def _request_log(settings: Settings) -> RequestLog | None:
    return None if settings.request_log is None else RequestLog(settings.request_log, Redactor.of(settings))


@lru_cache(maxsize=64)
def _time_limits(idle_seconds: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=idle_seconds)


def _too_late(request: Request, seconds: float | None) -> RequestTimeoutError:
    return RequestTimeoutError(f"{_described(request)}: no answer within {seconds} s", timeout=seconds)


def _not_connected(request: Request, cause: aiohttp.ClientConnectorError) -> ConnectError:
    url = request.url
    if isinstance(cause, aiohttp.ClientProxyConnectionError):
        place = f"the proxy {cause.host}:{cause.port}"
        advice = "Check HTTPS_PROXY and HTTP_PROXY or proxy=, or list the host in NO_PROXY."
    else:
        place, advice = _host(url), "Check base_url and the network."
    is_certificate = isinstance(cause, aiohttp.ClientConnectorCertificateError)
    if is_certificate:
        advice = (
            "The server's certificate is not trusted. Behind a proxy that inspects traffic, or for a certificate of "
            "your own, set SSL_CERT_FILE to the file of the authority that signed it before making the client."
        )
    elif is_loopback(urlsplit(url).hostname or ""):
        advice += " Is the embedded service running (`loops-local serve`)?"
    error = ConnectError(
        f"{_described(request)}: could not connect to {place}: {_reason(cause)}. {advice}", was_sent=False
    )
    error.retryable = not is_certificate
    return error


def _headers(request: Request, authorization: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of one request."""
    headers = {**request.headers, **authorization}
    if request.body is not None:
        headers["Content-Type"] = "application/json"
    if isinstance(request.body, Body):
        headers["Content-Length"] = str(request.body.size)
    return headers


def _as_written(url: str) -> URL:
    """Return a URL that is sent byte for byte; without this, some escapes are written in another way."""
    return URL(url, encoded=url.isascii())


async def _up_to(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Return the body; only the first part of one with more than `most` bytes, but more than `most` bytes of it."""
    pieces: list[bytes] = []
    async for piece in response.content.iter_any():
        pieces.append(piece)
        most -= len(piece)
        if most < 0:
            break
    return b"".join(pieces)


def _text_of(body: bytes, most: int = LONGEST_TEXT) -> str:
    """Return the beginning of a body as text, without a last word that was cut: it may be half a secret."""
    text = body[:most].decode("utf-8", "replace")
    return text if len(body) <= most else "".join(text.rsplit(maxsplit=1)[:1])


def is_final(answer: Answer) -> bool:
    """Whether a gateway reports an error that no retry can change (data-plane reference 3.3)."""
    source, code = answer.headers.get(protocol.ERROR_SOURCE), answer.headers.get(protocol.ERROR_CODE)
    return (source == "06" and answer.status < 500) or (source == "01" and code == "631")


def _described(request: Request) -> str:
    url = PASSWORD.sub("", request.url.split("?", 1)[0])
    return f"{request.what} ({request.method} {url})"


def _host(url: str) -> str:
    # Not with `urlsplit`, which raises an error of its own for some URLs.
    return url.partition("//")[2].partition("/")[0].rpartition("@")[2]


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
    except (ValueError, OverflowError):
        return None
    return seconds if seconds > 0 else None  # a past date carries no information


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None

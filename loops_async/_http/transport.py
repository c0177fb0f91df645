"""The only module that speaks HTTP: a connection pool whose answers become values."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import cache, partial
from typing import Any, Final, TypeVar
from urllib.parse import urljoin

import aiohttp
from msgspec.structs import replace
from yarl import URL

from .. import protocol
from .._tasks import check_loop
from .._version import __version__
from .._waiting import TimeLimit
from .._work.registry import CURRENT, Entry, Work
from .._work.waits import Waits
from .._work.watchdog import watchdog
from ..errors import ClosedError, ConfigError, LoopsError, ProtocolError
from ..types.identifiers import split_http_url
from . import tape
from .attempts import NUMBER, Attempt, log
from .body import Body
from .compression import ACCEPTED_ENCODINGS, CompressionError, decompressed
from .decoding import UnreadableError, decode_answer
from .errors import NETWORK_ERRORS, Errors, too_late
from .messages import Answer, Request
from .network import Connector, Proxies, Resolver, keepalive_socket, time_limits, tls_context
from .redaction import Redactor
from .request_log import RequestLog
from .retry import RetryBudget
from .settings import Settings

T = TypeVar("T")

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
MOST_ERROR_BYTES: Final = 1 << 20
"""How much of the body of an error is read."""


class Transport:
    """A pool of connections to one service, for one event loop."""

    def __init__(self, settings: Settings) -> None:
        _raise_trim_threshold()
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()
        self._closed = False
        self.errors: Errors = Errors(settings)
        self.work: Work = Work(self.errors.clean)
        self.work.on_busy = watchdog.watch
        self.retry_budget: RetryBudget = RetryBudget()
        self._resolver = Resolver()
        pool = _connector(self._resolver, keepalive_timeout=KEEPALIVE_SECONDS)
        self.work.facts["connections"] = lambda: pool.counts
        self._session = _session(pool)
        self._new_connections = _session(_connector(self._resolver, force_close=True))
        self._authorization = settings.authorization
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
        raise self.errors.of_answer(request, answer)

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
            failure: LoopsError = too_late(request, request.timeout)
        except (*NETWORK_ERRORS, ValueError) as cause:
            failure = self._ended(request, cause)
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
        except NETWORK_ERRORS as cause:
            if isinstance(cause, LoopsError):
                raise
            failure = self._ended(request, cause)
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
                raise self._ended(request, cause) from None
            if attempt is not None:
                attempt.answered(response.status, response.headers, response.content)
            if 200 <= response.status < 300:
                return response
            place = response.headers.get("Location", "")
            if response.status not in REDIRECTS or not place:
                answer = await self._read(request, response)
                if attempt is not None:
                    attempt.read(answer.body)
                raise self.errors.of_answer(request, answer)
            request = replace(request, url=self._redirected(request, place))
            await stack.aclose()
        raise ProtocolError(f"{request.described}: redirected more than {MOST_REDIRECTS} times")

    def _redirected(self, request: Request, place: str) -> str:
        url = urljoin(request.url, place)
        parts = split_http_url(url)
        if parts is None or (parts.scheme == "http" and request.url.startswith("https:")):
            raise ProtocolError(
                f"{request.described}: redirected to {self.errors.excerpt(place)}, which is not followed"
            )
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
                raise self.errors.of_protocol(request, answer, str(problem)) from None

    def _too_large(self, request: Request, answer: Answer, most: int) -> ProtocolError:
        return ProtocolError(
            f"{request.described}: answered with more than {most:,} bytes, the most that is read",
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
        counts.bytes_sent += request.size
        session = self._new_connections if request.new_connection else self._session
        return session.request(
            request.method,
            _as_written(request.url) if request.has_signed_url else request.url,
            data=body.stream() if isinstance(body, Body) else body,
            headers=headers,
            timeout=time_limits(request.idle_timeout),
            allow_redirects=False,
            proxy=self._proxy(request, has_key=bool(authorization)),
        )

    def _attempt(self, request: Request, authorization: Mapping[str, str]) -> Attempt | None:
        """Return what watches an attempt, None if nothing does."""
        if not self.work.watchers and not log.isEnabledFor(logging.DEBUG):
            return None
        return Attempt(
            request,
            headers={**HEADERS, **_headers(request, authorization)},
            watchers=self.work.watchers,
            clean=self.errors.clean,
            translated=partial(self._translated, request),
        )

    def _translated(self, request: Request, error: BaseException) -> BaseException:
        return self._ended(request, error) if isinstance(error, NETWORK_ERRORS) else error

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
            raise ConfigError(f"{request.described}: not a usable URL") from None
        if has_key:
            self._settings.check_key_may_go_to(request.url, "the address of the trainer or sampler", proxy=proxy)
        return proxy

    def decode(self, request: Request, answer: Answer, kind: type[T]) -> T:
        """Return the body as `kind`, or raise a `ProtocolError`."""
        try:
            return decode_answer(answer.body, kind)
        except UnreadableError as problem:
            # The frames of its traceback hold the body, in which a service may have echoed the key.
            raise self.errors.of_protocol(request, answer, str(problem)) from problem.with_traceback(None)

    def _ended(self, request: Request, cause: Exception) -> LoopsError:
        """Return the error for a request that ended without an answer, or with a part of one."""
        if self._closed and not isinstance(cause, LoopsError):
            return ClosedError(f"{request.described}: the client was closed before the answer came")
        return self.errors.of_network(request, cause)

    def check_usable(self) -> None:
        """Raise `ClosedError` if the transport is closed or belongs to another event loop."""
        if self._closed:
            raise ClosedError("this client is closed; create a new ServiceClient")
        check_loop(self._loop)


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


def _request_log(settings: Settings) -> RequestLog | None:
    return None if settings.request_log is None else RequestLog(settings.request_log, Redactor.of(settings))


def _headers(request: Request, authorization: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of one request."""
    headers = {**request.headers, **authorization}
    if request.body is not None:
        headers["Content-Type"] = "application/json"
    if isinstance(request.body, Body):
        headers["Content-Length"] = str(request.size)
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

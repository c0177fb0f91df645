"""Which error an exchange ended with, and what it may show of what the service wrote."""

from __future__ import annotations

import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from msgspec import Struct

from .._kinds import dict_or_empty, is_dict
from .._text import one_line
from ..errors import (
    ApiError,
    AuthenticationError,
    BadRequestError,
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
from .attempts import request_id
from .decoding import UnreadableError, decode_json
from .messages import Answer, Request
from .network import CONNECT_SECONDS
from .redaction import Redactor, without_queries, without_queries_in
from .settings import Settings, is_loopback

LONGEST_MESSAGE: Final = 2000
LONGEST_EXCERPT: Final = 200
LONGEST_ERROR_BODY: Final = 16 * 1024
LONGEST_TEXT: Final = 64 * 1024
"""How many bytes of a body are looked through for what is shown of it."""

NETWORK_ERRORS: Final = (aiohttp.ClientError, TimeoutError, ConnectionError)
"""Errors that end a request without an answer. Other system errors, e.g. a full disk, are not the network's."""

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


class Errors:
    """Makes the errors of one client's exchanges; what they quote holds none of its secrets."""

    def __init__(self, settings: Settings) -> None:
        self._api_key = settings.api_key
        self._redactor = Redactor.of(settings)

    def of_answer(self, request: Request, answer: Answer) -> LoopsError:
        """Return the error for an answer that is not 2xx."""
        status = answer.status
        if 300 <= status < 400:
            return self.of_protocol(
                request, answer, "a redirect, which is never followed, since it could leak the API key"
            )
        details = ErrorBody.read(answer.body)
        if details is None and status in (404, 405):
            return self.of_protocol(request, answer, "an error page without a message")
        kind = _ERRORS.get(status) or (ServerError if status >= 500 else ApiError)
        text = self.clean(details.message) if details else self.excerpt(_text_of(answer.body))
        request_id = self.request_id(answer)
        quoted = f" [request id {request_id}]" if request_id else ""
        advice = f" {_ADVICE[status]}" if status in _ADVICE else ""
        error = kind(
            f"{request.described}: answered {status}: {text}{quoted}{advice}",
            status=status,
            code=self._label(details.code) if details else None,
            reason=self._label(details.reason) if details else None,
            request_id=request_id,
            retry_after=_seconds(answer.headers.get("Retry-After")),
            body=self._shown_body(answer.body),
        )
        error.from_gateway = details is None
        if answer.is_final:
            error.retryable = error.may_have_acted = False
        elif status == 503:
            # A gateway also answers 503 when it lost its connection to a service that had the request.
            error.may_have_acted = error.from_gateway and "Retry-After" not in answer.headers
        return error

    def of_protocol(self, request: Request, answer: Answer, problem: str) -> ProtocolError:
        """Return the error for an answer that does not follow the Loops protocol, whatever its status."""
        kind = self._label(answer.headers.get("Content-Type")) or "no content type"
        quote = self.excerpt(_text_of(answer.body))
        error = ProtocolError(
            f"{request.described}: answered {answer.status} with a body that is not what Loops sends "
            f"({self._label(problem)}; {kind}): {quote}. "
            f"Is {request.host} a Loops service? Check base_url.",
            status=answer.status,
        )
        if answer.is_success:
            error.quote = quote
        return error

    def of_network(self, request: Request, cause: Exception) -> LoopsError:
        """Return the error for a request that ended without an answer, or with a part of one."""
        described, host = request.described, request.host
        if isinstance(cause, LoopsError):  # ours already, e.g. that the key may not be sent there
            return cause
        if isinstance(cause, aiohttp.ConnectionTimeoutError):
            return ConnectError(
                f"{described}: {host} did not accept a connection in {CONNECT_SECONDS:g} s", was_sent=False
            )
        if isinstance(cause, TimeoutError):
            return too_late(request, request.idle_timeout)
        if isinstance(cause, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
            return ConfigError(f"{described}: not a usable URL")
        if isinstance(cause, aiohttp.ClientConnectorError):
            return _not_connected(request, cause)
        if isinstance(cause, aiohttp.ClientHttpProxyError):
            advice = _ADVICE[407] if cause.status == 407 else "Check the proxy, or list the host in NO_PROXY."
            reason = f"{cause.status} {self.excerpt(cause.message)}"
            refused = ConnectError(
                f"{described}: the proxy did not connect to {host}: {reason}. {advice}", was_sent=False
            )
            refused.retryable = cause.status >= 500
            return refused
        if isinstance(cause, aiohttp.ClientResponseError):
            problem = self.excerpt(cause.message)
            return ProtocolError(f"{described}: {host} does not follow HTTP: {problem}. Check base_url.")
        if isinstance(cause, ValueError):
            return ConfigError(f"{described}: cannot be sent: {self.excerpt(str(cause))}")
        broke = f"{described}: the connection to {host} broke: {self.excerpt(_reason(cause))}"
        return ConnectError(broke, has_begun=isinstance(cause, aiohttp.ClientPayloadError))

    def clean(self, text: str, most: int = LONGEST_MESSAGE) -> str:
        """Return text of a service as it may be shown and logged.

        It is one line of at most `most` characters, without secrets that the service might have put there, and with
        control characters made visible.
        """
        text = without_queries(text)
        return one_line(self._api_key.scrub(text) if self._api_key else text, most)

    def request_id(self, answer: Answer) -> str | None:
        """Return the id of an answer to quote to support, if it has one."""
        return self._label(request_id(answer.headers))

    def excerpt(self, text: str) -> str:
        """Return the beginning of `text` as one line."""
        return self.clean(text, LONGEST_EXCERPT) or "(empty body)"

    def _label(self, text: str | None) -> str | None:
        """Return an id, a code or a header as it may be shown."""
        return None if text is None else self.clean(text, LONGEST_EXCERPT)

    def _shown_body(self, body: bytes) -> Any:
        """Return the body of an error as a program may read it: without secrets, and not endless."""
        text = self._redactor.text(_text_of(body, 2 * LONGEST_ERROR_BODY))  # twice, since it may become shorter
        if len(body) <= LONGEST_ERROR_BODY:
            with suppress(UnreadableError):
                return without_queries_in(decode_json(text.encode(), object))
        return without_queries(text[:LONGEST_ERROR_BODY]) or None


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


def too_late(request: Request, seconds: float | None) -> RequestTimeoutError:
    """Return the error for a request whose time is over."""
    return RequestTimeoutError(f"{request.described}: no answer within {seconds} s", timeout=seconds)


def _not_connected(request: Request, cause: aiohttp.ClientConnectorError) -> ConnectError:
    url = request.url
    if isinstance(cause, aiohttp.ClientProxyConnectionError):
        place = f"the proxy {cause.host}:{cause.port}"
        advice = "Check HTTPS_PROXY and HTTP_PROXY or proxy=, or list the host in NO_PROXY."
    else:
        place, advice = request.host, "Check base_url and the network."
    is_certificate = isinstance(cause, aiohttp.ClientConnectorCertificateError)
    if is_certificate:
        advice = (
            "The server's certificate is not trusted. Behind a proxy that inspects traffic, or for a certificate of "
            "your own, set SSL_CERT_FILE to the file of the authority that signed it before making the client."
        )
    elif is_loopback(urlsplit(url).hostname or ""):
        advice += " Is the embedded service running (`loops-local serve`)?"
    error = ConnectError(
        f"{request.described}: could not connect to {place}: {_reason(cause)}. {advice}", was_sent=False
    )
    error.retryable = not is_certificate
    return error


def _text_of(body: bytes, most: int = LONGEST_TEXT) -> str:
    """Return the beginning of a body as text, without a last word that was cut: it may be half a secret."""
    text = body[:most].decode("utf-8", "replace")
    return text if len(body) <= most else "".join(text.rsplit(maxsplit=1)[:1])


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

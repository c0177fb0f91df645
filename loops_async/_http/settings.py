"""Constructor arguments and environment variables, validated and combined into one value."""

from __future__ import annotations

import ipaddress
import os
import sys
from os import PathLike
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from msgspec import Struct

from ..errors import ConfigError
from ..types.identifiers import split_http_url
from . import tape
from .redaction import SHORTEST_KEY
from .request_log import RequestLogSettings, request_log_settings

DEFAULT_BASE_URL: Final = "https://api.baseten.co"

MAX_CONNECTIONS: Final = 2048
"""The most samples in flight, and so of their connections, unless ``BT_LOOPS_MAX_CONNECTIONS`` is set."""

NO_KEY: Final = (
    "no API key: pass api_key=…, or set BASETEN_API_KEY (create a key in the workspace's settings at baseten.co). "
    "To work without an account, start the embedded service with `loops-local serve` and pass the base_url and "
    "api_key that it prints."
)


FROM_ENVIRONMENT: Final = {
    "reuse_from_session_id": "LOOPS_REUSE_FROM_SESSION_ID",
    "reuse_from_run_id": "LOOPS_REUSE_FROM_RUN_ID",
    "team": "LOOPS_TEAM",
    "availability_model": "LOOPS_AVAILABILITY_MODEL",
}


class ApiKey:
    """Protects an API key: it appears only in the Authorization header."""

    __slots__ = ("_key",)

    def __init__(self, key: str) -> None:
        if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError("api_key must be printable ASCII without spaces (a stray newline from a file?)")
        self._key = key

    def reveal(self) -> str:
        """Return the key itself."""
        return self._key

    def scrub(self, text: str) -> str:
        """Return `text` without the key, in case a service echoed it."""
        return text.replace(self._key, "***") if len(self._key) >= SHORTEST_KEY else text

    def __repr__(self) -> str:
        return "ApiKey(***)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an API key is never pickled")


class Proxy:
    """The URL of a proxy; its user and password are sent to the proxy and appear nowhere else."""

    __slots__ = ("_url",)

    def __init__(self, url: str) -> None:
        parts = split_http_url(url.strip()) if isinstance(url, str) else None
        if parts is None:
            raise ConfigError("proxy must be an absolute http or https URL, e.g. http://proxy.example:3128")
        self._url = parts.geturl()

    def reveal(self) -> str:
        """Return the URL itself."""
        return self._url

    def __repr__(self) -> str:
        return f"Proxy({self})"

    def __str__(self) -> str:
        return urlsplit(self._url).netloc.rpartition("@")[2]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a proxy is never pickled, since its URL may contain a password")


class Settings(Struct, frozen=True, kw_only=True):
    """Everything that a client needs to know before it connects."""

    base_url: str
    api_key: ApiKey | None
    auth_scheme: str = "Bearer"
    training_project_id: str | None = None
    reuse_from_session_id: str | None = None
    reuse_from_run_id: str | None = None
    team: str | None = None
    availability_model: str | None = None
    max_connections: int = MAX_CONNECTIONS
    proxy: Proxy | None = None
    """The proxy for every host; None for those of the environment."""
    allow_http: bool = False
    """Whether the key may be sent unencrypted to other machines."""
    request_log: RequestLogSettings | None = None

    @property
    def authorization(self) -> dict[str, str]:
        """The headers that authorize a request."""
        return {"Authorization": f"{self.auth_scheme} {self.api_key.reveal()}"} if self.api_key else {}

    def check_key_may_go_to(self, url: str, what: str, *, proxy: str | None = None) -> None:
        """Check that a request to `url`, through `proxy`, does not send the key unencrypted over a network.

        A proxy on this machine belongs to its user, e.g. a sidecar that encrypts.

        `allow_http` counts only if base_url itself is http, so a service at an https URL cannot make the client send
        the key unencrypted by naming an http URL.

        Raises:
            ConfigError: it would; `what` names the URL.
        """
        parts = urlsplit(url)
        first_host = urlsplit(proxy or url).hostname or ""
        if self.api_key is None or parts.scheme == "https" or is_loopback(first_host):
            return
        if self.base_url.startswith("https:"):
            raise ConfigError(
                f"{what} is a plain http URL (host {parts.hostname}), although the service's own URL is https. The "
                "API key was not sent there; report it to the operators of the service"
            )
        if not self.allow_http:
            raise ConfigError(
                f"{what} is a plain http URL (host {parts.hostname}), over which anyone on the network could read the "
                "API key: use https. Where the network is trusted, pass allow_http=True or set LOOPS_ALLOW_HTTP=1"
            )


def resolve_settings(
    *,
    api_key: str | None = None,
    base_url: str | None = None,
    proxy: str | None = None,
    allow_http: bool | None = None,
    request_log: str | PathLike[str] | None = None,
    **others: Any,
) -> Settings:
    """Fill missing settings from the environment, and check all of them.

    Reads ``BASETEN_API_KEY``, ``LOOPS_BASE_URL``, ``LOOPS_ALLOW_HTTP``, ``BT_LOOPS_MAX_CONNECTIONS``,
    ``LOOPS_REQUEST_LOG``, ``LOOPS_REQUEST_LOG_BODIES`` and the variables of `FROM_ENVIRONMENT`; an argument takes
    precedence over its variable.
    """
    key = api_key if api_key is not None else os.environ.get("BASETEN_API_KEY") or None
    url = base_url if base_url is not None else os.environ.get("LOOPS_BASE_URL") or None
    if key is None and url is None and not tape.is_playing():
        raise ConfigError(NO_KEY)
    availability = "availability_model"  # errors name what was set
    for name, variable in FROM_ENVIRONMENT.items():
        if others.get(name) is None:
            others[name] = os.environ.get(variable) or None
            availability = variable if name == "availability_model" else availability
    if others.get("auth_scheme", "Bearer") not in ("Bearer", "Api-Key"):
        raise ConfigError(f"auth_scheme must be 'Bearer' or 'Api-Key'; got {others['auth_scheme']!r}")
    if others["availability_model"] not in (None, "dedicated", "spot"):
        raise ConfigError(f"{availability} must be 'dedicated' or 'spot'; got {others['availability_model']!r}")
    settings = Settings(
        base_url=_checked_base_url(
            DEFAULT_BASE_URL if url is None else url, "LOOPS_BASE_URL" if base_url is None else "base_url"
        ),
        api_key=ApiKey(key) if key is not None else None,
        max_connections=_max_connections(),
        proxy=None if proxy is None else Proxy(proxy),
        allow_http=_flag("LOOPS_ALLOW_HTTP") if allow_http is None else bool(allow_http),
        request_log=request_log_settings(request_log),
        **others,
    )
    named = getproxies_environment()
    its_proxy = settings.proxy.reveal() if settings.proxy else named.get("http") or named.get("all")
    settings.check_key_may_go_to(settings.base_url, "base_url", proxy=its_proxy)
    return settings


def _checked_base_url(url: str, name: str) -> str:
    checked = checked_url(url, name)
    if checked.endswith("/v1/loops"):
        raise ConfigError(
            f"{name} must not contain the path of the API, which is added to it: remove /v1/loops from {checked}"
        )
    return checked


def checked_url(url: str, name: str) -> str:
    """Return an absolute HTTP URL without white space around it and slashes at its end; errors name it `name`."""
    parts = split_http_url(url.strip()) if isinstance(url, str) else None
    if parts is None:
        shown = "one with a user" if "@" in str(url) else repr(url)
        raise ConfigError(f"{name} must be an absolute http or https URL; got {shown}")
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ConfigError(f"{name} must not contain a user, a query or a fragment; host {parts.hostname!r}")
    return parts.geturl().rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine, so that what is sent there passes no network."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified  # systems connect 0.0.0.0 to themselves


def _flag(variable: str) -> bool:
    text = os.environ.get(variable, "").strip().lower()
    if text not in ("", "0", "1", "false", "true"):
        raise ConfigError(f"{variable} must be 1 or 0; got {text!r}")
    return text in ("1", "true")


def _max_connections() -> int:
    asked = _asked_connections()
    return possible_connections() if asked is None else asked


def _asked_connections() -> int | None:
    text = os.environ.get("BT_LOOPS_MAX_CONNECTIONS")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"BT_LOOPS_MAX_CONNECTIONS must be a whole number of at least 1; got {text!r}")
    return int(text)


def possible_connections() -> int:
    """Return how many samples a client of this process can have in flight, each with a connection.

    Raises:
        ConfigError: ``BT_LOOPS_MAX_CONNECTIONS`` is no such number.
    """
    return min(_asked_connections() or MAX_CONNECTIONS, connections_within(open_file_limit()))


def connections_within(files: int) -> int:
    """Return how many connections a process can have that may open so many files: a quarter is for other things."""
    return files * 3 // 4


def files_for(connections: int) -> int:
    """Return how many files a process must be allowed to open for so many connections."""
    return connections * 4 // 3 + 1


def how_to_have(connections: int) -> str:
    """Say what to do so that a process can have so many connections, which this one cannot."""
    steps: list[str] = []
    if connections_within(open_file_limit()) < connections:
        steps.append(f"run `ulimit -n {files_for(connections)}` before the program")
    if (_asked_connections() or MAX_CONNECTIONS) < connections:
        steps.append(f"set BT_LOOPS_MAX_CONNECTIONS={connections}")
    return " and ".join(steps)


def open_file_limit() -> int:
    """Return the limit of open files and connections of this process; the program itself needs some of them."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft

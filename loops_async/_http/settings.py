"""Constructor arguments and environment variables, validated and combined into one value."""

from __future__ import annotations

import os
import sys
from typing import Any, Final, NoReturn

from msgspec import Struct

from ..errors import ConfigError
from ..types.identifiers import split_http_url

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
        # No service issues shorter keys; in tests they are ordinary words.
        return text.replace(self._key, "***") if len(self._key) >= 8 else text

    def __repr__(self) -> str:
        return "ApiKey(***)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an API key is never pickled")


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

    @property
    def authorization(self) -> dict[str, str]:
        """The headers that authorize a request."""
        return {"Authorization": f"{self.auth_scheme} {self.api_key.reveal()}"} if self.api_key else {}


def resolve_settings(
    *,
    api_key: str | None = None,
    base_url: str | None = None,
    **others: Any,
) -> Settings:
    """Fill missing settings from the environment, and check all of them.

    Reads ``BASETEN_API_KEY``, ``LOOPS_BASE_URL``, ``BT_LOOPS_MAX_CONNECTIONS`` and the variables of
    `FROM_ENVIRONMENT`; an argument takes precedence over its variable.
    """
    key = api_key if api_key is not None else os.environ.get("BASETEN_API_KEY") or None
    url = base_url if base_url is not None else os.environ.get("LOOPS_BASE_URL") or None
    if key is None and url is None:
        raise ConfigError(NO_KEY)
    for name, variable in FROM_ENVIRONMENT.items():
        if others.get(name) is None:
            others[name] = os.environ.get(variable) or None
    if others.get("auth_scheme", "Bearer") not in ("Bearer", "Api-Key"):
        raise ConfigError(f"auth_scheme must be 'Bearer' or 'Api-Key'; got {others['auth_scheme']!r}")
    if others["availability_model"] not in (None, "dedicated", "spot"):
        raise ConfigError(f"availability_model must be 'dedicated' or 'spot'; got {others['availability_model']!r}")
    return Settings(
        base_url=checked_url(DEFAULT_BASE_URL if url is None else url, "base_url"),
        api_key=ApiKey(key) if key is not None else None,
        max_connections=_max_connections(),
        **others,
    )


def checked_url(url: str, name: str) -> str:
    """Return `url` without its trailing slash if it is an absolute HTTP URL; errors name the argument `name`."""
    parts = split_http_url(url) if isinstance(url, str) else None
    if parts is None:
        raise ConfigError(f"{name} must be an absolute http or https URL; got {url!r}")
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ConfigError(f"{name} must not contain a user, a query or a fragment; host {parts.hostname!r}")
    return url.rstrip("/")


def _max_connections() -> int:
    text = os.environ.get("BT_LOOPS_MAX_CONNECTIONS")
    if not text:
        return min(MAX_CONNECTIONS, _open_file_limit() * 3 // 4)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"BT_LOOPS_MAX_CONNECTIONS must be a whole number of at least 1; got {text!r}")
    return int(text)


def _open_file_limit() -> int:
    """Return the limit of open files and connections of this process; the program itself needs some of them."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft

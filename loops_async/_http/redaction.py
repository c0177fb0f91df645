"""What is written down of requests and answers, without secrets: the one place of these rules.

Everything that stores whole requests or answers uses a `Redactor`: the request log, the cassettes of tests and the
bodies of errors. Error messages and repr need less: `Transport.clean`, which uses `without_queries` and `ApiKey.scrub`.

Secrets are the API key wherever it appears, the headers that authorize or identify, users and passwords of URLs, the
queries of signed URLs, tokens in fragments, credentials in text, and the values of JSON fields that are named after a
secret. Other text must stay as it is: answers are replayed from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import quote

from .._kinds import is_dict, is_list

if TYPE_CHECKING:
    from .settings import Settings

REDACTED: Final = "[REDACTED]"

SECRET_HEADERS: Final = frozenset(
    {"authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "x-amz-security-token"}
)
SHORTEST_KEY: Final = 8
"""No service issues shorter keys; in tests they are ordinary words. In secret headers, they are masked all the same."""

_Replacement: TypeAlias = "str | Callable[[re.Match[str]], str]"

PASSWORD: Final = re.compile(r"(?<=://)[^\s/?#@\"'<>]*@")
"""The user and password of a URL."""
_QUERY: Final = re.compile(r"\?.*", re.DOTALL)
_QUERY_OF_WORD: Final = re.compile(r"(?<=[^\s\"'<>])\?[^\s\"'<>]+")
"""The query of an absolute or relative URL: a question mark within a word and the rest of that word."""
_URL: Final = re.compile(
    r"(https?:(?:\\?/){2})([^\s/?#@\"'<>\\]*@)?([^\s?#\"'<>]*)(\?[^\s#\"'<>]+)?(#[^\s\"'<>]+)?", re.IGNORECASE
)
"""Scheme, user, place, query and fragment. JSON may write each slash with a backslash before it."""
_CREDENTIALS: Final = re.compile(r"\b(Bearer|Api-Key|Basic) +(?=\S*[\d=])[\w.~+/=-]{8,}", re.IGNORECASE)
"""With a digit or a padding, unlike words of a language."""
_SECRET_FIELD: Final = re.compile(
    r'(?<!\w)("(?:[\w-]*[_-])?'
    r'(?:api_?key|authorization|password|secret|secret_key|(?:access|auth|dashboard|refresh)_token)"\s*:\s*)'
    r'"(?:[^"\\]|\\.)*"?',
    re.IGNORECASE,
)


def _without_secrets(url: re.Match[str]) -> str:
    scheme, user, place, query, fragment = url.groups()
    return (
        f"{scheme}{f'{REDACTED}@' if user else ''}{place}"
        f"{f'?{REDACTED}' if query else ''}{_fragment_without_token(fragment or '')}"
    )


def _fragment_without_token(fragment: str) -> str:
    before, is_there, _ = fragment.partition("token=")
    return f"{before}{is_there}{REDACTED}" if is_there else fragment


_PATTERNS: Final[tuple[tuple[tuple[str, ...], re.Pattern[str], _Replacement], ...]] = (
    (("http",), _URL, _without_secrets),
    (("bearer ", "api-key ", "basic "), _CREDENTIALS, rf"\1 {REDACTED}"),
    (("authorization", "key", "password", "secret", "_token"), _SECRET_FIELD, rf'\1"{REDACTED}"'),
)
"""What is looked for when one of some words is there, and what takes its place.

Searching a batch of 24 MiB for a pattern would hold all threads for half a second; a word is found much faster.
"""


class Redactor:
    """Masks secrets, among them one API key, in what is sent and received."""

    def __init__(self, key: str | None) -> None:
        spellings = (
            {key, json.dumps(key)[1:-1], quote(key, safe="")} if key and len(key) >= SHORTEST_KEY else set[str]()
        )
        self._spellings = sorted(spellings)

    @classmethod
    def of(cls, settings: Settings) -> Redactor:
        """Return that of a client."""
        return cls(settings.api_key.reveal() if settings.api_key else None)

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return headers as they may be written."""
        return {name: self._header(name.lower(), value) for name, value in headers.items()}

    def url(self, url: str, *, is_signed: bool = False) -> str:
        """Return the URL of a request: its query is kept, unless that `is_signed`."""
        if is_signed:
            return self.text(url)
        return self._without_key(PASSWORD.sub(f"{REDACTED}@", url))

    def text(self, text: str) -> str:
        """Return a body or a message; every absolute URL in it loses its query, since that may be a signature."""
        text = self._without_key(text)
        lowered = text.lower()
        for words, pattern, replacement in _PATTERNS:
            if any(word in lowered for word in words):
                text = pattern.sub(replacement, text)
        return text

    def _header(self, name: str, value: str) -> str:
        if name in SECRET_HEADERS:
            return REDACTED
        return self.text(_QUERY.sub(f"?{REDACTED}", value) if name == "location" else value)

    def _without_key(self, text: str) -> str:
        for spelling in self._spellings:
            text = text.replace(spelling, REDACTED)
        return text


def without_queries(text: str) -> str:
    """Mask the queries, also of a mere path, and the passwords of URLs."""
    return PASSWORD.sub("…@", _QUERY_OF_WORD.sub("?…", text))


def without_queries_in(value: Any) -> Any:
    """Mask them in all texts of a JSON value."""
    if isinstance(value, str):
        return without_queries(value)
    if is_list(value):
        return [without_queries_in(each) for each in value]
    if is_dict(value):
        return {without_queries(name): without_queries_in(each) for name, each in value.items()}
    return value

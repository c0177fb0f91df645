"""What is written down of requests and answers, without secrets: the one place of these rules.

Everything that stores whole requests or answers uses a `Redactor`: the request log and the cassettes of tests. Error
messages and repr need less; `Transport.clean` and `ApiKey.scrub` are for them.

Secrets are the API key wherever it appears, the headers that authorize or identify, users and passwords of URLs, the
queries of signed URLs, tokens in fragments, and the values of JSON fields that are named after a secret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

from .settings import Settings

REDACTED: Final = "[REDACTED]"

SECRET_HEADERS: Final = frozenset(
    {"authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "x-amz-security-token"}
)
SHORTEST_KEY: Final = 8
"""No service issues shorter keys; in tests they are ordinary words. In headers, they are masked all the same."""

_PASSWORD: Final = re.compile(r"(?<=://)[^\s/?#@\"'<>\\]*@")
_ABSOLUTE_QUERY: Final = re.compile(r"(https?:\\?/\\?/[^\s?#\"'<>]+\?)[^\s#\"'<>]+")
"""JSON may write each slash with a backslash before it."""
_FRAGMENT_TOKEN: Final = re.compile(r"(#token=)[^\s&\"'<>]+")
_SECRET_FIELD: Final = re.compile(
    r'("(?:\w*_)?(?:api_?key|authorization|password|secret|secret_key|(?:access|auth|dashboard|refresh)_token)"\s*:\s*)'
    r'"(?:[^"\\]|\\.)*"',
    re.IGNORECASE,
)


class Redactor:
    """Masks the secrets of one client in what it sends and receives."""

    def __init__(self, settings: Settings) -> None:
        key = settings.api_key.reveal() if settings.api_key else ""
        is_long = len(key) >= SHORTEST_KEY
        spellings = {key, json.dumps(key)[1:-1], quote(key, safe="")} if is_long else set[str]()
        self._key = re.compile("|".join(map(re.escape, sorted(spellings)))) if spellings else None

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return headers as they may be written."""
        return {
            name: REDACTED if name.lower() in SECRET_HEADERS else self.text(value) for name, value in headers.items()
        }

    def url(self, url: str, *, is_signed: bool = False) -> str:
        """Return the URL of a request: its query is kept, unless that `is_signed`."""
        if is_signed:
            return self.text(url)
        return self._without_key(_PASSWORD.sub(f"{REDACTED}@", url))

    def text(self, text: str) -> str:
        """Return a body or a message; every absolute URL in it loses its query, since that may be a signature."""
        text = _PASSWORD.sub(f"{REDACTED}@", text)
        text = _ABSOLUTE_QUERY.sub(rf"\g<1>{REDACTED}", text)
        text = _FRAGMENT_TOKEN.sub(rf"\g<1>{REDACTED}", text)
        text = _SECRET_FIELD.sub(rf'\g<1>"{REDACTED}"', text)
        return self._without_key(text)

    def _without_key(self, text: str) -> str:
        return self._key.sub(REDACTED, text) if self._key else text

"""Signed URLs: each gives access to one file, for a limited time and without a key."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable

from yarl import URL

__all__ = ["UrlSigner"]


class UrlSigner:
    """Signs URLs with HMAC-SHA256 over the path and the time of expiry."""

    def __init__(self, secret: bytes, *, valid_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._valid_seconds = valid_seconds
        self._clock = clock

    def sign(self, url: URL) -> URL:
        """Return `url` with its expiry and signature as the query."""
        expires = str(int(self._clock() + self._valid_seconds))
        return url.with_query(expires=expires, signature=self._signature(url.path, expires))

    def problem(self, url: URL) -> str | None:
        """Return why a signed URL is refused, None when it is valid."""
        expires, signature = url.query.get("expires", ""), url.query.get("signature", "")
        if not hmac.compare_digest(signature.encode(), self._signature(url.path, expires).encode()):
            return "the signature does not fit the URL"
        if self._clock() >= int(expires):
            return "the URL has expired; list the files again for a new one"
        return None

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._secret, f"{path}\n{expires}".encode(), hashlib.sha256).hexdigest()

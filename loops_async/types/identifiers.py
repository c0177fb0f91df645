"""Ids and URLs that a service gives: they are put into requests, so they are checked where they are decoded."""

from __future__ import annotations

from typing import Annotated, TypeAlias
from urllib.parse import SplitResult, urlsplit

from msgspec import Meta

GivenId: TypeAlias = Annotated[str, Meta(pattern=r"^[!-~]{1,256}\Z")]
"""An id that fits into a header: printable ASCII without spaces."""


def split_http_url(url: str) -> SplitResult | None:
    """Return the parts of an absolute HTTP URL; None of anything else."""
    if not url.isprintable() or " " in url:  # `urlsplit` drops line breaks silently
        return None
    try:
        parts = urlsplit(url)
        # The host is encoded as it is to be looked up, which fails for one with an empty or too long label.
        fits = parts.scheme in ("http", "https") and parts.port != 0 and bool((parts.hostname or "").encode("idna"))
    except ValueError:  # an address or a port that cannot be
        return None
    return parts if fits else None


def check_service_url(url: str | None) -> None:
    """Raise `ValueError` for a URL that a service gave and that cannot be requested; none at all is fine."""
    parts = split_http_url(url) if url else None
    if url and (parts is None or parts.username is not None):
        raise ValueError("Expected an absolute http or https URL without a user")

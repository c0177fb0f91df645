"""Checksums that file stores send in the headers of their answers."""

from __future__ import annotations

import binascii
import hashlib
import re
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct

_WORD: Final = re.compile(r"([\w-]+)=:?([A-Za-z0-9+/]+=*):?")
_ALGORITHMS: Final = {"sha-512": "sha512", "sha-256": "sha256", "md5": "md5"}
"""The names in lists of checksums, the strongest first."""

_LISTS: Final = ("Repr-Digest", "Digest", "x-goog-hash")
"""Headers that list checksums of the complete file: RFC 9530, RFC 3230, Google Cloud Storage."""

_SINGLE: Final = {"x-amz-checksum-sha256": "sha256", "x-ms-blob-content-md5": "md5"}
"""Headers that hold one checksum of the complete file: S3, Azure."""


class Checksum(Struct, frozen=True):
    """The expected hash of a file."""

    algorithm: str
    digest: bytes

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has this checksum."""
        with path.open("rb") as file:
            # Such checksums detect corrupted data, not forgery.
            found = hashlib.file_digest(file, lambda: hashlib.new(self.algorithm, usedforsecurity=False))
        return found.digest() == self.digest


def stated_checksum(headers: Mapping[str, str]) -> Checksum | None:
    """Return the strongest checksum of the complete file in the headers of an answer, which may be a partial one."""
    listed = {name.lower(): text for header in _LISTS for name, text in _WORD.findall(headers.get(header, ""))}
    stated = [(algorithm, listed[name]) for name, algorithm in _ALGORITHMS.items() if name in listed]
    stated += [(algorithm, headers[header]) for header, algorithm in _SINGLE.items() if header in headers]
    for algorithm, text in stated:
        try:
            digest = b64decode(text, validate=True)
        except binascii.Error:
            continue  # e.g. S3's checksum of checksums, "<base64>-<parts>"
        if len(digest) == hashlib.new(algorithm, usedforsecurity=False).digest_size:
            return Checksum(algorithm, digest)
    return None


def stated_version(headers: Mapping[str, str]) -> str:
    """Return what tells this version of a file from others byte by byte, as ``If-Range`` takes it; empty if nothing."""
    tag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag

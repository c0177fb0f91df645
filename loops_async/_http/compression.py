"""Decompressing answers in slices: no more than is wanted, and without holding the event loop."""

from __future__ import annotations

import zlib
from typing import Final

from .body import Pacer

ACCEPTED_ENCODINGS: Final = "gzip, deflate"

SLICE_BYTES: Final = 1 << 18
_AUTOMATIC: Final = zlib.MAX_WBITS | 32
"""Makes zlib tell gzip from its own format."""
_GZIP_MAGIC: Final = b"\x1f\x8b"


class CompressionError(ValueError):
    """A body is not what its content encoding says."""


async def decompressed(body: bytes, encoding: str, most: int) -> bytes:
    """Return what `body` is when decompressed; of more than `most` bytes, a little more than the first `most`.

    Raises:
        CompressionError: the encoding is none that is accepted, or the body is damaged or ends early.
    """
    name = encoding.strip().lower()
    if name in ("", "identity") or not body:
        return body
    if name not in ("gzip", "x-gzip", "deflate"):
        raise CompressionError(f"has the content encoding {encoding[:40]!r}, which was not accepted")
    # Some servers send "deflate" without the header of zlib, of which the low half of the first byte is 8.
    is_bare = name == "deflate" and body[0] & 0x0F != zlib.DEFLATED
    pieces: list[bytes] = []
    pacer = Pacer()
    try:
        while body and most >= 0:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS if is_bare else _AUTOMATIC)
            while not inflater.eof and most >= 0:
                pieces.append(inflater.decompress(body, SLICE_BYTES))
                body = inflater.unconsumed_tail
                most -= len(pieces[-1])
                if not pieces[-1] and not body and not inflater.eof:
                    raise CompressionError(f"ends early for {name}")
                await pacer.pause()
            # A gzip file may have several members; what follows the last of them is padding.
            body = inflater.unused_data if inflater.unused_data.startswith(_GZIP_MAGIC) else b""
    except zlib.error as problem:
        raise CompressionError(f"is not {name}: {problem}") from None
    return b"".join(pieces)

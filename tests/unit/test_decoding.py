"""JSON of others: a value, by strict rules for requests and tolerant ones for answers, or one short error."""

from __future__ import annotations

import gzip
import math
import zlib
from datetime import UTC, datetime, timedelta, timezone
from typing import Annotated, Any

import msgspec
import pytest
from msgspec import Meta, Raw, Struct

from loops_async._http.compression import SLICE_BYTES, CompressionError, decompressed
from loops_async._http.decoding import LONGEST_PROBLEM, UnreadableError, decode_answer, decode_json
from loops_async.types import Checkpoint, LogLine, Run, Sampler
from loops_async.types.identifiers import split_http_url

Time = Annotated[datetime, Meta(tz=True)]


class Inner(Struct, frozen=True):
    size: int = 3
    names: list[str] = []


class Outer(Struct):
    count: int
    inner: Inner = Inner()
    rows: list[Inner] = []
    by_name: dict[str, Inner] = {}
    note: str | None = None
    value: float | None = None
    either: Inner | str | None = None
    made: Time | None = None
    raw: Raw = Raw(b"null")


BAD = [
    b"",
    b"{",
    b"<html>",
    b'{"count": "x"}',
    b"[]",
    b'{"count": 1, "note": "\xf0\x9f"}',
    b'{"count": ' + b"9" * 5000 + b"}",
    b'{"count": 1, "other": ' + b"[" * 3000,
    b'{"count": NaN}',
    b'{"count": null}',
    b"\xff\xfe",
]


@pytest.mark.parametrize("decode", [decode_json, decode_answer])
@pytest.mark.parametrize("raw", BAD, ids=lambda raw: repr(raw[:40]))
def test_what_cannot_be_read_is_one_short_error(decode: Any, raw: bytes) -> None:
    with pytest.raises(UnreadableError) as unreadable:
        decode(raw, Outer)
    assert 0 < len(str(unreadable.value)) <= LONGEST_PROBLEM
    assert unreadable.value.__cause__ is None


def test_an_error_says_whether_it_was_json() -> None:
    for raw, is_json in ((b'{"count": "x"}', True), (b'{"count"', False)):
        with pytest.raises(UnreadableError) as unreadable:
            decode_json(raw, Outer)
        assert unreadable.value.is_json is is_json


def test_null_is_the_default_at_any_depth_of_an_answer() -> None:
    raw = b"""{"count": 1, "inner": null, "rows": [{"size": null, "names": ["a"]}], "by_name": {"x": {"size": null}},
        "either": {"names": null}, "note": null, "unknown": null}"""
    found = decode_answer(raw, Outer)
    assert found.rows == [Inner(names=["a"])]
    assert found.by_name == {"x": Inner()}
    assert found.inner == found.either == Inner()
    with pytest.raises(UnreadableError):
        decode_json(raw, Outer)


@pytest.mark.parametrize(
    ("sent", "seconds"),
    [
        ('"2026-06-24T18:20:39Z"', 0.0),
        ('"2026-06-24T18:20:39"', 0.0),
        ('"2026-06-24 20:20:39+0200"', 0.0),
        ('"20260624T182039Z"', 0.0),
        ('"2026-06-24T18:20:39.854123456Z"', 0.854123),
        ('"Wed, 24 Jun 2026 18:20:39 GMT"', 0.0),
        ('"Wednesday, 24-Jun-26 18:20:39 GMT"', 0.0),
        ('"Wed Jun 24 18:20:39 2026"', 0.0),
        ("1782325239", 0.0),
        ("1782325239854", 0.854),
    ],
)
def test_times_of_any_form_are_read(sent: str, seconds: float) -> None:
    made = decode_answer(f'{{"count": 1, "made": {sent}}}'.encode(), Outer).made
    assert made == datetime(2026, 6, 24, 18, 20, 39, tzinfo=UTC) + timedelta(seconds=seconds)


@pytest.mark.parametrize("sent", ['""', '"yesterday"', "true", "1e300", "[]"])
def test_an_optional_time_that_cannot_be_read_is_none_or_an_error(sent: str) -> None:
    raw = f'{{"count": 1, "made": {sent}}}'.encode()
    if sent == "[]":
        with pytest.raises(UnreadableError):
            decode_answer(raw, Outer)
    else:
        assert decode_answer(raw, Outer).made is None


def test_a_time_keeps_its_offset() -> None:
    made = decode_answer(b'{"count": 1, "made": "0001-01-01T00:00:00+14:00"}', Outer).made
    assert made == datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))


@pytest.mark.parametrize(
    ("timestamp", "read"),
    [
        ("1750789239854123456", datetime(2025, 6, 24, 18, 20, 39, 854123, tzinfo=UTC)),
        ("2025-06-24T18:20:39.854123Z", datetime(2025, 6, 24, 18, 20, 39, 854123, tzinfo=UTC)),
        ("2025-06-24T20:20:39+02:00", datetime(2025, 6, 24, 18, 20, 39, tzinfo=UTC)),
        ("2025-06-24 18:20:39", datetime(2025, 6, 24, 18, 20, 39, tzinfo=UTC)),
        *((text, datetime(1970, 1, 1, tzinfo=UTC)) for text in ("", "soon", "9" * 30, "9" * 5000, "-1e9")),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_time_of_a_log_line_is_read_in_any_form(timestamp: str, read: datetime) -> None:
    assert LogLine(timestamp=timestamp, message="").time == read


def test_nan_and_infinity_of_answers_are_numbers_also_in_what_is_decoded_later() -> None:
    found = decode_answer(b'{"count": 1, "value": -Infinity, "raw": {"value": NaN}}', Outer)
    assert found.value == -math.inf
    later = decode_answer(found.raw, dict[str, float])
    assert math.isnan(later["value"])


# --- ids and URLs ---

SAMPLER = {"id": "q", "base_url": "https://h/s", "base_model": "m", "created_at": "2026-06-24T18:20:39Z"}
RUN = {**SAMPLER, "id": "r", "session_id": "s"}
LONG_LABEL = "http://" + "a" * 70 + ".com"
URLS = ["http://[::1", "h!tp://x", "http://h:99999", LONG_LABEL, "http://u:p@h", "/x", "http://h\r\nX: 1"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(("kind", "fields"), [(Run, RUN), (Sampler, SAMPLER)], ids=["run", "sampler"])
def test_a_url_that_cannot_be_requested_is_refused(kind: Any, fields: dict[str, Any], url: str) -> None:
    raw = msgspec.json.encode({**fields, "base_url": url})
    with pytest.raises(UnreadableError, match="absolute http or https URL without a user"):
        decode_answer(raw, kind)


@pytest.mark.parametrize("identifier", ["", "a\r\nX-Evil: 1", "a b", "é", "x" * 257, "a\n"])
@pytest.mark.parametrize("name", ["id", "session_id", "deployment_id"])
def test_an_id_that_does_not_fit_into_a_header_is_refused(name: str, identifier: str) -> None:
    with pytest.raises(UnreadableError, match=rf"\$\.{name}"):
        decode_answer(msgspec.json.encode({**RUN, name: identifier}), Run)


def test_usual_urls_are_fine() -> None:
    for url in ("http://127.0.0.1:1/x", "HTTPS://h.example", "http://[::1]:80/a?b=c", "http://a_b.é.com", "http://h."):
        assert split_http_url(url) is not None
    assert decode_answer(b'{"run_id": "r", "checkpoint_id": "a b", "created_at": 1782325239}', Checkpoint).id == ""


# --- compression ---


def bare(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


DATA = b'{"a": 1}' * (SLICE_BYTES // 4)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(DATA)),
        (" GZIP ", gzip.compress(DATA[:10]) + gzip.compress(DATA[10:]) + b"\0" * 20),
        ("x-gzip", gzip.compress(DATA)),
        ("deflate", zlib.compress(DATA)),
        ("deflate", bare(DATA)),
        ("identity", DATA),
        ("", DATA),
    ],
)
async def test_encodings_are_undone(encoding: str, body: bytes) -> None:
    assert await decompressed(body, encoding, len(DATA)) == DATA


@pytest.mark.parametrize(
    ("encoding", "body"),
    [("br", b"x"), ("gzip, gzip", b"x"), ("gzip", b"plain"), ("gzip", gzip.compress(DATA)[:-9]), ("deflate", b"x")],
)
async def test_a_body_that_is_not_what_it_says_is_an_error(encoding: str, body: bytes) -> None:
    with pytest.raises(CompressionError):
        await decompressed(body, encoding, len(DATA))


async def test_a_bomb_is_not_decompressed_whole() -> None:
    bomb = gzip.compress(bytes(100 << 20))
    assert len(await decompressed(bomb, "gzip", 1 << 20)) <= (1 << 20) + SLICE_BYTES

"""Answers that no service should give: what is changed in a true one, as hypothesis draws it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from aiohttp import web
from hypothesis import strategies as st
from msgspec import Struct

# As bytes of JSON, since some of them are none, or are no value of Python.
VALUES = (
    *(b"null", b"true", b"-1", b"0", b"1.5", b"-0.0", b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1e-999"),
    *(b"9223372036854775808", b"-9223372036854775809", b"9" * 400, b"9" * 5000, b"1E400"),
    *(b'""', b'"x"', b'" "', b'"NaN"', b'"1"', b'"' + b"x" * 100_000 + b'"'),
    *(rb'"\ud800"', rb'"\u0000"', rb'"\u001b[2J"', rb'"\u202e"', b'"\xff\xfe"', b'"Gr\xf6\xdfe"', rb'"\uD83D\uDE00"'),
    *(
        b"[]",
        b"{}",
        b"[null]",
        b'{"a":{}}',
        b"[" * 3000,
        b"[" * 2000 + b"]" * 2000,
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
    ),
    *(b'"2026-13-45T99:99:99Z"', b'"2026-06-24"', b'"0001-01-01T00:00:00+23:59"', b'"9999-12-31T23:59:59-23:59"'),
    *(
        b'"http://"',
        b'"http://[::1"',
        b'"http://' + b"a" * 70 + b'.com"',
        b'"ftp://x"',
        b'"//x"',
        b'"http://127.0.0.1:99999"',
    ),
    *(b'"bt://"', b'"bt://loops:r/weights/x"', b'"../../etc/passwd"', b'"/abs"', b'"a\\u0000b"', b'"CON"', b'"a?b#c"'),
    *(b'"done"', b'"error"', b'"pending"', b'"token_id:1"', b'"token_id:x"', b'"ACTIVE"', b'"FAILED"'),
)
BODIES = (
    *(
        b"",
        b" ",
        b"null",
        b"[]",
        b"{}",
        b'"x"',
        b"0",
        b"nope",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"[" * 5000,
        b"{" * 5000,
    ),
    *(b"<html><body>Bad Gateway</body></html>", b'{"error": "' + b"x" * 100_000 + b'"}', b'{"error": "Gr\xf6\xdfe"}'),
    *(b'{"error": {"message": null}}', b'{"message": 7, "code": [], "details": "x"}', b'{"details": {"reason": {}}}'),
    b'{"status": "error", "error": {"error_class": 7}}',
)
HEADERS = {
    "Retry-After": ("0", "-1", "nan", "inf", "1e400", "9" * 5000, "Mon, 01 Jan 99999999999 00:00:00 GMT", "soon", ""),
    "Content-Type": (
        "",
        "text/html",
        "application/json; charset=utf-7",
        "application/json; charset=nope",
        ";;;",
        "x/y/z",
    ),
    "Content-Encoding": ("gzip", "deflate", "br", "zstd", "identity", "nope"),
    "x-trainers-policy-version": ("", "-1", "1.5", "x", "9" * 5000, "1e3", "\u00b2", " 1 "),
    "X-Request-Id": ("", "x" * 5000, "\u202e"),
    "X-Baseten-Error-Source": ("06", "01", "x"),
    "X-Baseten-Error-Code": ("631", "x" * 5000),
    "Location": ("http://[::1", "/elsewhere", ""),
    "ETag": ("", '"', 'W/"x"', "x" * 5000),
    "Content-Range": ("bytes */1", "bytes 5-1/0", "x", "bytes 0-" + "9" * 5000 + "/*"),
    "x-amz-checksum-sha256": ("", "x", "AAAA", "\u00e9"),
}
STATUSES = (200, 201, 202, 204, 206, 301, 304, 307, 400, 401, 403, 404, 405, 408, 409, 410, 413, 416, 418, 422, 429)
STATUSES_5XX = (500, 501, 502, 503, 504, 520, 599)


class NewBody(Struct, frozen=True):
    """Another body."""

    body: bytes

    def apply(self, answer: web.Response) -> web.Response:
        return _with(answer, body=self.body)


class NewValue(Struct, frozen=True):
    """One value of the JSON is another one; the `place`-th of all, counted around."""

    place: int
    value: bytes

    def apply(self, answer: web.Response) -> web.Response:
        return _in_json(answer, self.place, lambda within, key: within.__setitem__(key, _MARK), self.value)


class NoValue(Struct, frozen=True):
    """One value of the JSON is not there."""

    place: int

    def apply(self, answer: web.Response) -> web.Response:
        return _in_json(answer, self.place, lambda within, key: within.__delitem__(key))


class OtherBytes(Struct, frozen=True):
    """Bytes are other ones: at `place`, `removed` many are replaced by `inserted`."""

    place: int
    removed: int
    inserted: bytes

    def apply(self, answer: web.Response) -> web.Response:
        body = _body(answer)
        begin = self.place % (len(body) + 1)
        return _with(answer, body=body[:begin] + self.inserted + body[begin + self.removed :])


class NewStatus(Struct, frozen=True):
    """Another status."""

    status: int

    def apply(self, answer: web.Response) -> web.Response:
        return _with(answer, status=self.status)


class NewHeader(Struct, frozen=True):
    """Another value of a header."""

    name: str
    value: str

    def apply(self, answer: web.Response) -> web.Response:
        return _with(answer, headers={self.name: self.value})


Mutation: TypeAlias = NewBody | NewValue | NoValue | OtherBytes | NewStatus | NewHeader

_places = st.integers(0, 60)
mutations: st.SearchStrategy[Mutation] = st.one_of(
    st.builds(NewValue, _places, st.sampled_from(VALUES)),
    st.builds(NewValue, _places, st.sampled_from(VALUES)),
    st.builds(NoValue, _places),
    st.builds(NewBody, st.sampled_from(BODIES) | st.binary(max_size=50)),
    st.builds(OtherBytes, st.integers(0, 2000), st.integers(0, 100), st.binary(max_size=5)),
    st.builds(NewStatus, st.sampled_from(STATUSES) | st.sampled_from(STATUSES_5XX)),
    st.sampled_from(sorted(HEADERS)).flatmap(
        lambda name: st.builds(NewHeader, st.just(name), st.sampled_from(HEADERS[name]))
    ),
)

_MARK = "@@here@@"


def _in_json(answer: web.Response, place: int, change: Callable[[Any, Any], None], value: bytes = b"") -> web.Response:
    """Change one value of a JSON body; a body that is none stays as it is."""
    try:
        parsed = json.loads(_body(answer))
    except (ValueError, RecursionError):
        return answer
    around = [parsed]
    places = list(_places_in(around))
    change(*places[place % len(places)])
    text = json.dumps(around[0] if around else None).encode()
    return _with(answer, body=text.replace(f'"{_MARK}"'.encode(), value))


def _places_in(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each place of a value as what it is in and its key there."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places_in(node[key])


def _body(answer: web.Response) -> bytes:
    return answer.body if isinstance(answer.body, bytes) else b""


def _with(
    answer: web.Response, *, body: bytes | None = None, status: int | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    kept = {name: value for name, value in answer.headers.items() if name.lower() != "content-length"}
    return web.Response(
        body=_body(answer) if body is None else body,
        status=status or answer.status,
        headers={**kept, **(headers or {})},
    )

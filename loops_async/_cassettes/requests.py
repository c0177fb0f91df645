"""When a request is one that was recorded, and how it differs from it if it is not."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from msgspec import UNSET, Struct

from .._http.messages import Request
from .._http.redaction import Redactor
from .._kinds import is_dict, is_list
from .file import RecordedRequest

MOST_DIFFERENCES: Final = 8
LONGEST_VALUE: Final = 80

_ID: Final = re.compile(
    r"(?<![0-9a-f])(?:[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|local-[0-9a-f]{8})(?![0-9a-f])"
)
"""Ids as the client draws them: idempotency keys, the unique part of a checkpoint's name, runs of local mode."""


class Signature(Struct, frozen=True):
    """A request, reduced to what must be equal: `text` with all ids of that form taken out, and these `ids`."""

    text: str
    ids: tuple[str, ...]


def recorded(request: Request, redactor: Redactor) -> RecordedRequest:
    """Return a request as it is written: without secrets."""
    written = RecordedRequest(
        method=request.method,
        url=redactor.url(request.url, is_signed=request.has_signed_url),
        headers=redactor.headers(request.headers),
    )
    written.put_json(redactor.text(request.content.decode("utf-8", "replace")))
    return written


def ids_in(text: str) -> list[str]:
    """Return all ids of the form that the client draws."""
    return _ID.findall(text)


class Rules:
    """How requests are compared while one cassette is played.

    An id that no recorded answer gave is one that the client drew, so any other fits it. From then on, that id stands
    for the recorded one.
    """

    def __init__(self, base_url: str, given: frozenset[str]) -> None:
        self._base_url = base_url
        self._given = given
        self._stands_for: dict[str, str] = {}

    def signature(self, request: RecordedRequest, base_url: str) -> Signature:
        """Return the signature of a request of the client of the service at `base_url`."""
        headers = sorted(f"{name.lower()}: {value}" for name, value in request.headers.items())
        body = "" if request.body is UNSET else json.dumps(request.body, sort_keys=True)
        place = f"{request.method} {self.place(request.url, base_url)}"
        text = "\n".join([place, *headers, body or request.text or ""])
        ids = tuple(self._stands_for.get(each, each) for each in ids_in(text))
        return Signature(_ID.sub("<id>", text), ids)

    def place(self, url: str, base_url: str) -> str:
        """Return a URL with "<service>" for the address of the service, which may be another one now."""
        for base in (base_url, self._base_url):
            if url.startswith(f"{base}/"):
                return f"<service>{url[len(base) :]}"
        return url

    def fits(self, asked: Signature, written: Signature) -> bool:
        """Whether a request is the recorded one, apart from ids that the client drew."""
        pairs = zip(asked.ids, written.ids, strict=True)
        return all(own == other or own not in self._given for own, other in pairs)

    def learn(self, asked: Signature, written: Signature) -> None:
        """Let the ids of a request stand for those of the recorded one."""
        self._stands_for.update(zip(asked.ids, written.ids, strict=True))


def nearest(
    asked: RecordedRequest, written: Sequence[RecordedRequest], rules: Rules, base_url: str
) -> tuple[int, list[str]] | None:
    """Return the index of the recorded request that is most like `asked`, and how they differ."""
    own = _name(asked, rules, base_url)
    names = [_name(each, rules, base_url) for each in written]
    close = [own] if own in names else difflib.get_close_matches(own, names, n=1, cutoff=0.0)
    found = [(index, _differences(each, asked)) for index, each in enumerate(written) if names[index] in close]
    return min(found, key=lambda pair: len(pair[1]), default=None)


def shown(differences: Sequence[str]) -> str:
    """Return the first differences, a line for each."""
    more = len(differences) - MOST_DIFFERENCES
    lines = [*differences[:MOST_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])]
    return "\n".join(f"    {line}" for line in lines)


def _name(request: RecordedRequest, rules: Rules, base_url: str) -> str:
    return _ID.sub("<id>", f"{request.method} {urlsplit(rules.place(request.url, base_url)).path}")


def _differences(written: RecordedRequest, asked: RecordedRequest) -> list[str]:
    old, new = _leaves_of(written), _leaves_of(asked)
    return [
        f"{path}: recorded {_value(old, path)}, asked {_value(new, path)}"
        for path in dict.fromkeys([*new, *old])
        if _ID.sub("<id>", _value(old, path)) != _ID.sub("<id>", _value(new, path))
    ]


def _leaves_of(request: RecordedRequest) -> dict[str, Any]:
    leaves: dict[str, Any] = {"method": request.method}
    parts = urlsplit(request.url)
    leaves["path"], leaves["query"] = parts.path, parts.query
    leaves.update((f"header {name.lower()}", value) for name, value in request.headers.items())
    leaves.update(_leaves("body", (request.text or "") if request.body is UNSET else request.body))
    return leaves


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if is_dict(value) and value:
        for name, each in value.items():
            yield from _leaves(f"{path}.{name}", each)
    elif is_list(value) and value:
        for index, each in enumerate(value):
            yield from _leaves(f"{path}[{index}]", each)
    else:
        yield path, value


def _value(leaves: Mapping[str, Any], path: str) -> str:
    if path not in leaves:
        return "nothing"
    text = json.dumps(leaves[path], ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"

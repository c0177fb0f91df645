"""Answers that are nearly right: an answer with some of its values, and some of its bytes, replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, TypeAlias

from hypothesis import strategies as st

Place: TypeAlias = tuple[Any, Any]
"""A list or a dict, and the index or the key of one of its values."""

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([[], {}, [None], "a\r\nX: 1", "x" * 5000, "\ud800", -1, 1e308, 10**400, "http://[::1", "NaN"]),
)
BYTES = st.sampled_from(
    [
        b"",
        b"\xff",
        b"\xf0\x9f",
        b"\x00",
        b"[" * 3000,
        b'{"a":' * 3000,
        b"9" * 5000,
        b"NaN",
        b"-Infinity",
        b'"\\ud83d"',
        b"}",
    ]
)


@st.composite
def mutated(draw: st.DrawFn, answer: Any) -> bytes:
    """Draw JSON that is `answer` but for up to two values, and up to one run of bytes."""
    value = deepcopy(answer)
    for _ in range(draw(st.integers(0, 2))):
        places = list(_places(value))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        if draw(st.booleans()):
            holder[key] = deepcopy(draw(VALUES))  # it may be mutated, too
        else:
            del holder[key]
    raw = json.dumps(value).encode()
    if draw(st.booleans()):
        start = draw(st.integers(0, len(raw)))
        raw = raw[:start] + draw(BYTES) + raw[start + draw(st.integers(0, 3)) :]
    return raw


def _places(value: Any) -> Iterator[Place]:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])

"""Checkpoint URIs: what parses, what does not, and that both directions agree."""

from __future__ import annotations

import pickle
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loops_async import InputError
from loops_async.protocol import CheckpointUri, check_checkpoint_name

run_ids = st.text("abcdefXYZ0189_-", min_size=1, max_size=20)
kinds = st.sampled_from(["weights", "sampler_weights"])
names = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/\\"), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)


@given(run_ids, kinds, names)
def test_round_trip(run_id: str, kind: Any, name: str) -> None:
    uri = CheckpointUri(run_id, kind, name)
    assert CheckpointUri.parse(str(uri)) == uri
    assert CheckpointUri.parse(f"{uri}/") == uri, "some services end a path with a slash"
    assert CheckpointUri.parse(str(uri), kind=kind) == uri


@given(st.text())
@example("bt://loops:run/weights/..")
@example("bt://loops:run/weights/a\x00b")
@example("bt://loops:run/weights/a\nb")
@example("bt://loops:run/weights/a\\b")
@example("bt://loops:run/weights/a\n")
def test_whatever_parses_is_safe_and_says_what_was_given(text: str) -> None:
    with suppress(InputError):
        uri = CheckpointUri.parse(text)
        assert str(uri) == text.removesuffix("/")
        assert check_checkpoint_name(uri.name) == uri.name
        assert not set(uri.name) & set("/\\\0\r\n")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "bt://loops:run/weights/",
        "bt://loops:run/weights",
        "bt://loops:/weights/x",
        "bt://loops:a b/weights/x",
        "bt://loops:../weights/x",
        "bt://loops:run/other/x",
        "bt://loops:run/weights/a/b",
        "bt://loops:run/weights/.",
        "bt://loops:run/weights//",
        "BT://loops:run/weights/x",
        "tinker://run/weights/x",
        "s3://bucket/weights/x",
        " bt://loops:run/weights/x",
        "bt://loops:run/weights/" + "x" * 256,
        None,
        5,
        b"bt://loops:run/weights/x",
    ],
    ids=repr,
)
def test_refused(uri: Any) -> None:
    with pytest.raises(InputError) as refused:
        CheckpointUri.parse(uri, path="model_path")
    assert refused.value.path == "model_path"


def test_the_wrong_kind_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="must be a 'sampler_weights' checkpoint"):
        CheckpointUri.parse("bt://loops:run/weights/x", kind="sampler_weights")


def test_a_value() -> None:
    uri = CheckpointUri("run", "weights", "x")
    assert pickle.loads(pickle.dumps(uri)) == uri
    assert hash(uri) == hash(CheckpointUri("run", "weights", "x"))

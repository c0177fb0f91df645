"""What may be written of requests and answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loops_async._http.redaction import REDACTED, Redactor
from loops_async._http.settings import resolve_settings

KEY = 'secret"key-%\\0123'


@pytest.fixture
def redactor() -> Redactor:
    return Redactor.of(resolve_settings(api_key=KEY))


@pytest.mark.parametrize("name", ["Authorization", "proxy-authorization", "COOKIE", "Set-Cookie", "X-Api-Key"])
def test_headers_that_authorize_are_masked_and_others_are_kept(redactor: Redactor, name: str) -> None:
    assert redactor.headers({name: "Bearer other", "X-Run-Id": "run-1"}) == {name: REDACTED, "X-Run-Id": "run-1"}


def test_header_values_lose_signatures(redactor: Redactor) -> None:
    masked = redactor.headers({"Location": "https://store.test/file?signature=abc"})

    assert masked == {"Location": f"https://store.test/file?{REDACTED}"}


@pytest.mark.parametrize("written", [KEY, json.dumps(KEY), "secret%22key-%25%5C0123"])
def test_the_key_is_masked_in_each_spelling(redactor: Redactor, written: str) -> None:
    text = redactor.text(f"the key {written} was refused")

    assert "key-" not in text
    assert REDACTED in text


def test_a_key_as_short_as_a_word_is_no_secret() -> None:
    assert Redactor("key").text('{"key": 1}') == '{"key": 1}'


def test_the_query_of_a_request_is_kept_unless_it_is_signed(redactor: Redactor) -> None:
    url = "https://loops.test/v1/loops/runs?page_size=3"

    assert redactor.url(url) == url
    assert redactor.url(url, is_signed=True) == f"https://loops.test/v1/loops/runs?{REDACTED}"


def test_user_and_password_of_a_url_are_masked(redactor: Redactor) -> None:
    assert redactor.url("https://me:word@loops.test/runs") == f"https://{REDACTED}@loops.test/runs"


@pytest.mark.parametrize("slash", ["/", "\\/"])
def test_signed_urls_in_a_body_keep_their_path_only(redactor: Redactor, slash: str) -> None:
    body = '{"url":"https:~~store.test~a.bin?expires=1\\u0026signature=abc","size":4}'.replace("~", slash)

    masked = redactor.text(body)

    assert json.loads(masked) == {"url": f"https://store.test/a.bin?{REDACTED}", "size": 4}


def test_a_relative_place_loses_its_query_too(redactor: Redactor) -> None:
    assert redactor.headers({"location": "/file?signature=abc"}) == {"location": f"/file?{REDACTED}"}


@pytest.mark.parametrize("text", ["Bearer abcdefg1", "authorization: api-key abc.def-123", "basic dXNlcjpwYXNz=="])
def test_credentials_in_text_are_masked(redactor: Redactor, text: str) -> None:
    assert redactor.text(text) == f"{text.rpartition(' ')[0]} {REDACTED}"


def test_a_token_in_a_fragment_is_masked(redactor: Redactor) -> None:
    assert redactor.text("http://127.0.0.1/dashboard#token=abc") == f"http://127.0.0.1/dashboard#token={REDACTED}"


@pytest.mark.parametrize("name", ["api_key", "wandb_api_key", "password", "access_token", "client_secret"])
def test_fields_that_are_named_after_a_secret_are_masked(redactor: Redactor, name: str) -> None:
    assert json.loads(redactor.text(json.dumps({name: 'a"b\\', "x": "y"}))) == {name: REDACTED, "x": "y"}


@pytest.mark.parametrize(
    "value",
    [
        {"token": "the", "tokens": [1, 2]},
        {"text": "who? me?"},
        {"text": "a basic understanding of bearer instruments"},
        {"next_page_token": "7"},
    ],
)
def test_other_text_is_kept(redactor: Redactor, value: dict[str, Any]) -> None:
    text = json.dumps(value)

    assert redactor.text(text) == text

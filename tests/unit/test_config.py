"""Arguments against environment, what is refused, and that a key stays where it belongs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from loops_async import ConfigError, ServiceClient
from loops_async._http.settings import ApiKey, resolve_settings

KEY = "secret-key-123456"


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", "from-environment")
    monkeypatch.setenv("LOOPS_BASE_URL", "https://environment.example")
    monkeypatch.setenv("LOOPS_REUSE_FROM_SESSION_ID", "session-of-environment")
    monkeypatch.setenv("BT_LOOPS_MAX_CONNECTIONS", "7")
    from_environment = resolve_settings()
    assert from_environment.base_url == "https://environment.example"
    assert from_environment.authorization == {"Authorization": "Bearer from-environment"}
    assert from_environment.reuse_from_session_id == "session-of-environment"
    assert from_environment.max_connections == 7

    given = resolve_settings(api_key=KEY, base_url="https://given.example/", reuse_from_session_id="given")
    assert given.base_url == "https://given.example"
    assert given.authorization == {"Authorization": f"Bearer {KEY}"}
    assert given.reuse_from_session_id == "given"


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BASETEN_API_KEY", "LOOPS_BASE_URL", "LOOPS_REUSE_FROM_SESSION_ID", "BT_LOOPS_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "")  # as good as unset
    monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    settings = resolve_settings(api_key=KEY)
    assert settings.base_url == "https://api.baseten.co"
    assert settings.reuse_from_session_id is None
    assert settings.max_connections == 2048


@pytest.mark.parametrize(("open_files", "connections"), [(256, 192), (1024, 768), (1 << 20, 2048)])
def test_connections_leave_room_for_other_files(
    monkeypatch: pytest.MonkeyPatch, open_files: int, connections: int
) -> None:
    monkeypatch.delenv("BT_LOOPS_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr("resource.getrlimit", lambda _: (open_files, 1 << 20))
    assert resolve_settings(api_key=KEY).max_connections == connections


def test_without_a_key_a_base_url_is_enough() -> None:
    assert resolve_settings(base_url="http://localhost:8000").authorization == {}


def test_neither_key_nor_url_says_how_to_get_either() -> None:
    with pytest.raises(ConfigError, match=r"BASETEN_API_KEY.*loops-local serve"):
        ServiceClient()


def test_the_other_authorization_scheme() -> None:
    assert resolve_settings(api_key=KEY, auth_scheme="Api-Key").authorization == {"Authorization": f"Api-Key {KEY}"}
    with pytest.raises(ConfigError, match="'Bearer' or 'Api-Key'; got 'Basic'"):
        ServiceClient(api_key=KEY, auth_scheme="Basic")


@pytest.mark.parametrize("key", ["", " ", "a b", f"{KEY}\n", f"{KEY}\r\n", "schlüssel", "\t", b"bytes", 5], ids=repr)
def test_bad_keys(key: Any) -> None:
    with pytest.raises(ConfigError, match="api_key") as refused:
        ServiceClient(api_key=key)
    assert KEY not in str(refused.value), "a key with a stray newline is still a key"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.baseten.co",
        "localhost:8000",
        "ftp://api.baseten.co",
        "https://",
        "https:///path",
        "http://[::1",
        "http://host:port",
        "http://host:99999",
        "http://host?key=1",
        "http://host#part",
        "http://user:password@host",
        5,
        b"http://host",
    ],
    ids=repr,
)
def test_bad_urls(url: Any) -> None:
    with pytest.raises(ConfigError, match="base_url") as refused:
        ServiceClient(api_key=KEY, base_url=url)
    assert "password" not in str(refused.value)
    with pytest.raises(ConfigError, match="sampler_url"):
        ServiceClient.local(trainer_url="http://localhost:1", sampler_url=url)


@pytest.mark.parametrize("count", ["0", "-1", "many", "1.5"])
def test_bad_connection_counts(monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    monkeypatch.setenv("BT_LOOPS_MAX_CONNECTIONS", count)
    with pytest.raises(ConfigError, match=f"BT_LOOPS_MAX_CONNECTIONS.*{count}"):
        ServiceClient(api_key=KEY)


def test_a_key_shows_itself_nowhere() -> None:
    settings = resolve_settings(api_key=KEY)
    client = ServiceClient(api_key=KEY, base_url="http://localhost:1")
    for shown in (ApiKey(KEY), settings, client):
        assert KEY not in repr(shown)
        assert KEY not in str(shown)
    assert KEY not in f"{vars(client)}"


@pytest.mark.parametrize("leave", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_key_is_never_pickled(leave: Any) -> None:
    with pytest.raises(TypeError, match="never pickled") as refused:
        leave(resolve_settings(api_key=KEY))
    assert KEY not in str(refused.value)


def test_scrub() -> None:
    assert ApiKey(KEY).scrub(f"the key {KEY} is wrong") == "the key *** is wrong"


def test_an_unknown_availability_is_refused() -> None:
    with pytest.raises(ConfigError, match="availability_model must be 'dedicated' or 'spot'; got 'cheap'"):
        ServiceClient(api_key=KEY, availability_model="cheap")

"""Which proxy a request goes through, where names are looked up, and where a key may go."""

from __future__ import annotations

import asyncio
import ssl
import threading
from typing import Any

import pytest

from loops_async import ConfigError, ServiceClient
from loops_async._http.network import Proxies, Resolver, tls_context
from loops_async._http.settings import Proxy, Settings, is_loopback, resolve_settings
from tests.support.patience import PATIENCE_SECONDS

KEY = "secret-key-123456"
PROXY = "http://proxy.example:3128"


# --- proxies ---


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "https://api.example", None),
        ({"HTTPS_PROXY": PROXY}, "https://api.example/x", PROXY),
        ({"https_proxy": PROXY}, "https://api.example/x", PROXY),
        ({"HTTPS_PROXY": PROXY}, "http://api.example", None),
        ({"HTTP_PROXY": PROXY}, "http://api.example", PROXY),
        ({"ALL_PROXY": PROXY}, "https://api.example", PROXY),
        ({"HTTPS_PROXY": "proxy.example:3128"}, "https://api.example", PROXY),
        ({"HTTPS_PROXY": "socks5://proxy.example:1080"}, "https://api.example", None),
        ({"HTTPS_PROXY": ""}, "https://api.example", None),
    ],
    ids=str,
)
def test_proxies_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str, proxy: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Proxies(None).for_url(url) == proxy


@pytest.mark.parametrize(
    ("excepted", "is_direct"),
    [
        ("", False),
        ("*", True),
        ("api.example", True),
        ("API.example", True),
        (".example", True),
        ("*.example", True),
        ("example", True),
        ("pi.example", False),
        ("other.example, api.example", True),
        ("api.example:443", False),
        ("api.example:8443", True),
        ("10.0.0.0/8", False),
    ],
)
@pytest.mark.parametrize("given", [None, Proxy(PROXY)], ids=["environment", "argument"])
def test_exceptions(monkeypatch: pytest.MonkeyPatch, given: Proxy | None, excepted: str, is_direct: bool) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", excepted)
    assert (Proxies(given).for_url("https://api.example:8443/x") is None) is is_direct


@pytest.mark.parametrize(
    ("url", "is_direct"), [("https://a.example/x", True), ("http://a.example/x", False), ("https://b.example", False)]
)
def test_an_exception_with_the_usual_port(monkeypatch: pytest.MonkeyPatch, url: str, is_direct: bool) -> None:
    monkeypatch.setenv("NO_PROXY", "a.example:443,b.example:80")
    assert (Proxies(Proxy(PROXY)).for_url(url) is None) is is_direct


@pytest.mark.parametrize(("host", "is_direct"), [("10.1.2.3", True), ("11.1.2.3", False), ("[fd00::1]", True)])
def test_networks_are_exceptions(monkeypatch: pytest.MonkeyPatch, host: str, is_direct: bool) -> None:
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,fd00::/8")
    assert (Proxies(Proxy(PROXY)).for_url(f"https://{host}/x") is None) is is_direct


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "[::1]", "0.0.0.0", "a.localhost"])
def test_this_machine_is_never_behind_a_proxy(host: str) -> None:
    assert is_loopback(host.strip("[]"))
    assert Proxies(Proxy(PROXY)).for_url(f"http://{host}:8000/x") is None


def test_the_password_of_a_proxy_shows_itself_nowhere() -> None:
    proxy = "http://user:pa55word@proxy.example:3128"
    settings = resolve_settings(api_key=KEY, proxy=proxy)
    client = ServiceClient(api_key=KEY, proxy=proxy)
    for shown in (repr(settings), str(settings.proxy), repr(client), f"{vars(client)}"):
        assert "pa55word" not in shown
    assert Proxies(settings.proxy).for_url("https://api.example") == proxy
    with pytest.raises(ConfigError, match="proxy must be") as refused:
        ServiceClient(api_key=KEY, proxy=proxy.replace("http:", "socks5:"))
    assert "pa55word" not in str(refused.value)


# --- keys ---


@pytest.mark.parametrize("url", ["http://localhost:1", "http://127.0.0.1:1", "http://[::1]:1", "https://api.example"])
def test_where_a_key_may_go(url: str) -> None:
    assert resolve_settings(api_key=KEY, base_url=url).base_url == url


@pytest.mark.parametrize("url", ["http://api.example", "HTTP://10.0.0.5:8000", "http://localhost.example"])
def test_a_key_is_not_sent_unencrypted_unless_that_is_allowed(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(ConfigError, match="LOOPS_ALLOW_HTTP=1"):
        ServiceClient(api_key=KEY, base_url=url)
    assert resolve_settings(api_key=KEY, base_url=url, allow_http=True).allow_http
    assert resolve_settings(base_url=url).authorization == {}, "without a key there is nothing to protect"
    monkeypatch.setenv("LOOPS_ALLOW_HTTP", "1")
    assert resolve_settings(api_key=KEY, base_url=url).allow_http
    with pytest.raises(ConfigError, match="plain http"):
        resolve_settings(api_key=KEY, base_url=url, allow_http=False)


def test_what_a_service_says_does_not_take_encryption_away() -> None:
    settings = resolve_settings(api_key=KEY, base_url="https://api.example", allow_http=True)
    with pytest.raises(ConfigError, match=r"the sampler is a plain http URL \(host sampler.example\)"):
        settings.check_key_may_go_to("http://sampler.example/x", "the sampler")
    settings.check_key_may_go_to("https://sampler.example/x", "the sampler")
    Settings(base_url="https://api.example", api_key=None).check_key_may_go_to("http://sampler.example", "the sampler")


def test_the_variable_is_a_yes_or_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPS_ALLOW_HTTP", "perhaps")
    with pytest.raises(ConfigError, match="LOOPS_ALLOW_HTTP must be 1 or 0; got 'perhaps'"):
        ServiceClient(api_key=KEY)


# --- URLs ---


@pytest.mark.parametrize("around", ["{}\n", " {}\r\n", "{}/", "{}/\n", "{}// "])
def test_white_space_and_slashes_around_a_url_are_forgiven(around: str) -> None:
    url = "https://api.example/loops"
    assert resolve_settings(api_key=KEY, base_url=around.format(url)).base_url == url


@pytest.mark.parametrize("url", ["https://api.example/v1/loops", "https://api.example/v1/loops/"])
def test_the_path_of_the_api_is_not_part_of_the_base_url(url: str) -> None:
    with pytest.raises(ConfigError, match="remove /v1/loops"):
        ServiceClient(api_key=KEY, base_url=url)


@pytest.mark.parametrize("url", ["https://api. example", "https://api.example\r\nX: y", "https://a:pa55word@b c"])
def test_white_space_within_a_url_is_not(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url must be") as refused:
        ServiceClient(api_key=KEY, base_url=url)
    assert "pa55word" not in str(refused.value)


# --- names and certificates ---


async def test_names_are_looked_up_while_the_threads_of_the_loop_are_busy() -> None:
    go = threading.Event()
    busy = [asyncio.create_task(asyncio.to_thread(go.wait, PATIENCE_SECONDS)) for _ in range(64)]
    await asyncio.sleep(0)
    resolver = Resolver()
    found = await resolver.resolve("localhost", 80)
    assert not any(task.done() for task in busy)
    assert {"127.0.0.1"} <= {place["host"] for place in found}
    assert {place["port"] for place in found} == {80}
    go.set()
    await asyncio.gather(*busy)
    await resolver.close()


async def test_closing_a_resolver_leaves_no_thread() -> None:
    resolver = Resolver()
    await resolver.resolve("localhost", 80)
    await resolver.close()
    for thread in threading.enumerate():
        if thread.name.startswith("loops_async"):
            await asyncio.to_thread(thread.join, PATIENCE_SECONDS)
            assert not thread.is_alive()


def test_certificates_are_those_that_the_environment_names_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    before = tls_context()
    assert tls_context() is before
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    after = tls_context()
    assert after is not before
    assert after.verify_mode is ssl.CERT_REQUIRED
    assert after.check_hostname
    assert not after.get_ca_certs()


def test_a_key_may_go_unencrypted_to_a_proxy_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:3128")
    assert resolve_settings(api_key=KEY, base_url="http://loops.example").base_url == "http://loops.example"
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    with pytest.raises(ConfigError, match="plain http"):
        resolve_settings(api_key=KEY, base_url="http://loops.example")

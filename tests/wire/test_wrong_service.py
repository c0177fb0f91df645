"""Whatever else may be at the other end: one readable error that says what to do, and never a secret."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from loops_async import (
    AuthenticationError,
    ConfigError,
    ConnectError,
    LoopsError,
    ProtocolError,
    RequestTimeoutError,
    ServiceClient,
)
from loops_async._http import transport as transport_module
from loops_async._http.settings import ApiKey, Settings
from loops_async._http.transport import Request, Transport
from tests.clock import Clock
from tests.wire.conftest import KEY
from tests.wire.scripted import Hold, Say, ScriptedService, hang_up, hang_up_in_the_body
from tests.wire.secrecy import all_that_it_shows

SESSIONS = "/v1/loops/sessions"
SIGNED = "X-Signature=5ecret5ignature&X-Expires=60"


async def open_error(url: str) -> LoopsError:
    with pytest.raises(LoopsError) as raised:
        await ServiceClient(api_key=KEY, base_url=url).open()
    return raised.value


def assert_readable(error: LoopsError) -> None:
    message = str(error)
    assert len(message) < 1000
    assert message.count("\n") == 0
    assert KEY not in all_that_it_shows(error)


@asynccontextmanager
async def tcp_server(answer: bytes | None) -> AsyncIterator[str]:
    """Something that listens, reads a request and sends `answer`, or the request itself when there is none."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        writer.write(asked if answer is None else answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}"


def dead_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


async def test_a_wrong_key(service: ScriptedService) -> None:
    service.answer("POST", SESSIONS, Say(401, {"message": f"no such key: {KEY}"}, {"X-Request-Id": "req-1"}))
    error = await open_error(service.url)
    assert isinstance(error, AuthenticationError)
    assert_readable(error)
    assert str(error) == (
        f"create a session (POST {service.url}{SESSIONS}): answered 401: no such key: *** [request id req-1] "
        "Check the API key (BASETEN_API_KEY or api_key=) and that it belongs to this service."
    )


@pytest.mark.parametrize("status", [200, 404, 405])
async def test_a_web_page(service: ScriptedService, status: int) -> None:
    service.answer("POST", SESSIONS, Say(status, "<!doctype html><title>Welcome</title>" + "x" * 10_000))
    error = await open_error(service.url)
    assert isinstance(error, ProtocolError)
    assert not error.retryable
    assert_readable(error)
    for useful in (f"answered {status}", "text/html", "<title>Welcome", "Check base_url"):
        assert useful in str(error)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(service: ScriptedService, status: int) -> None:
    service.answer("POST", SESSIONS, Say(status, "", {"Location": f"{service.url}/login"}))
    error = await open_error(service.url)
    assert isinstance(error, ProtocolError)
    assert "redirect" in str(error)
    assert_readable(error)
    assert not service.seen_at("GET", "/login")
    assert not service.seen_at("POST", "/login")


async def test_json_of_another_service(service: ScriptedService) -> None:
    service.answer("POST", SESSIONS, Say(200, {"hello": "world"}))
    error = await open_error(service.url)
    assert isinstance(error, ProtocolError)
    assert_readable(error)
    assert "session" in str(error)
    assert '{"hello": "world"}' in str(error)


async def test_a_dead_port(quick: Clock) -> None:
    port = dead_port()
    error = await open_error(f"http://127.0.0.1:{port}")
    assert isinstance(error, ConnectError)
    assert error.was_sent is False
    assert_readable(error)
    for useful in (f"127.0.0.1:{port}", "Check base_url", "loops-local serve"):
        assert useful in str(error)


async def test_a_host_that_does_not_exist(quick: Clock) -> None:
    error = await open_error("http://nowhere.invalid")
    assert isinstance(error, ConnectError)
    assert "nowhere.invalid" in str(error)
    assert "loops-local serve" not in str(error), "that hint is for this machine"
    assert_readable(error)


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH_9.6\r\n", b"\x15\x03\x03\x00\x02\x02\x46", b"HTTP/9.9 none\r\n\r\n", None],
    ids=["ssh", "tls alert", "bad status line", "echo of the request"],
)
async def test_a_server_that_does_not_speak_http(answer: bytes | None, quick: Clock) -> None:
    async with tcp_server(answer) as url:
        error = await open_error(url)
    assert isinstance(error, ProtocolError)
    assert "does not speak HTTP" in str(error)
    assert_readable(error)


async def test_an_answer_that_ends_early(service: ScriptedService, quick: Clock) -> None:
    service.always("POST", SESSIONS, hang_up_in_the_body)
    error = await open_error(service.url)
    assert isinstance(error, ConnectError)
    assert error.retryable
    assert_readable(error)


async def test_a_connection_that_is_closed_without_a_word(service: ScriptedService, quick: Clock) -> None:
    service.always("POST", SESSIONS, hang_up)
    error = await open_error(service.url)
    assert isinstance(error, ConnectError)
    assert error.was_sent
    assert_readable(error)
    assert len(service.seen_at("POST", SESSIONS)) > 1


async def test_the_answer_that_comes_back_is_the_request(service: ScriptedService) -> None:
    # A debugging proxy or an echo server shows what it was sent, with the key in it.
    service.answer("POST", SESSIONS, Say(400, f"you sent: Authorization: Bearer {KEY}"))
    error = await open_error(service.url)
    assert_readable(error)
    assert "Bearer ***" in str(error)


@pytest.mark.parametrize("before", range(170, 201, 3))
async def test_a_key_is_not_cut_in_two_by_an_excerpt(service: ScriptedService, before: int) -> None:
    service.answer("POST", SESSIONS, Say(500, "x" * before + KEY))
    error = await open_error(service.url)
    assert KEY[:5] not in str(error), "half a key is half a secret"


# --- requests of which the URL itself is a secret ---


@pytest.fixture
async def transport() -> AsyncIterator[Transport]:
    transport = Transport(Settings(base_url="http://unused", api_key=ApiKey(KEY)))
    yield transport
    await transport.close()


async def download_error(transport: Transport, url: str, timeout: float = 5.0) -> LoopsError:
    request = Request(method="GET", url=f"{url}?{SIGNED}", what="download x", timeout=timeout, authorize=True)
    with pytest.raises(LoopsError) as raised:
        async with transport.stream(request) as response:
            await response.read()
    return raised.value


def assert_no_secret(error: LoopsError, caplog: pytest.LogCaptureFixture) -> None:
    for shown in (all_that_it_shows(error), caplog.text):
        assert "5ecret" not in shown
        assert KEY not in shown


async def test_a_signature_is_nowhere_in_an_error(
    service: ScriptedService, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    said = [
        Say(403, f"<Error>expired: {service.url}/files/x?{SIGNED}</Error>"),
        Say(403, {"message": f"expired: /files/x?{SIGNED}"}),
        Say(400, [f"/files/x?{SIGNED}"]),
        Say(307, "", {"Location": f"{service.url}/elsewhere?{SIGNED}"}),
        hang_up,
        hang_up_in_the_body,
    ]
    service.answer("GET", "/files/x", *said)
    for _ in said:
        error = await download_error(transport, f"{service.url}/files/x")
        assert "download x (GET " in str(error)
        assert f"{service.url}/files/x" in str(error), "the rest of the URL is useful"
        assert_no_secret(error, caplog)


async def test_a_signature_is_not_in_the_errors_of_a_connection(
    transport: Transport, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    for url, kind in (
        (f"http://127.0.0.1:{dead_port()}/x", ConnectError),
        ("http://nowhere.invalid/x", ConnectError),
        ("ftp://files/x", ConfigError),
    ):
        error = await download_error(transport, url)
        assert isinstance(error, kind)
        assert_no_secret(error, caplog)
    async with tcp_server(None) as url:
        error = await download_error(transport, f"{url}/x")
        assert isinstance(error, ProtocolError)
        assert_no_secret(error, caplog)


async def test_a_signature_is_not_in_the_error_of_a_time_limit(
    service: ScriptedService, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    service.answer("GET", "/files/x", Hold(Say(200)))
    error = await download_error(transport, f"{service.url}/files/x", timeout=0.01)
    assert isinstance(error, RequestTimeoutError)
    assert error.timeout == 0.01
    assert "no answer within 0.01 s" in str(error)
    assert_no_secret(error, caplog)


async def test_a_connection_that_is_not_accepted_in_time(
    transport: Transport, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "CONNECT_SECONDS", 0.01)
    transport_module._time_limit.cache_clear()
    with socket.socket() as listening, socket.socket() as filling:
        # A queue of connections that nobody accepts is full after the first.
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        filling.connect(listening.getsockname())
        error = await download_error(transport, f"http://127.0.0.1:{listening.getsockname()[1]}/x")
    transport_module._time_limit.cache_clear()
    assert isinstance(error, ConnectError)
    assert not error.was_sent
    assert "did not accept a connection" in str(error)
    assert_no_secret(error, caplog)


async def test_an_error_of_the_disk_is_not_an_error_of_the_network(
    service: ScriptedService, transport: Transport
) -> None:
    service.answer("GET", "/files/x", Say(200, "content"))
    request = Request(method="GET", url=f"{service.url}/files/x", what="download x")
    with pytest.raises(OSError, match="No space left") as full:
        async with transport.stream(request):
            raise OSError(28, "No space left on device")
    assert not isinstance(full.value, LoopsError)

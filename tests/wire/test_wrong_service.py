"""Whatever else may be at the other end: one readable error that says what to do, and never a secret."""

from __future__ import annotations

import asyncio
import logging
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loops_async import (
    AdamParams,
    AuthenticationError,
    ConnectError,
    LoopsError,
    ProtocolError,
    RequestTimeoutError,
    SamplingClient,
    ServiceClient,
    TrainingClient,
)
from loops_async._checkpoints import download
from loops_async._http import network
from tests.support.clock import Clock
from tests.support.files import FILES, SIGNED, entry, page
from tests.support.scripted import KEY, Hold, Reply, Say, ScriptedService, done, hang_up, hang_up_in_the_body
from tests.support.secrecy import all_that_it_shows

SESSIONS = "/v1/loops/sessions"
CAPABILITIES = "/v1/loops/capabilities"


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
    for useful in (f"could not connect to 127.0.0.1:{port}", "Check base_url and the network", "loops-local serve"):
        assert useful in str(error)


async def test_a_host_that_does_not_exist(quick: Clock) -> None:
    error = await open_error("https://nowhere.invalid")
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
    assert "does not follow HTTP" in str(error)
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


async def test_a_key_in_an_answer_is_not_in_the_local_variables_of_a_traceback(
    client: ServiceClient, sampler: SamplingClient, trainer: TrainingClient, service: ScriptedService
) -> None:
    # Reports of crashes show them.
    garbled = Say(body=f"<html>you sent: Authorization: Bearer {KEY}")
    service.answer("GET", CAPABILITIES, garbled)
    service.answer("POST", "/sampler/sample", garbled)
    service.answer("POST", "/trainer/optim_step", Say(202, {"operation_id": "op-7", "schema_version": 1}))
    service.always("GET", "/trainer/operations/op-7", done(KEY))
    step = await trainer.optim_step(AdamParams())
    for call in (client.get_server_capabilities(), sampler.sample([1]), step):
        with pytest.raises(ProtocolError) as raised:
            await call
        assert KEY not in str(list(_local_variables(raised.value)))


def _local_variables(error: BaseException) -> Iterator[object]:
    """Yield those of all frames of the library in the tracebacks of an error, and of those that it hangs on."""
    for one in (error, error.__cause__, error.__context__):
        for frame, _ in traceback.walk_tb(one.__traceback__ if one else None):
            if frame.f_globals["__name__"].startswith("loops_async"):
                yield from frame.f_locals.values()


@pytest.mark.parametrize("before", range(170, 201, 3))
async def test_a_key_is_not_cut_in_two_by_an_excerpt(service: ScriptedService, before: int) -> None:
    service.answer("POST", SESSIONS, Say(500, "x" * before + KEY))
    error = await open_error(service.url)
    assert KEY[:5] not in str(error), "half a key is half a secret"


# --- requests of which the URL itself is a secret ---


@pytest.fixture
def failed_download(
    client: ServiceClient, service: ScriptedService, quick: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Callable[[str], Awaitable[LoopsError]]:
    """Returns the error of a download from a signed URL, having looked for secrets in it and in all that was logged."""
    caplog.set_level(logging.DEBUG)

    async def failed_download(url: str) -> LoopsError:
        service.always("GET", FILES, Say(body=page([entry(f"{url}?{SIGNED}", "x", 5)])))
        with pytest.raises(LoopsError) as raised:
            await client.download_checkpoint("c1", dest_dir=tmp_path)
        for shown in (all_that_it_shows(raised.value), caplog.text):
            assert "5ecret" not in shown
            assert KEY not in shown
        return raised.value

    return failed_download


@pytest.mark.parametrize(
    "reply",
    [
        Say(403, f"<Error>expired: http://files.example/x?{SIGNED}</Error>"),
        Say(403, {"message": f"expired: /files/x?{SIGNED}"}),
        Say(400, [f"/files/x?{SIGNED}"]),
        Say(307, "", {"Location": f"http://files.example/elsewhere?{SIGNED}"}),
        Say(500, f"no: /files/x?{SIGNED} for {KEY}"),
        hang_up,
        hang_up_in_the_body,
    ],
    ids=["page", "message", "list", "redirect", "key", "hang up", "hang up in the body"],
)
async def test_a_signature_is_nowhere_in_an_error(
    service: ScriptedService, failed_download: Callable[[str], Awaitable[LoopsError]], reply: Reply
) -> None:
    service.always("GET", "/files/x", reply)
    error = await failed_download(f"{service.url}/files/x")
    assert f"download x (GET {service.url}/files/x" in str(error), "the rest of the URL is useful"


async def test_a_signature_is_not_in_the_errors_of_a_connection(
    failed_download: Callable[[str], Awaitable[LoopsError]],
) -> None:
    for url, kind in (
        (f"http://127.0.0.1:{dead_port()}/x", ConnectError),
        ("http://nowhere.invalid/x", ConnectError),
        ("ftp://files/x", ProtocolError),
    ):
        assert isinstance(await failed_download(url), kind)
    async with tcp_server(None) as url:
        assert isinstance(await failed_download(f"{url}/x"), ProtocolError)


async def test_a_signature_is_not_in_the_error_of_a_time_limit(
    service: ScriptedService,
    failed_download: Callable[[str], Awaitable[LoopsError]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "IDLE_SECONDS", 0.01)
    service.always("GET", "/files/x", Hold(Say()))
    error = await failed_download(f"{service.url}/files/x")
    assert isinstance(error, RequestTimeoutError)
    assert error.timeout == 0.01
    assert "no answer within 0.01 s" in str(error)


async def test_a_connection_that_is_not_accepted_in_time(
    failed_download: Callable[[str], Awaitable[LoopsError]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "CONNECT_SECONDS", 0.01)
    network.time_limits.cache_clear()
    with socket.socket() as listening, socket.socket() as filling:
        # A queue of connections that is never accepted is full after the first.
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        filling.connect(listening.getsockname())
        error = await failed_download(f"http://127.0.0.1:{listening.getsockname()[1]}/x")
    network.time_limits.cache_clear()
    assert isinstance(error, ConnectError)
    assert not error.was_sent
    assert "did not accept a connection" in str(error)


async def test_the_log_of_a_retry_holds_no_secret(
    client: ServiceClient, service: ScriptedService, quick: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    service.answer("GET", CAPABILITIES, Say(502, f"see {service.url}/file?{SIGNED} Bearer {KEY}"))
    service.always("GET", CAPABILITIES, Say(body={"supported_models": []}))
    await client.get_server_capabilities()
    assert "retrying" in caplog.text
    assert "5ecret" not in caplog.text
    assert KEY not in caplog.text

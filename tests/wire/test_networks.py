"""Proxies, certificates, and keys that stay where they belong, over real sockets."""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from loops_async import ConfigError, ConnectError, SamplingParams, ServiceClient
from loops_async._http.messages import Request
from loops_async._http.settings import resolve_settings
from loops_async._http.transport import Transport
from tests.support.certificates import self_signed
from tests.support.colours import Colour
from tests.support.patience import PATIENCE_SECONDS
from tests.support.scripted import KEY, MODEL, Say, ScriptedService


class FakeProxy:
    """Answers requests itself, and tunnels to nowhere but one port."""

    def __init__(self, refusal: str = "", upstream: int = 0) -> None:
        self.lines: list[str] = []
        self.headers: list[str] = []
        self.url = ""
        self._refusal = refusal
        self._upstream = upstream

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        self.lines.append(head[0])
        self.headers += head[1:]
        if self._refusal:
            writer.write(f"HTTP/1.1 {self._refusal}\r\nContent-Length: 0\r\n\r\n".encode())
        elif head[0].startswith("CONNECT"):
            writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            away, back = await asyncio.open_connection("127.0.0.1", self._upstream)
            await asyncio.gather(_copy(reader, back), _copy(away, writer))
        else:
            body = b'{"session": {"id": "by-proxy"}}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    except ConnectionError:
        pass
    sink.close()


@asynccontextmanager
async def proxying(proxy: FakeProxy) -> AsyncIterator[FakeProxy]:
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    async with server:
        proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield proxy


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for loops.test that no authority has signed, and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def secure(service: ScriptedService, certificate: tuple[Path, Path]) -> AsyncIterator[str]:
    """The same service, behind TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    runner = web.ServerRunner(web.Server(service.handle, access_log=None), shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    yield f"https://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


# --- proxies ---


@pytest.mark.parametrize("by", ["environment", "argument"])
async def test_a_request_goes_through_the_proxy(colour: Colour, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    async with proxying(FakeProxy()) as proxy:
        with_password = proxy.url.replace("http://", "http://user:pa55word@")
        if by == "environment":
            monkeypatch.setenv("HTTP_PROXY", with_password)
        given = {"proxy": with_password} if by == "argument" else {}
        async with colour.connected(api_key=KEY, base_url="http://loops.invalid", allow_http=True, **given) as client:
            assert client.session_id == "by-proxy"
    assert proxy.lines == ["POST http://loops.invalid/v1/loops/sessions HTTP/1.1"]
    assert "Proxy-Authorization: Basic dXNlcjpwYTU1d29yZA==" in proxy.headers


async def test_an_encrypted_request_is_tunnelled(
    monkeypatch: pytest.MonkeyPatch, service: ScriptedService, secure: str, certificate: tuple[Path, Path]
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    async with proxying(FakeProxy(upstream=int(secure.rpartition(":")[2]))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        async with ServiceClient(api_key=KEY, base_url="https://loops.test") as client:
            assert client.session_id == "s1"
    assert proxy.lines == ["CONNECT loops.test:443 HTTP/1.1"]
    assert not [each for each in proxy.headers if KEY in each]
    assert service.seen[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("refusal", "is_retryable", "advice"),
    [
        ("407 Proxy Authentication Required", False, "wants a user and a password"),
        ("403 Forbidden", False, "NO_PROXY"),
        ("502 Bad Gateway", True, "NO_PROXY"),
    ],
)
async def test_a_proxy_that_refuses_is_named(quick: object, refusal: str, is_retryable: bool, advice: str) -> None:
    async with proxying(FakeProxy(refusal)) as proxy:
        given = proxy.url.replace("http://", "http://user:pa55word@")
        with pytest.raises(
            ConnectError, match=rf"the proxy did not connect to loops.test: {refusal}.*{advice}"
        ) as error:
            await ServiceClient(api_key=KEY, base_url="https://loops.test", proxy=given).open()
    assert not error.value.was_sent
    assert error.value.retryable is is_retryable
    assert (len(proxy.lines) > 1) is is_retryable
    assert "pa55word" not in str(error.value)


async def test_a_proxy_that_is_not_there_is_named(quick: object, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    proxy = "http://user:pa55word@127.0.0.1:9"
    with pytest.raises(ConnectError, match=r"could not connect to the proxy 127.0.0.1:9.*HTTPS_PROXY") as error:
        await ServiceClient(api_key=KEY, base_url="https://loops.test", proxy=proxy).open()
    assert "pa55word" not in str(error.value) + caplog.text


async def test_the_files_of_passwords_are_not_read(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login thief password thief\n")
    monkeypatch.setenv("NETRC", str(netrc))
    async with proxying(FakeProxy()) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        async with ServiceClient(base_url="http://loops.invalid"):
            pass
        async with ServiceClient(base_url=service.url):
            pass
    assert not [each for each in proxy.headers if "uthorization" in each]
    assert "Authorization" not in service.seen[0].headers


# --- certificates ---


async def test_an_untrusted_certificate_is_final(
    service: ScriptedService, secure: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConnectError, match=r"certificate is not trusted.*SSL_CERT_FILE") as error:
        await ServiceClient(api_key=KEY, base_url=secure).open()
    assert not error.value.retryable
    assert not caplog.records, "no retries"
    assert not service.seen


async def test_a_trainer_with_an_untrusted_certificate_is_not_waited_for(
    client: ServiceClient, service: ScriptedService, secure: str
) -> None:
    service.always("POST", "/v1/loops/runs", Say(body={"run": service.run(base_url=f"{secure}/trainer")}))
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(ConnectError, match="certificate"):
            await client.create_lora_training_client(MODEL)


# --- keys ---


async def test_a_service_cannot_make_the_key_go_unencrypted(
    monkeypatch: pytest.MonkeyPatch, service: ScriptedService, secure: str, certificate: tuple[Path, Path]
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    elsewhere = service.sampler(base_url="http://sampler.invalid/x")
    service.always("POST", "/v1/loops/samplers", Say(body={"sampler": elsewhere}))
    service.always("POST", "/v1/loops/runs", Say(body={"run": service.run(base_url="http://trainer.invalid/x")}))
    async with ServiceClient(api_key=KEY, base_url=secure, allow_http=True) as client:
        sampler = await client.create_sampling_client(MODEL)
        with pytest.raises(ConfigError, match=r"^the address .* plain http URL \(host sampler.invalid\).*operators"):
            await sampler.sample([1], 1, SamplingParams())
        with pytest.raises(ConfigError, match=r"plain http URL \(host trainer.invalid\)"):
            await client.create_lora_training_client(MODEL)


async def test_a_request_without_the_key_opens_no_way_for_one_with_it(quick: object) -> None:
    transport = Transport(resolve_settings(api_key=KEY, base_url="https://loops.test"))
    request = Request(method="GET", url="http://files.invalid/x", what="fetch a file")
    with pytest.raises(ConnectError):
        async with transport.stream(request):
            pass
    with pytest.raises(ConfigError, match="plain http URL"):
        await transport.send(request)
    await transport.close()


# --- names ---


async def test_a_sample_does_not_wait_for_the_programs_own_threads(service: ScriptedService) -> None:
    url = service.url.replace("127.0.0.1", "localhost")
    async with ServiceClient.local(trainer_url=f"{url}/trainer", sampler_url=f"{url}/sampler") as client:
        sampler = await client.create_sampling_client(MODEL)
        go = threading.Event()
        work = [asyncio.create_task(asyncio.to_thread(go.wait, PATIENCE_SECONDS)) for _ in range(64)]
        await asyncio.sleep(0)
        try:
            assert (await sampler.sample([1])).sequences
            assert not any(task.done() for task in work)
        finally:
            go.set()
            await asyncio.gather(*work)

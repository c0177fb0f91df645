"""How much of an answer is read: its headers, its body before and after decompression, and the body of an error."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from loops_async import ConfigError, ProtocolError, ServerError
from loops_async._http.messages import Request
from loops_async._http.settings import Settings
from loops_async._http.transport import MOST_ERROR_BYTES, Transport
from tests.support.scripted import Reply, Say, ScriptedService

MOST = 1_000_000


@pytest.fixture
async def transport(service: ScriptedService) -> AsyncIterator[Transport]:
    transport = Transport(Settings(base_url=service.url, api_key=None))
    yield transport
    await transport.close()


def request(service: ScriptedService) -> Request:
    return Request(method="GET", url=f"{service.url}/x", what="test", most_bytes=MOST)


def compressed(body: bytes, status: int = 200) -> Say:
    return Say(status, gzip.compress(body), {"Content-Encoding": "gzip"})


async def in_chunks(asked: web.BaseRequest) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(asked)
    for _ in range(11):
        await response.write(bytes(MOST // 10))
    return response


async def test_long_headers_are_read(transport: Transport, service: ScriptedService) -> None:
    service.answer("GET", "/x", Say(200, b"1", {"X-Gateway-Policy": "p" * 60_000}))
    assert (await transport.ask(request(service))).body == b"1"


@pytest.mark.parametrize("reply", [Say(200, b"1" * MOST), compressed(b"1" * MOST)], ids=["plain", "gzip"])
async def test_an_answer_of_the_largest_size_is_read(
    transport: Transport, service: ScriptedService, reply: Reply
) -> None:
    service.answer("GET", "/x", reply)
    assert (await transport.ask(request(service))).body == b"1" * MOST


@pytest.mark.parametrize(
    "reply",
    [Say(200, bytes(MOST + 1)), in_chunks, compressed(bytes(MOST + 1)), compressed(bytes(100 << 20))],
    ids=["announced", "in chunks", "gzip", "bomb"],
)
async def test_a_larger_answer_is_refused(transport: Transport, service: ScriptedService, reply: Reply) -> None:
    service.answer("GET", "/x", reply)
    with pytest.raises(ProtocolError, match=r"test \(GET .*/x\): answered with more than 1,000,000 bytes") as refused:
        await transport.ask(request(service))
    assert refused.value.status == 200


@pytest.mark.parametrize(
    ("encoding", "problem"), [("br", "was not accepted"), ("gzip", "is not gzip")], ids=["unknown", "wrong"]
)
async def test_an_encoding_that_cannot_be_undone_is_named(
    transport: Transport, service: ScriptedService, encoding: str, problem: str
) -> None:
    service.answer("GET", "/x", Say(200, b"plain", {"Content-Encoding": encoding}))
    with pytest.raises(ProtocolError, match=problem):
        await transport.ask(request(service))
    assert service.seen[-1].headers["Accept-Encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    "reply",
    [Say(500, b"no\n" + b"x" * 2 * MOST_ERROR_BYTES), compressed(b"no\n" + bytes(100 << 20), 500)],
    ids=["plain", "bomb"],
)
async def test_the_beginning_of_a_large_error_is_read(
    transport: Transport, service: ScriptedService, reply: Reply
) -> None:
    service.answer("GET", "/x", reply)
    with pytest.raises(ServerError, match="answered 500: no") as failed:
        await transport.ask(request(service))
    assert len(str(failed.value)) < 1000


async def test_a_header_that_cannot_be_sent_is_a_typed_error(transport: Transport, service: ScriptedService) -> None:
    asked = request(service)
    asked.headers = {"X-Run-Id": "a\r\nX-Evil: 1"}
    with pytest.raises(ConfigError, match="cannot be sent"):
        await transport.ask(asked)
    assert service.seen == []

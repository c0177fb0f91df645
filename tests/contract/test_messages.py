"""Errors that a person meets: one readable message each, that says what to do."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loops_async import (
    BadRequestError,
    ConfigError,
    ConnectError,
    Datum,
    InputError,
    LoopsError,
    ServerShutdownError,
    ServiceClient,
    TrainingClient,
)
from loops_async._http import retry
from loops_async._http.retry import Patience
from loops_local import LocalService, serve_in_thread
from tests.contract._colours import Colour
from tests.contract._engine import WatchedEngine
from tests.contract._helpers import PROMPT, eventually, example

KEY = "not-the-key-of-this-service"


async def failure(colour: Colour, **options: Any) -> str:
    """Return what connecting says, having checked that it says it once and keeps the key to itself."""
    with pytest.raises(LoopsError) as raised:
        async with colour.connected(**{"api_key": KEY, **options}):
            pass
    message = str(raised.value)
    assert "\n" not in message
    assert KEY not in "".join(traceback.format_exception(raised.value))
    return message


async def test_a_wrong_key(colour: Colour, local: LocalService) -> None:
    message = await failure(colour, base_url=local.base_url)
    assert message.startswith("create a session (POST http")
    assert "401" in message
    assert "Check the API key (BASETEN_API_KEY or api_key=)" in message


async def test_a_key_with_a_newline(colour: Colour, local: LocalService) -> None:
    with pytest.raises(ConfigError, match="stray newline"):
        async with colour.connected(base_url=local.base_url, api_key=f"{local.api_key}\n"):
            pass


@pytest.mark.parametrize("url", ["localhost:8000", "https://", "http://127.0.0.1:8000/?key=1"])
async def test_a_wrong_url(colour: Colour, url: str) -> None:
    with pytest.raises(ConfigError, match="base_url must"):
        async with colour.connected(base_url=url, api_key=KEY):
            pass


async def test_nothing_at_the_address(colour: Colour) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    message = await failure(colour, base_url=f"http://127.0.0.1:{port}")
    assert f"could not connect to 127.0.0.1:{port}" in message
    assert "Check base_url and the network" in message
    assert "loops-local serve" in message


class Page(BaseHTTPRequestHandler):
    """A web server that knows nothing of Loops."""

    status = 200

    def do_POST(self) -> None:
        page = b"<html>Welcome to nginx!</html>"
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def other_server(answer: int) -> Iterator[str]:
    handler = type("Page", (Page,), {"status": answer})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("answer", [200, 404, 302])
async def test_a_server_that_is_not_loops(colour: Colour, answer: int) -> None:
    with other_server(answer) as url:
        message = await failure(colour, base_url=url)
    assert f"answered {answer} with a body that is not what Loops sends" in message
    assert "Welcome to nginx" in message
    assert f"Is {url.removeprefix('http://')} a Loops service? Check base_url." in message


async def test_a_server_that_does_not_speak_http(colour: Colour) -> None:
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        message = await failure(colour, base_url=f"http://127.0.0.1:{port}")
    assert f"127.0.0.1:{port} does not speak HTTP" in message
    assert "Check base_url" in message


async def test_an_unknown_model(colour: Colour) -> None:
    with serve_in_thread(engine="echo", models=["small", "large"], provisioning_seconds=0.0) as local:
        async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
            for create in (service.create_lora_training_client, service.create_sampling_client):
                with pytest.raises(BadRequestError, match=r"base_model: this service has small, large; got 'huge'"):
                    await create("huge")


async def test_a_sequence_that_is_too_long_for_the_run(service: ServiceClient, engine: WatchedEngine) -> None:
    trainer = await service.create_lora_training_client(engine.name, max_seq_len=2)
    with pytest.raises(InputError, match=r"data\[0\]\.model_input: has 3 tokens, more than max_seq_len=2; shorten"):
        await trainer.forward([example()])


async def test_a_sequence_that_is_too_long_for_the_model(trainer: TrainingClient, service: ServiceClient) -> None:
    tokens = [1] * 40_000
    with pytest.raises(BadRequestError, match=r"data\[0\]\.model_input: must have at most 32768 tokens.*got 40000"):
        await trainer.forward([Datum(model_input=tokens)])
    sampler = await trainer.save_weights_and_get_sampling_client()
    with pytest.raises(BadRequestError, match=r"longest sequence is 32768 tokens; the prompt has 40000"):
        await sampler.sample(tokens)


async def test_a_service_that_shuts_down(colour: Colour) -> None:
    gated = WatchedEngine("gated")
    gated.training.clear()
    with ExitStack() as running:
        local = running.enter_context(serve_in_thread(engine=lambda _: gated, provisioning_seconds=0.0))
        async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
            trainer = await service.create_lora_training_client("gated")
            at_work, queued = [await trainer.forward([example()]) for _ in range(2)]
            await eventually(lambda: gated.begun)
            closing = asyncio.ensure_future(asyncio.to_thread(running.close))
            with pytest.raises(ServerShutdownError, match="make a new run from the last saved state"):
                await queued
            gated.training.set()
            assert (await at_work).loss_fn_outputs
            await closing


async def test_a_service_that_is_killed_while_it_is_polled(
    colour: Colour, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("POLL", "SUBMIT", "UNREACHED"):
        monkeypatch.setattr(retry, name, Patience(seconds=0.2))
    script = Path(__file__).with_name("_gated_service.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = await asyncio.create_subprocess_exec(
        sys.executable, script, tmp_path, stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    url, key = (await process.stdout.readline()).decode().split()
    async with colour.connected(base_url=url, api_key=key) as service:
        trainer = await service.create_lora_training_client("gated")
        sampler = await service.create_sampling_client("gated")
        future = await trainer.forward([example()])
        process.kill()
        await process.wait()

        with pytest.raises(ConnectError, match=r"wait for forward of run \w+ .*could not connect") as raised:
            await future
        assert raised.value.retryable
        assert not future.done()  # what became of the operation is not known
        with pytest.raises(ConnectError, match=r"^sample .*could not connect"):
            await sampler.sample(PROMPT)
        with pytest.raises(ConnectError, match=r"^submit forward of run \w+ .*could not connect"):
            await trainer.forward([example()])

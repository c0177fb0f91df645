"""Errors that a person meets: one readable message each, that says what to do."""

from __future__ import annotations

import asyncio
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path

import pytest
from msgspec.structs import replace

from loops_async import (
    AuthenticationError,
    BadRequestError,
    ConnectError,
    Datum,
    InputError,
    ServerShutdownError,
    ServiceClient,
    TrainingClient,
    sampling,
)
from loops_async._http.retry import Call, RetryPolicy
from loops_async._operations import poller, submitter
from loops_local import LocalService, serve_in_thread
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.work import PROMPT, eventually, example

KEY = "not-the-key-of-this-service"
ROOT = Path(__file__).parents[2]


async def test_a_wrong_key(colour: Colour, local: LocalService) -> None:
    with pytest.raises(AuthenticationError, match=r"^create a session \(POST http.*401.*Check the API key") as refused:
        async with colour.connected(base_url=local.base_url, api_key=KEY):
            pass
    assert "BASETEN_API_KEY or api_key=" in str(refused.value)
    assert KEY not in "".join(traceback.format_exception(refused.value))


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
            with pytest.raises(ServerShutdownError, match="create a new run from the last saved state"):
                await queued
            gated.training.set()
            assert (await at_work).loss_fn_outputs
            await closing


async def test_a_service_that_is_killed_while_it_is_polled(
    colour: Colour, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quick = RetryPolicy(tries=99, seconds=0.2)
    for module, name in ((poller, "POLL"), (submitter, "OPERATION"), (sampling, "SAMPLE")):
        call: Call = getattr(module, name)
        monkeypatch.setattr(module, name, replace(call, unreached=quick, lost=call.lost and quick))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.gated_service", tmp_path), cwd=ROOT, stdout=asyncio.subprocess.PIPE
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

"""Recording what a program asks, and replaying it without a network, in both colours."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from loops_async import (
    AdamParams,
    Datum,
    InputError,
    ModelInput,
    NotReadyError,
    NotRecordedError,
    OperationTimeoutError,
    SampleTimeoutError,
    SamplingParams,
    ServiceClient,
)
from loops_async._http import retry
from loops_async.testing import record, replay
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.limits import expire_when
from tests.support.patience import PATIENCE_SECONDS
from tests.support.scripted import KEY, MODEL, Hold, Say, ScriptedService, serving

FOUR = SamplingParams(max_tokens=4)
DATUM = Datum(
    model_input=ModelInput.from_ints([1, 2, 3]),
    loss_fn_inputs={"target_tokens": [2, 3, 4]},
)
LIMIT = 7.0
"""A time limit of which the tests decide when it expires."""
NEVER = 1e6
"""A time that no test could wait for."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cassettes" / "one.jsonl"


@pytest.fixture
async def service() -> Any:
    async with serving() as service:
        yield service


async def replayed(
    colour: Colour, path: Path, program: Callable[[ServiceClient], Awaitable[Any]], **options: Any
) -> Any:
    """Run a program without a service and without a key."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        with replay(path):
            async with colour.connected(**options) as client:
                return await program(client)


async def recorded(
    colour: Colour, path: Path, program: Callable[[ServiceClient], Awaitable[Any]], service: ScriptedService
) -> Any:
    with record(path):
        async with colour.connected(base_url=service.url, api_key=KEY) as client:
            return await program(client)


def is_private(path: Path) -> bool:
    return stat.S_IMODE(path.stat().st_mode) == 0o600


async def listing(client: ServiceClient) -> Any:
    return [run.id for run in await client.control_plane.list_runs()]


def contents(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()}


def exchanges(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


@pytest.mark.parametrize("serverless", [False, True])
async def test_a_program_runs_again_without_a_service(colour: Colour, path: Path, serverless: bool) -> None:
    async def program(client: ServiceClient) -> Any:
        trainer = await client.create_lora_training_client("any", rank=8)
        step = await trainer.forward_backward([DATUM], "cross_entropy")
        await (await trainer.optim_step(AdamParams(learning_rate=1e-3))).result()
        sampler = await trainer.save_weights_and_get_sampling_client("one")
        samples = [sampler.sample([104, index % 2], sampling_params=FOUR) for index in range(6)]
        answers = await asyncio.gather(*samples)
        return (await step.result()).loss, [answer.sequences[0].tokens for answer in answers]

    async with LocalService(engine="echo", serverless=serverless, provisioning_seconds=0.02) as local:
        with record(path):
            async with colour.connected(base_url=local.base_url, api_key=local.api_key) as client:
                first = await program(client)
        key = local.api_key

    assert await replayed(colour, path, program) == first
    [(name, content)] = contents(path.parent).items()
    assert name == path.name
    assert key.encode() not in content
    assert is_private(path)


async def test_a_request_that_was_not_recorded_is_refused_with_what_differs(
    colour: Colour, path: Path, service: ScriptedService
) -> None:
    async def sample(client: ServiceClient, most: int) -> Any:
        sampler = await client.create_sampling_client(MODEL)
        return await sampler.sample([1, 2], sampling_params=SamplingParams(max_tokens=most))

    await recorded(colour, path, lambda client: sample(client, 4), service)

    with pytest.raises(NotRecordedError) as refused:
        await replayed(colour, path, lambda client: sample(client, 5))
    assert "max_tokens: recorded 4, asked 5" in str(refused.value)
    assert str(path) in str(refused.value)
    assert "Idempotency" not in str(refused.value)


async def test_equal_requests_are_answered_in_the_recorded_order_and_not_more_often(
    colour: Colour, path: Path, service: ScriptedService
) -> None:
    async def program(client: ServiceClient, times: int) -> Any:
        return [await listing(client) for _ in range(times)]

    service.answer("GET", "/v1/loops/runs", *(Say(body={"runs": [service.run(id=name)]}) for name in ("a", "b")))
    first = await recorded(colour, path, lambda client: program(client, 2), service)

    assert first == [["a"], ["b"]]
    assert await replayed(colour, path, lambda client: program(client, 2)) == first
    with pytest.raises(NotRecordedError, match="recorded 2 times"):
        await replayed(colour, path, lambda client: program(client, 3))


async def test_a_refusal_that_the_program_passes_over_is_raised_at_the_end(
    colour: Colour, path: Path, service: ScriptedService
) -> None:
    async def program(client: ServiceClient) -> None:
        with pytest.raises(NotRecordedError):
            await listing(client)

    await recorded(colour, path, lambda client: asyncio.sleep(0), service)

    with pytest.raises(NotRecordedError, match="not recorded"):
        await replayed(colour, path, program)


async def test_retries_do_not_pause(
    colour: Colour, path: Path, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.answer("GET", "/v1/loops/runs", Say(503), Say(429), Say(body={"runs": []}))
    await recorded(colour, path, listing, service)
    monkeypatch.setattr(retry, "pause_before", lambda *_: 60.0)

    assert await replayed(colour, path, listing) == []
    assert [each["answer"]["status"] for each in exchanges(path) if each["request"]["method"] == "GET"] == [
        503,
        429,
        200,
    ]


async def test_an_error_without_an_answer_comes_again(colour: Colour, path: Path, service: ScriptedService) -> None:
    async def program(client: ServiceClient) -> Any:
        sampler = await client.create_sampling_client(MODEL)
        try:
            return await sampler.sample([1], sampling_params=FOUR)
        except Exception as error:
            return type(error), str(error).replace(service.url, "")

    async def hang_up(request: Any) -> Any:
        request.transport.close()

    service.answer("POST", "/sampler/sample", hang_up)
    first = await recorded(colour, path, program, service)

    assert await replayed(colour, path, program) == first


async def test_a_wait_for_a_trainer_ends_as_it_did(
    colour: Colour, path: Path, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def program(client: ServiceClient, seconds: float) -> Any:
        with pytest.raises(NotReadyError):
            await client.create_lora_training_client(MODEL, rank=8, ready_timeout=seconds)

    service.always("GET", "/trainer/health", Say(503, {"error": "starting"}))
    expire_when(lambda: service.seen_at("GET", "/trainer/health"), monkeypatch, seconds=LIMIT)
    await recorded(colour, path, lambda client: program(client, LIMIT), service)

    await replayed(colour, path, lambda client: program(client, NEVER))


async def test_a_sample_that_took_too_long_takes_too_long_at_once(
    colour: Colour, path: Path, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def program(client: ServiceClient, seconds: float) -> Any:
        sampler = await client.create_sampling_client(MODEL)
        with pytest.raises(SampleTimeoutError):
            await sampler.sample([1], sampling_params=FOUR, timeout=seconds)

    held = Hold(Say())
    service.answer("POST", "/sampler/sample", held)
    expire_when(held.arrived.is_set, monkeypatch, seconds=LIMIT)
    await recorded(colour, path, lambda client: program(client, LIMIT), service)
    held.go.set()

    await replayed(colour, path, lambda client: program(client, NEVER))


async def test_a_wait_for_an_operation_ends_as_it_did(
    colour: Colour, path: Path, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Hold(Say())

    async def program(client: ServiceClient, seconds: float) -> Any:
        trainer = await client.create_lora_training_client(MODEL, rank=8)
        service.always("GET", "/trainer/operations/op", held)
        service.answer("POST", "/trainer/optim_step", Say(202, {"operation_id": "op", "schema_version": 1}))
        step = await trainer.optim_step(AdamParams())
        with pytest.raises(OperationTimeoutError):
            await step.result(timeout=seconds)

    expire_when(held.arrived.is_set, monkeypatch, seconds=LIMIT)
    await recorded(colour, path, lambda client: program(client, LIMIT), service)
    held.go.set()

    await replayed(colour, path, lambda client: program(client, NEVER))


@pytest.mark.parametrize(("largest", "is_kept"), [(1 << 20, True), (8, False)])
async def test_downloads_are_kept_up_to_a_size(
    colour: Colour, path: Path, echo_service: LocalService, tmp_path: Path, largest: int, is_kept: bool
) -> None:
    async def program(client: ServiceClient, place: Path) -> Any:
        trainer = await client.create_lora_training_client("any", rank=8)
        await (await trainer.save_state("one")).result()
        [saved] = await trainer.list_checkpoints()
        await client.download_checkpoint(saved.id, dest_dir=place)
        return contents(place)

    with record(path, largest_file=largest):
        async with colour.connected(base_url=echo_service.base_url, api_key=echo_service.api_key) as client:
            first = await program(client, tmp_path / "first")

    assert b"signature=" not in contents(path.parent)[path.name]
    if is_kept:
        assert await replayed(colour, path, lambda client: program(client, tmp_path / "second")) == first
    else:
        with pytest.raises(NotRecordedError, match="largest_file"):
            await replayed(colour, path, lambda client: program(client, tmp_path / "second"))


def test_a_failing_block_is_recorded_and_an_interrupted_one_leaves_the_file(path: Path) -> None:
    def fail(error: BaseException) -> None:
        with record(path):
            raise error

    with pytest.raises(ValueError, match="failed"):
        fail(ValueError("failed"))
    path.write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())

    assert path.read_text() == "earlier"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist"),
        ("", "line 1"),
        ('{"cassette": 2, "base_url": ""}\n', "format 2"),
        ('{"cassette": 1, "base_url": ""}\n{"request": 1}\n', "line 2"),
    ],
)
def test_other_files_are_refused(path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        path.parent.mkdir()
        path.write_text(content)

    with pytest.raises(InputError, match=problem), replay(path):
        pass


def test_one_cassette_at_a_time(path: Path) -> None:
    with record(path), pytest.raises(RuntimeError, match="in use"), record(path):
        pass

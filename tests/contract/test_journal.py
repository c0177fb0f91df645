"""Programs with a journal: killed anywhere and started again, they do everything once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from loops_async import (
    AdamParams,
    ConfigError,
    Episode,
    InputError,
    JournalError,
    JournalMismatchError,
    LoopsError,
    RemoteOpError,
    RolloutContext,
    ServiceClient,
    UnknownRequestError,
)
from loops_async._http import retry
from loops_async._journal import file, journal
from loops_async._operations import submitter
from loops_async._session import lost_runs
from loops_local import LocalService, serve_in_thread
from loops_local.engine.base import SampleJob
from tests.support.colours import Async, Colour
from tests.support.engines import Engines, WatchedEngine
from tests.support.killed import Program, Restartable
from tests.support.rollouts import PAIRS, loop, one_turn, tasks_of
from tests.support.secrecy import all_that_it_shows
from tests.support.work import FEW_TOKENS, PROMPT, REFUSED, example

STEPS = 3


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_runs, "SEARCH_SECONDS", 0.2)
    monkeypatch.setattr(file, "SYNCHRONOUS", "OFF")  # no machine loses its power here


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.journal"


@pytest.fixture
def started(colour: Colour, local: LocalService, path: Path) -> Callable[..., Restartable]:
    def started(program: Program, **options: Any) -> Restartable:
        return Restartable(colour, local, path, program, **options)

    return started


def training(engine: WatchedEngine) -> Program:
    """Return a program that trains, samples what it has trained, and saves."""

    async def program(service: ServiceClient) -> list[Any]:
        seen: list[Any] = [service.session_id]
        trainer = await service.create_lora_training_client(engine.name, rank=4, name="journaled")
        seen.append(trainer.run_id)
        for step in range(STEPS):
            first = await trainer.forward_backward([example(2 * step), example(2 * step + 1)])
            second = await trainer.optim_step(AdamParams(learning_rate=step + 1))
            seen += [(await first).loss, (await second).metrics, first.operation_id, second.operation_id]
        both = await trainer.step([example(50)], "cross_entropy", AdamParams(learning_rate=50))
        seen.append((await both).loss)
        sampler = await trainer.save_weights_and_get_sampling_client("policy")
        for seed in (1, 1, 2):
            params = replace(FEW_TOKENS, seed=seed)
            seen.append((await sampler.sample(PROMPT, 2, params)).sequences)
        saved = await (await trainer.save_state("final")).result()
        return [*seen, saved.path, await trainer.policy_version()]

    return program


EXECUTED = [
    *(each for step in range(STEPS) for each in (("forward_backward", 2 * step), ("optim_step", step + 1))),
    ("forward_backward", 50),
    ("optim_step", 50),
]


@pytest.mark.parametrize(
    ("route", "number", "is_executed"),
    [
        ("POST */runs", 1, False),
        ("POST */runs", 1, True),
        ("POST */optim_step", 2, False),
        ("POST */optim_step", 2, True),
        ("GET */operations/*", 4, False),
        ("POST */forward_backward", 4, True),
        ("POST */save_weights_for_sampler", 1, True),
        ("POST */sample", 2, False),
        ("POST */save_state", 1, True),
    ],
)
async def test_what_was_killed_anywhere_does_everything_once(
    started: Callable[..., Restartable],
    engine: WatchedEngine,
    jobs: list[SampleJob],
    route: str,
    number: int,
    is_executed: bool,
) -> None:
    program = started(training(engine), journal_samples=True)
    await program.kill_at(route, number, is_executed=is_executed)
    seen = await program.run()
    assert engine.done == EXECUTED
    assert len(jobs) == 3
    assert seen[-1] == STEPS + 1
    assert await program.run() == seen  # all of it from the journal
    assert engine.done == EXECUTED
    assert len(jobs) == 3


async def test_an_answered_program_sends_nothing_that_changes_anything(
    started: Callable[..., Restartable], engine: WatchedEngine, local: LocalService
) -> None:
    program = started(training(engine), journal_samples=True)
    seen = await program.run()
    sent = local.faults.watch("POST *", times=1000)
    assert await program.run() == seen
    assert sent == []


async def test_a_changed_program_is_stopped_where_it_differs(
    started: Callable[..., Restartable], engine: WatchedEngine
) -> None:
    rate = 0.1

    async def program(service: ServiceClient) -> None:
        trainer = await service.create_lora_training_client(engine.name, rank=4)
        await trainer.forward_backward([example(1)])
        await (await trainer.optim_step(AdamParams(learning_rate=rate)))

    journaled = started(program)
    await journaled.run()
    rate = 0.2
    with pytest.raises(JournalMismatchError, match=r"adam_params\.learning_rate: the journal has 0\.1") as raised:
        await journaled.run()
    assert (raised.value.field, raised.value.recorded, raised.value.given) == (
        "adam_params.learning_rate",
        "0.1",
        "0.2",
    )
    assert len(engine.done) == 2


async def test_another_creation_is_not_begun_beside_the_recorded_one(
    started: Callable[..., Restartable], engine: WatchedEngine, local: LocalService
) -> None:
    rank = 4

    async def program(service: ServiceClient) -> None:
        await service.create_lora_training_client(engine.name, rank=rank)

    journaled = started(program)
    await journaled.run()
    rank = 8
    created = local.faults.watch("POST */runs")
    with pytest.raises(JournalMismatchError, match="lora_rank: the journal has 4, the program asks for 8"):
        await journaled.run()
    assert created == []


async def test_a_failed_operation_fails_again_without_being_executed(
    started: Callable[..., Restartable], engine: WatchedEngine, local: LocalService
) -> None:
    async def program(service: ServiceClient) -> tuple[str, str | None]:
        trainer = await service.create_lora_training_client(engine.name, rank=4)
        with pytest.raises(RemoteOpError) as raised:
            await (await trainer.forward_backward([REFUSED]))
        await (await trainer.forward_backward([example()]))
        return str(raised.value), raised.value.error_class

    journaled = started(program)
    seen = await journaled.run()
    sent = local.faults.watch("POST */forward_backward", times=9)
    assert await journaled.run() == seen
    assert sent == []
    assert len(engine.done) == 1


async def test_a_refused_operation_keeps_its_place(
    started: Callable[..., Restartable], engine: WatchedEngine, local: LocalService
) -> None:
    async def program(service: ServiceClient) -> float:
        trainer = await service.create_lora_training_client(engine.name, rank=4)
        with pytest.raises(InputError):
            await trainer.forward_backward([])
        local.faults.answer("POST */optim_step", 422, {"error": "no"})
        with pytest.raises(Exception, match="422"):
            await trainer.optim_step(AdamParams(learning_rate=7))
        return (await (await trainer.forward_backward([example()]))).loss

    journaled = started(program)
    assert await journaled.run() == await journaled.run()
    assert engine.done == [("forward_backward", 1)]


@pytest.mark.parametrize("is_executed", [True, False])
async def test_a_call_that_is_made_again_keeps_its_place(
    started: Callable[..., Restartable],
    engine: WatchedEngine,
    local: LocalService,
    monkeypatch: pytest.MonkeyPatch,
    is_executed: bool,
) -> None:
    monkeypatch.setattr(submitter, "OPERATION", replace(retry.OPERATION, lost=None, turned_away=None))
    is_first = True

    async def program(service: ServiceClient) -> None:
        trainer = await service.create_lora_training_client(engine.name, rank=4)
        if is_first:
            if is_executed:
                local.faults.lose_answer("POST */optim_step")
            else:
                local.faults.answer("POST */optim_step", 429)
            with pytest.raises(LoopsError):
                await trainer.optim_step(AdamParams(learning_rate=7))
        await trainer.optim_step(AdamParams(learning_rate=7))
        await (await trainer.forward_backward([example()]))

    journaled = started(program)
    await journaled.run()
    is_first = False
    await journaled.run()
    assert engine.done == [("optim_step", 7), ("forward_backward", 1)]


async def test_the_session_that_ended_is_said(
    started: Callable[..., Restartable], engine: WatchedEngine, local: LocalService
) -> None:
    await started(training(engine)).run()
    local.faults.answer("GET */sessions/*", 404, {"error": {"message": "no"}})
    with pytest.raises(JournalError, match=r"session .* no longer exists\. Start again with a new journal"):
        await started(training(engine)).run()


@pytest.mark.parametrize("by_program", [True, False])
async def test_a_run_that_was_deactivated_is_said_with_its_last_state(
    colour: Colour, local: LocalService, started: Callable[..., Restartable], engine: WatchedEngine, by_program: bool
) -> None:
    ids: list[str] = []

    async def program(service: ServiceClient) -> None:
        trainer = await service.create_lora_training_client(engine.name, rank=4)
        ids.append(trainer.run_id)
        await (await trainer.save_state("first"))
        await (await trainer.save_state("second"))
        if by_program:
            await trainer.deactivate()

    await started(program).run()
    if not by_program:
        async with colour.connected(base_url=local.base_url, api_key=local.api_key) as other:
            await other.control_plane.deactivate_run(ids[0])
    what = "was deactivated by this program" if by_program else "has ended"
    with pytest.raises(JournalError, match=rf"run {ids[0]} .*{what}.*from_state\('bt://loops:{ids[0]}/weights/second"):
        await started(program).run()


async def test_an_outcome_that_is_gone_is_not_made_again(
    started: Callable[..., Restartable], engine: WatchedEngine, local: LocalService
) -> None:
    async def program(service: ServiceClient) -> None:
        trainer = await service.create_lora_training_client(engine.name, rank=4)
        await (await trainer.optim_step(AdamParams(learning_rate=7)))

    journaled = started(program)
    await journaled.kill_at("GET */operations/*", 2, is_executed=False)
    local.faults.answer("GET */operations/*", 404, {"error": "unknown"}, times=9)
    with pytest.raises(UnknownRequestError) as raised:
        await journaled.run()
    assert "has it as accepted, and no outcome" in all_that_it_shows(raised.value)
    assert engine.done == [("optim_step", 7)]


async def test_what_the_service_may_have_forgotten_is_not_sent_again(
    started: Callable[..., Restartable],
    engine: WatchedEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def program(service: ServiceClient) -> None:
        trainer = await service.create_lora_training_client(engine.name, rank=4)
        await (await trainer.optim_step(AdamParams(learning_rate=7)))

    journaled = started(program)
    await journaled.kill_at("POST */optim_step", is_executed=True)
    monkeypatch.setattr(journal, "KEPT_SECONDS", -1.0)
    with pytest.raises(JournalError, match=r"may have executed operation 1.*or may not.*no training state"):
        await journaled.run()
    assert engine.done == [("optim_step", 7)]


async def test_samples_are_made_again_unless_they_are_recorded(
    started: Callable[..., Restartable], engine: WatchedEngine, jobs: list[SampleJob], path: Path
) -> None:
    async def program(service: ServiceClient) -> list[Any]:
        sampler = await service.create_sampling_client(engine.name)
        many = [done async for done in sampler.sample_many([PROMPT, [1, 2], PROMPT], sampling_params=FEW_TOKENS)]
        scores = await sampler.compute_logprobs(PROMPT)
        many.sort(key=lambda done: done.index)
        return [[each.response and each.response.sequences for each in many], scores, sampler.sampler_id]

    await started(program).run()
    await started(program).run()
    assert len(jobs) == 8
    seen = await started(program, journal_samples=True).run()
    assert len(jobs) == 12
    assert await started(program, journal_samples=True).run() == seen
    assert len(jobs) == 12


async def test_processes_cannot_record_samples(started: Callable[..., Restartable], engine: WatchedEngine) -> None:
    async def program(service: ServiceClient) -> None:
        sampler = await service.create_sampling_client(engine.name)
        async for _ in sampler.sample_many([PROMPT], processes=1):
            pass

    with pytest.raises(InputError, match="processes: cannot be used with journal_samples=True"):
        await started(program, journal_samples=True).run()


async def test_a_run_from_a_state_is_the_same_again(
    started: Callable[..., Restartable], engine: WatchedEngine, local: LocalService
) -> None:
    async def program(service: ServiceClient) -> tuple[str, str, Any]:
        first = await service.create_lora_training_client(engine.name, rank=4)
        await first.optim_step(AdamParams(learning_rate=1))
        saved = await (await first.save_state("one"))
        second = await service.create_training_client_from_state_with_optimizer(saved.path)
        step = await (await second.optim_step(AdamParams(learning_rate=2)))
        return first.run_id, second.run_id, step.metrics

    journaled = started(program)
    seen = await journaled.run()
    assert await journaled.run() == seen
    assert engine.done == [("optim_step", 1), ("optim_step", 2)]


async def test_two_programs_cannot_share_a_journal(
    colour: Colour, local: LocalService, started: Callable[..., Restartable], path: Path
) -> None:
    async def program(service: ServiceClient) -> None:
        with pytest.raises(JournalError, match=r"train\.journal is in use"):
            async with colour.connected(base_url=local.base_url, api_key=local.api_key, journal=path):
                pass

    await started(program).run()
    await started(program).run()


async def test_no_secret_is_in_it(
    started: Callable[..., Restartable], engine: WatchedEngine, local: LocalService, path: Path
) -> None:
    await started(training(engine), journal_samples=True).kill_at("POST */save_state", is_executed=True)
    content = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"forward_backward" in content
    assert local.api_key.encode() not in content


async def test_its_arguments_are_checked(colour: Colour, local: LocalService) -> None:
    with pytest.raises(ConfigError, match="journal_samples=True needs journal=PATH"):
        async with colour.connected(base_url=local.base_url, api_key=local.api_key, journal_samples=True):
            pass


async def test_a_failed_creation_is_tried_again(
    started: Callable[..., Restartable], engine: WatchedEngine, local: LocalService
) -> None:
    async def program(service: ServiceClient) -> str:
        return (await service.create_lora_training_client(engine.name, rank=4)).run_id

    local.faults.answer("POST */runs", 422, {"error": "no"})
    with pytest.raises(Exception, match="422"):
        await started(program).run()
    assert await started(program).run() == await started(program).run()


# --- serverless ---


@pytest.fixture(scope="module")
def serverless(engines: Engines) -> Iterator[LocalService]:
    with serve_in_thread(engine=engines, provisioning_seconds=0.0, serverless=True) as local:
        yield local


@pytest.mark.parametrize(
    ("route", "is_executed"),
    [
        ("POST */save_weights_for_sampler", True),  # whose name is a new one each time
        ("POST */sample", True),  # which is not executed again under the same key
        ("GET */queue/operations/*", False),
    ],
)
async def test_a_queue_executes_a_killed_sample_once(
    colour: Colour,
    serverless: LocalService,
    engine: WatchedEngine,
    jobs: list[SampleJob],
    path: Path,
    route: str,
    is_executed: bool,
) -> None:
    async def program(service: ServiceClient) -> Any:
        trainer = await service.create_lora_training_client(engine.name, rank=4)
        await trainer.optim_step(AdamParams(learning_rate=1))
        sampler = await trainer.save_weights_and_get_sampling_client("policy")
        return [sampler.checkpoint_path, (await sampler.sample(PROMPT, 1, FEW_TOKENS)).sequences]

    journaled = Restartable(colour, serverless, path, program, journal_samples=True)
    await journaled.kill_at(route, is_executed=is_executed)
    seen = await journaled.run()
    assert await journaled.run() == seen
    assert len(jobs) == 1
    assert engine.done == [("optim_step", 1)]


# --- rollouts ---


def rolling(engine: WatchedEngine, *, minibatches: int = 1) -> Program:
    """Return a program that trains on rollouts."""

    async def program(service: ServiceClient) -> list[Any]:
        seen: list[Any] = []
        trainer = await service.create_lora_training_client(engine.name, rank=4)
        options: dict[str, Any] = {**PAIRS, "max_staleness": 1, "minibatches": minibatches, "seed": 3}
        async with trainer.rollouts(one_turn, range(8), **options) as stream:
            async for batch in stream:
                number = len(seen) + 1
                step = await trainer.forward_backward(batch.data, "importance_sampling")
                if batch.is_last_of_step:
                    await trainer.optim_step(AdamParams(learning_rate=number))
                    await stream.publish()
                seen.append(
                    [json.loads(batch.to_json()), (await step).loss, stream.version, stream.gate.accepted >= number]
                )
            seen.append(stream.state())
        return seen

    return program


@pytest.mark.parametrize(
    ("route", "number", "is_executed", "minibatches"),
    [
        ("POST */optim_step", 1, False, 1),
        ("POST */forward_backward", 3, True, 1),
        ("POST */forward_backward", 4, True, 2),
        ("POST */save_weights_for_sampler", 5, True, 2),
    ],
)
async def test_a_killed_loop_of_rollouts_trains_on_each_batch_once(
    started: Callable[..., Restartable],
    engine: WatchedEngine,
    jobs: list[SampleJob],
    route: str,
    number: int,
    is_executed: bool,
    minibatches: int,
) -> None:
    program = started(rolling(engine, minibatches=minibatches), journal_samples=True)
    await program.kill_at(route, number, is_executed=is_executed)
    seen = await program.run()
    assert [each for each in engine.done if each[0] == "optim_step"] == [
        ("optim_step", minibatches * step) for step in (1, 2, 3, 4)
    ]
    assert [name for name, _ in engine.done].count("forward_backward") == 4 * minibatches
    tasks = [group["index"] for batch, *_ in seen[:-1] for group in batch["groups"]]
    assert sorted(tasks) == list(range(8))
    paid = len(jobs)
    assert await program.run() == seen
    assert len(jobs) == paid


async def test_recorded_batches_need_no_rollout(
    started: Callable[..., Restartable], engine: WatchedEngine, jobs: list[SampleJob]
) -> None:
    program = started(rolling(engine))
    seen = await program.run()
    assert len(jobs) == 16
    assert await program.run() == seen
    assert len(jobs) == 16


async def test_tasks_without_a_json_form_are_not_recorded(
    started: Callable[..., Restartable], engine: WatchedEngine
) -> None:
    tasks: list[Any] = [object(), {"id": 1, "of": np.arange(2)}]

    async def rollout(ctx: RolloutContext, task: object) -> Episode:
        return await one_turn(ctx, ctx.index)

    async def program(service: ServiceClient) -> list[Any]:
        trainer = await service.create_lora_training_client(engine.name, rank=4)
        async with trainer.rollouts(rollout, tasks, **PAIRS) as stream:
            return [group.task for batch in await loop(trainer, stream) for group in batch.groups]

    journaled = started(program)
    assert await journaled.run() == tasks
    assert await journaled.run() == [None, {"id": 1, "of": [0, 1]}]


async def test_a_caller_that_is_cancelled_misses_no_batch(
    local: LocalService, engine: WatchedEngine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, is_recorded = journal.Journal.put_batch, asyncio.Event()

    async def held(self: journal.Journal, *args: Any) -> None:
        await put(self, *args)
        if not is_recorded.is_set():
            is_recorded.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(journal.Journal, "put_batch", held)
    async with Async().connected(base_url=local.base_url, api_key=local.api_key, journal=path) as service:
        trainer = await service.create_lora_training_client(engine.name, rank=4)
        async with trainer.rollouts(one_turn, range(4), **PAIRS) as stream:
            impatient = asyncio.ensure_future(anext(stream))
            await is_recorded.wait()
            impatient.cancel()
            with pytest.raises(asyncio.CancelledError):
                await impatient
            assert sorted(tasks_of(await loop(trainer, stream))) == [0, 1, 2, 3]

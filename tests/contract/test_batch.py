"""Batches in both forms: each row has one record in the end, and nothing is asked twice, wherever a run ended."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from codecs import BOM_UTF8
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import loops_async
from loops_async import BatchReport, BatchSettings, InputError, SamplingClient, SamplingParams, ServiceClient
from loops_local import LocalService
from loops_local.engine.base import SampleJob
from tests.support.batches import TWO_TOKENS, Batch, prompts_of, rows
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import eventually


@pytest.fixture
async def sampler(service: ServiceClient, engine: WatchedEngine) -> SamplingClient:
    return await service.create_sampling_client(engine.name)


@pytest.fixture
def batch(tmp_path: Path, colour: Colour, sampler: SamplingClient) -> Batch:
    return Batch(tmp_path, colour, sampler)


async def test_each_row_gets_one_record(batch: Batch) -> None:
    batch.give([{"id": 5, **rows(1)[0]}, *rows(9, 1)])

    report = await batch.run(settings=BatchSettings.of(batch.sampler, num_samples=2, sampling_params=TWO_TOKENS))

    assert report == BatchReport(rows=10, answered=10)
    records = batch.by_index()
    assert sorted(records) == list(range(10))
    first = records[0]
    assert (first["id"], first["label"], first["prompt"]) == (5, "row 0", [0, 7])
    assert [completion["tokens"] for completion in first["completions"]] == [[0, 7], [7, 0]]
    assert first["completions"][0].keys() == {"text", "tokens", "logprobs", "stop_reason"}
    assert first["policy_version"] == 0
    assert first["request_id"]
    assert {len(record["key"]) for record in records.values()} == {32}
    described = json.loads(batch.settings_file.read_text())
    assert {record["settings"] for record in records.values()} == {described["digest"]}
    assert (described["num_samples"], described["sampling_params"]["max_tokens"]) == (2, 2)


async def test_resuming_asks_for_what_is_missing(batch: Batch, jobs: list[SampleJob]) -> None:
    batch.give(rows(20))
    await batch.run()
    lines = batch.target.read_bytes().splitlines(keepends=True)
    batch.target.write_bytes(b"".join(lines[:12]) + lines[12][:30])
    jobs.clear()

    assert await batch.run() == BatchReport(rows=20, already=12, answered=20)

    assert len(jobs) == 8
    assert len(batch.by_index()) == 20
    jobs.clear()
    assert await batch.run() == BatchReport(rows=20, already=20, answered=20)
    assert not jobs


async def test_more_and_reordered_rows_go_on(batch: Batch, jobs: list[SampleJob]) -> None:
    batch.give(rows(4))
    await batch.run()
    jobs.clear()
    batch.give(reversed(rows(6)))

    assert (await batch.run()).answered == 6

    assert prompts_of(jobs) == Counter([4, 5])


async def test_equal_rows_are_answered_each(batch: Batch, jobs: list[SampleJob]) -> None:
    batch.give([*rows(1), *rows(1), *rows(2)])
    await batch.run()
    records = batch.by_index()
    key = records[0]["key"]
    assert [records[index]["key"] for index in range(3)] == [key, f"{key}#1", f"{key}#2"]
    lines = batch.target.read_bytes().splitlines(keepends=True)
    batch.target.write_bytes(b"".join(line for line in lines if b"#1" not in line))
    jobs.clear()

    assert (await batch.run()).already == 3

    assert len(jobs) == 1
    assert Counter(record["key"] for record in batch.records()) == Counter(
        [key, f"{key}#1", f"{key}#2", records[3]["key"]]
    )


async def test_answers_to_rows_that_are_gone(batch: Batch, jobs: list[SampleJob]) -> None:
    batch.give([*rows(5), *rows(1)])
    await batch.run()
    batch.give(rows(4))
    jobs.clear()

    assert "has 2 answers to rows that the input does not have" in await batch.refuses()
    batch.give([*rows(4), *rows(1, 9)])
    assert await batch.run(drop_stale=True) == BatchReport(rows=5, already=4, answered=5, stale=2)

    assert prompts_of(jobs) == Counter([9])
    assert len(batch.stale.read_bytes().splitlines()) == 2
    assert sorted(record["prompt"][0] for record in batch.records()) == [0, 1, 2, 3, 9]


async def test_other_settings_are_named_and_refused(batch: Batch, jobs: list[SampleJob]) -> None:
    batch.give(rows(3))
    await batch.run()
    jobs.clear()
    warmer = BatchSettings.of(batch.sampler, sampling_params=SamplingParams(max_tokens=2, temperature=0.5))

    refusal = await batch.refuses(settings=warmer)
    assert "temperature was 1.0 and is now 0.5" in refusal
    assert "max_tokens" not in refusal
    assert not jobs

    assert await batch.run(settings=warmer, append=True) == BatchReport(rows=3, answered=3)
    assert Counter(record["settings"] for record in batch.records()) == {batch.settings.digest: 3, warmer.digest: 3}
    assert await batch.run(append=True) == BatchReport(rows=3, already=3, answered=3)
    described = json.loads(batch.settings_file.read_text())
    assert [described["digest"], *(each["digest"] for each in described["earlier"])] == [
        batch.settings.digest,
        warmer.digest,
    ]


async def test_errors_that_stay_are_asked_again_on_request(
    batch: Batch, local: LocalService, jobs: list[SampleJob]
) -> None:
    batch.give(rows(6))
    local.faults.answer("POST */sample", 422, {"message": "not this one"})

    assert await batch.run(limit=1) == BatchReport(rows=6, answered=5, failed=1)

    [error] = [record["error"] for record in batch.records() if "error" in record]
    assert (error["type"], error["status"], error["retryable"]) == ("BadRequestError", 422, False)
    assert "not this one" in error["message"]
    assert error.keys() == {"type", "message", "retryable", "status", "request_id"}
    jobs.clear()
    assert await batch.run() == BatchReport(rows=6, already=5, answered=5, failed=1)
    assert not jobs
    assert await batch.run(retry_errors=True) == BatchReport(rows=6, already=5, answered=6)
    assert len(batch.by_index()) == 6


async def test_errors_that_may_pass_are_asked_again(
    service: ServiceClient, batch: Batch, local: LocalService, jobs: list[SampleJob]
) -> None:
    batch.give(rows(3))
    local.faults.answer("POST */sample", 429, {"message": "not now"}, times=10_000)
    batch.sampler = await service.create_sampling_client(batch.sampler.get_base_model(), ready_timeout=1.0)

    assert await batch.run() == BatchReport(rows=3, failed=3, retryable=3)

    assert {record["error"]["status"] for record in batch.records()} == {429}
    local.faults.clear()
    assert await batch.run() == BatchReport(rows=3, answered=3)
    assert len(jobs) == 3
    assert len(batch.by_index()) == 3


async def test_lines_that_are_no_rows_stop_nothing(batch: Batch, jobs: list[SampleJob]) -> None:
    wrong = ["{", '{"prompt": 3, "id": "x"}', '{"id": 1}', "[1]", '{"prompt": [1], "messages": []}', '"\\ud800"']
    batch.give([*wrong, "", *rows(2)])

    report = await batch.run()

    assert report == BatchReport(rows=8, answered=2, failed=6)
    records = batch.by_index()
    assert {records[index]["error"]["type"] for index in range(6)} == {"InvalidLine"}
    assert records[1]["id"] == "x"
    assert "prompt: expected" in records[1]["error"]["message"]
    assert 'either "prompt" or "messages"' in records[2]["error"]["message"]
    jobs.clear()
    batch.give([*rows(1, 5), *rows(2)])  # corrected
    assert (await batch.run()).answered == 3
    assert prompts_of(jobs) == Counter([5])


async def test_files_of_windows_have_the_same_rows(batch: Batch, jobs: list[SampleJob]) -> None:
    batch.give(rows(3))
    await batch.run()
    jobs.clear()
    batch.source.write_bytes(BOM_UTF8 + b"\r\n".join(json.dumps(row).encode() for row in rows(3)))
    assert await batch.run() == BatchReport(rows=3, already=3, answered=3)
    assert not jobs


async def test_rows_with_a_name_of_ours_are_refused(batch: Batch, jobs: list[SampleJob]) -> None:
    batch.give([*rows(3), {"prompt": [1], "key": "mine"}])
    assert "in.jsonl:4: has the field 'key'" in await batch.refuses()
    assert not jobs


async def test_files_that_cannot_be_used(batch: Batch) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        await batch.run()
    batch.give(rows(1))
    for precious in ("my diary\n", "my diary"):
        batch.target.write_text(precious)
        assert "is not a line that `loops sample` wrote" in await batch.refuses()
    batch.target.unlink()
    batch.target.mkdir()
    with pytest.raises(InputError, match="must be a file"):
        await batch.run()
    batch.target.rmdir()
    os.link(batch.source, batch.target)
    with pytest.raises(InputError):
        await batch.run()


async def test_a_hopeless_error_ends_the_asking_and_loses_no_answer(
    batch: Batch, local: LocalService, engine: WatchedEngine, jobs: list[SampleJob]
) -> None:
    batch.give(rows(200))
    engine.hold_samples()
    running = asyncio.ensure_future(batch.run(limit=4))
    await eventually(lambda: engine.waiting_samples == 4)
    local.faults.answer("POST */sample", 401, {"error": "no such key"}, times=1000)
    engine.release_samples()

    async with asyncio.timeout(PATIENCE_SECONDS):
        report = await running

    assert isinstance(report.stopped, loops_async.AuthenticationError)
    assert (report.rows, report.answered, report.failed) == (200, 4, 0)
    assert len(batch.records()) == len(jobs) == 4
    local.faults.clear()
    assert (await batch.run()).answered == 200
    assert max(prompts_of(jobs).values()) == 1


async def test_a_budget_ends_the_asking_and_loses_no_answer(batch: Batch, service: ServiceClient) -> None:
    batch.give(rows(20))
    service.budget = loops_async.Budget(samples=service.usage.samples + 6)
    report = await batch.run(limit=2)
    assert isinstance(report.stopped, loops_async.BudgetExceededError)
    assert (report.rows, report.answered, report.failed) == (20, 6, 0)
    service.budget = None
    assert (await batch.run()).answered == 20


async def test_a_limit_of_failures(batch: Batch, local: LocalService) -> None:
    batch.give(["{", *rows(100)])
    local.faults.answer("POST */sample", 422, {"message": "not this one"}, times=1000)

    report = await batch.run(limit=1, max_failures=3)

    assert "3 rows have failed" in str(report.stopped)
    assert 4 <= report.failed <= 6
    with pytest.raises(InputError, match="max_failures"):
        await batch.run(max_failures=0)


async def test_progress_is_reported(batch: Batch) -> None:
    batch.give(rows(9))
    seen: list[BatchReport] = []
    report = await batch.run(on_progress=seen.append)
    assert (seen[0].rows, seen[0].answered, seen[-1].answered) == (9, 0, 9)
    assert [each.answered for each in seen] == sorted(each.answered for each in seen)
    assert report.answered == 9


async def test_progress_is_logged_where_nothing_shows_it(
    batch: Batch, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("loops_async._batch.progress.PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr("loops_async._batch.file_batch.has_terminal", lambda: False)
    batch.give(rows(9))
    engine.hold_samples()
    with caplog.at_level(logging.INFO, "loops_async.sampling"):
        running = asyncio.ensure_future(batch.run())
        await eventually(lambda: "in.jsonl: 0 of 9 prompts answered, 0 failed" in caplog.text)
        engine.release_samples()
        await running


async def test_a_limit_beyond_the_open_files_is_told(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("loops_async._http.settings.open_file_limit", lambda: 64)
    batch.give(rows(1))
    two = BatchSettings.of(batch.sampler, num_samples=2, sampling_params=TWO_TOKENS)
    await batch.run(settings=two, limit=97)  # 48 requests
    assert "in flight" not in caplog.text
    await batch.run(settings=two, limit=98)
    assert "allows 49 requests in flight, but this process can have only 48" in caplog.text
    assert "for all of them, run `ulimit -n 66` before the program" in caplog.text
    monkeypatch.setenv("BT_LOOPS_MAX_CONNECTIONS", "3")
    await batch.run(settings=two, limit=8)
    assert "for all of them, set BT_LOOPS_MAX_CONNECTIONS=4" in caplog.text


async def test_another_run_at_the_same_time_is_refused(batch: Batch, engine: WatchedEngine) -> None:
    batch.give(rows(9))
    batch.lock.write_text("of a process that was killed")
    engine.hold_samples()
    running = asyncio.ensure_future(batch.run())
    await eventually(lambda: engine.waiting_samples == 4)

    assert f"another run, process {os.getpid()} on " in await batch.refuses()

    engine.release_samples()
    assert (await running).answered == 9
    assert not batch.lock.exists()
    assert (await batch.run()).already == 9


async def test_a_disk_that_is_full_ends_the_batch(
    batch: Batch, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    batch.give(rows(300))
    with monkeypatch.context() as broken:
        broken.setattr("loops_async._batch.writer.write_records", full)
        with pytest.raises(OSError, match="No space left"):
            await batch.run()
    assert engine.waiting_samples == 0
    assert (await batch.run()).answered == 300


async def test_prompt_logprobs_that_are_asked_for_are_written(batch: Batch) -> None:
    batch.give(rows(1))
    settings = BatchSettings.of(batch.sampler, sampling_params=TWO_TOKENS, topk_prompt_logprobs=2)
    await batch.run(settings=settings)
    [record] = batch.records()
    assert len(record["prompt_logprobs"]) == 2
    assert len(record["topk_prompt_logprobs"][1]) == 2
    assert "topk_prompt_logprobs" in await batch.refuses()
    batch.give([{"prompt": [1], "prompt_logprobs": []}])
    assert "has the field 'prompt_logprobs'" in await batch.refuses(settings=settings)


async def test_rows_without_files(colour: Colour, batch: Batch, local: LocalService) -> None:
    sample_rows = colour.function("sample_rows")
    given = [*rows(3), {"prompt": 3}, {"prompt": None, "messages": None}]

    records = await sample_rows(batch.sampler, given, settings=batch.settings, limit=2)

    assert len(records) == 5
    assert sum("completions" in record for record in records) == 3
    assert all("index" not in record for record in records)
    keys = {loops_async.row_key(row, batch.settings.digest) for row in given}
    assert {record["key"] for record in records} == keys
    local.faults.answer("POST */sample", 401, {"error": "no such key"}, times=100)
    with pytest.raises(loops_async.AuthenticationError):
        await sample_rows(batch.sampler, rows(9), settings=batch.settings)
    with pytest.raises(InputError, match=r"rows\[1\]: has the field 'index'"):
        await sample_rows(batch.sampler, [*rows(1), {"prompt": [1], "index": 3}], settings=batch.settings)


async def test_settings_of_clients(service: ServiceClient, engine: WatchedEngine, batch: Batch) -> None:
    trainer = await service.create_lora_training_client(engine.name, rank=8)
    live = await trainer.save_weights_and_get_sampling_client("one")
    settings = BatchSettings.of(live)
    assert (settings.base_model, settings.run_id, settings.checkpoint_path) == (engine.name, trainer.run_id, None)
    saved = await (await trainer.save_weights_for_sampler("two")).result()
    of_checkpoint = BatchSettings.of(await trainer.create_sampling_client(saved.path))
    assert (of_checkpoint.run_id, of_checkpoint.checkpoint_path) == (None, saved.path)
    assert len({settings.digest, of_checkpoint.digest, batch.settings.digest}) == 3

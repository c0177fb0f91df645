"""Batches on Ray: how they are planned, what is refused before anything is sent, and how they go on."""

from __future__ import annotations

import asyncio
import logging
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.data._internal.logical.optimizers import get_execution_plan

from loops_async import BatchSettings, ConfigError, InputError, SamplingClient, SamplingParams
from loops_async._batch.lock import only_run
from loops_async.ray import Sampler, SharedLimit, sample
from loops_local import LocalService

from .conftest import API_KEY, CountingEngine
from .programs import SETTINGS, SMALL, eventually, run
from .rows import records, rows, write

pytestmark = pytest.mark.usefixtures("connected")


def operators(operator: Any) -> list[str]:
    below = [name for each in operator.input_dependencies for name in operators(each)]
    return [*below, operator.name]


async def test_each_block_stays_one(sampler: SamplingClient) -> None:
    ds = sample(ray.data.from_items(rows(10)), sampler, settings=SETTINGS, workers=1, limit=4, rows_per_block=5)
    assert ds.context.target_max_block_size is None
    names = operators(get_execution_plan(ds._logical_plan)[0].dag)
    assert names[-1] == "MapBatches(Sampler)"  # joined with no other step
    assert names[-2].startswith("StreamingRepartition[num_rows_per_block=5,strict=True]")


async def test_what_is_wrong_is_refused_before_anything_is_sent(
    sampler: SamplingClient, engine: CountingEngine, tmp_path: Path
) -> None:
    good = rows(4)
    for number, (wrong, options, problem) in enumerate(
        [
            ([*good, good[0]], {}, "1 rows that are equal to others"),
            ([*good, {"prompt": [1], "key": "x"}], {}, "'key'"),
            (good, {"limit": 1}, "limit: must be at least the number of workers, 2"),
            (good, {"workers": 0}, "workers"),
        ]
    ):
        source = write(tmp_path / f"in{number}", wrong, "jsonl")
        with pytest.raises(Exception, match=problem) as caught:
            await run(sampler, source, tmp_path / "out", **options)
        assert isinstance(caught.value, InputError)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="source: must be files of JSON lines"):
        await run(sampler, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="target: must be a folder"):
        await run(sampler, source, source / "0.jsonl")
    (tmp_path / "out").mkdir()
    with (
        only_run(tmp_path / "out" / "_loops_batch.lock", "a test"),
        pytest.raises(InputError, match="target: another run"),
    ):
        await run(sampler, source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert not engine.one.counts


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
async def test_a_batch_goes_on(
    service: LocalService,
    sampler: SamplingClient,
    engine: CountingEngine,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("loops_async._batch.progress.PROGRESS_SECONDS", 0.5)
    monkeypatch.setattr("loops_async._ray.batch.has_terminal", lambda: False)
    caplog.set_level(logging.INFO, "loops_async.sampling")
    source, target = write(tmp_path / "in", rows(40), kind), tmp_path / "out"
    service.faults.answer("POST */sample", 422, {"message": "not this one"})
    engine.one.hold(20)
    running = asyncio.create_task(run(sampler, source, target))
    await eventually(lambda: "20 of 40 prompts answered, 1 failed" in caplog.text)
    engine.one.release()
    first = await running
    assert (first.rows, first.answered, first.failed, first.already, first.stopped) == (40, 39, 1, 0, None)
    assert engine.one.most_in_flight <= SMALL["limit"]
    assert not list(target.glob("*.lock"))
    other = BatchSettings(base_model="counting", sampling_params=SamplingParams(max_tokens=201))
    with pytest.raises(InputError, match="max_tokens was 200 and is now 201"):
        await run(sampler, source, target, settings=other)
    [failed] = [each["id"] for each in records(target) if each.get("error")]
    gone = set(range(8)) - {failed}
    write(source, list(reversed(rows(40, first=8))), kind)  # 8 are gone, 8 are new
    with pytest.raises(InputError, match=f"has {len(gone)} records of rows that are gone"):
        await run(sampler, source, target)
    assert engine.one.counts.total() == 39
    whole = next(target.glob("part-*"))
    (target / f"part-half.{kind}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])

    second = await run(sampler, source, target, drop_stale=True, retry_errors=True)

    already = 39 - len(gone)
    assert (second.rows, second.answered, second.failed) == (40, 40, 0)
    assert (second.already, second.stale) == (already, len(gone))
    assert engine.one.counts.total() == 39 + 40 - already
    assert sorted(each["id"] for each in records(target)) == list(range(8, 48))
    assert {each["id"] for each in records(target / "_stale")} == gone
    assert [each.name for each in (target / "_incomplete").iterdir()] == [f"part-half.{kind}"]


async def test_a_worker_says_what_its_node_lacks(
    sampler: SamplingClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there: SamplingClient = pickle.loads(pickle.dumps(sampler))
    with pytest.raises(ConfigError, match=r"on node .*BASETEN_API_KEY"):
        await Sampler(there, settings=SETTINGS, limit=100)(pa.Table.from_pylist(rows(1)))
    monkeypatch.setenv("BASETEN_API_KEY", API_KEY)
    monkeypatch.setattr("loops_async._http.settings.open_file_limit", lambda: 64)
    limit = SharedLimit(100)
    [record] = (await Sampler(there, settings=SETTINGS, limit=limit)(pa.Table.from_pylist(rows(1)))).to_pylist()
    assert record["completions"]
    assert await limit.sampled() == (1, 0)  # also of a worker that Ray ends now
    assert "run `ulimit -n 134` before the program" in caplog.text


def test_a_dataset_does_not_end_as_if_it_were_whole(service: LocalService, sampler: SamplingClient) -> None:
    service.faults.answer("POST */sample", 401, {"error": "no such key"}, times=100_000)
    ds = sample(ray.data.from_items(rows(8)), sampler, settings=SETTINGS, workers=1, limit=4, num_cpus=0.5)
    with pytest.raises(ray.exceptions.RayTaskError, match=r"AuthenticationError: .* no such key"):
        ds.materialize()

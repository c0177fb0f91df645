"""Exactly one record for each row, whichever process is killed. What was paid for is counted by the service.

The points of the kills are a fixed plan: each run over a dataset takes seconds, so few can be tried. The service holds
all answers at each point, so that it is the same on every machine.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from loops_async import AuthenticationError, BatchReport, SamplingClient
from loops_local import LocalService

from .conftest import API_KEY, CountingEngine
from .programs import SMALL, Driver, eventually, kill, processes, run
from .rows import records, rows, write

ROWS = 500
IN_WORKER = int(SMALL["rows_per_block"] * SMALL["blocks_per_worker"])

pytestmark = pytest.mark.usefixtures("connected")


def check_runs(job: asyncio.Task[BatchReport]) -> None:
    assert not job.done(), job.result()


def check(target: Path, engine: CountingEngine, name: str) -> int:
    """Check that there is one record for each row; return how many rows were paid for again."""
    found = records(target)
    assert sorted(record["id"] for record in found) == list(range(ROWS))
    assert all(record["label"] == f"l{record['id']}" and record["completions"][0]["tokens"] for record in found)
    assert len({record["key"] for record in found}) == ROWS
    again = engine.one.counts.total() - ROWS
    print(f"KILLS {name}: {ROWS} rows asked, {len(found)} records, {again} paid again")
    return again


SAMPLES, KEEPS_THE_LIMIT, DOES_TASKS = "MapWorker", "_Keeper", "ray::IDLE"


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("jsonl", [(1, SAMPLES), (200, KEEPS_THE_LIMIT), (300, SAMPLES)]),
        ("parquet", [(100, SAMPLES), (200, DOES_TASKS), (ROWS - 5, SAMPLES)]),
    ],
)
async def test_workers_are_killed(
    kind: str, plan: list[tuple[int, str]], sampler: SamplingClient, engine: CountingEngine, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "in", rows(ROWS), kind), tmp_path / "out"
    others = processes(SAMPLES) | processes(KEEPS_THE_LIMIT)  # of jobs before, which Ray is ending
    engine.one.hold(0)
    running = asyncio.create_task(run(sampler, source, target))
    for answered, name in plan:
        engine.one.hold(answered)
        await eventually(lambda: engine.one.is_holding, lambda: check_runs(running))
        kill((processes(name) - others).pop())
    engine.one.release()
    report = await running
    assert (report.rows, report.answered, report.failed, report.stopped) == (ROWS, ROWS, 0, None)
    assert check(target, engine, f"{len(plan)} workers, {kind}") <= 2 * IN_WORKER


async def test_whatever_ends_a_job_the_next_one_goes_on(
    cluster: Cluster, service: LocalService, sampler: SamplingClient, engine: CountingEngine, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "in", rows(ROWS), "jsonl"), tmp_path / "out"
    others = processes(SAMPLES)
    driver = Driver(cluster.address, service, source, target)
    engine.one.hold(150)
    await eventually(lambda: engine.one.is_holding and list(target.glob("part-*")), driver.check_runs)
    driver.kill()
    await eventually(lambda: not processes(SAMPLES) - others)
    engine.one.release()
    kept, paid = len(records(target)), engine.one.counts.total()
    assert kept > 0

    # A job that stops writes all that is under way, so none of its rows is paid for again.
    engine.one.hold(paid + 50)
    running = asyncio.create_task(run(sampler, source, target))
    await eventually(lambda: engine.one.is_holding, lambda: check_runs(running))
    running.cancel()
    while not running.done():  # slowly, so that the workers hear of it before all rows are asked for
        engine.one.answer_one_more()
        await asyncio.sleep(0.1)
    assert running.cancelled()
    assert len(records(target)) == kept + engine.one.counts.total() - paid < ROWS
    kept, paid = len(records(target)), engine.one.counts.total()

    engine.one.hold(paid + 50)
    running = asyncio.create_task(run(sampler, source, target))
    await eventually(lambda: engine.one.is_holding, lambda: check_runs(running))
    service.faults.answer("POST */sample", 401, {"error": "no such key"}, times=100_000)
    engine.one.release()
    report = await running
    service.faults.clear()
    assert isinstance(report.stopped, AuthenticationError)
    assert API_KEY not in str(report.stopped)
    assert (report.rows, report.already, report.failed) == (ROWS, kept, 0)
    assert len(records(target)) == report.answered == kept + engine.one.counts.total() - paid < ROWS
    kept, paid = report.answered, engine.one.counts.total()

    report = await run(sampler, source, target)
    assert (report.already, report.answered, report.stopped) == (kept, ROWS, None)
    assert engine.one.counts.total() - paid == ROWS - kept
    check(target, engine, "driver, then cancelled, then 401")
    assert not list(target.glob("_new*"))


async def test_a_machine_is_killed(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, sampler: SamplingClient, engine: CountingEngine, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "in", rows(ROWS), "jsonl"), tmp_path / "out"
    monkeypatch.setenv("BASETEN_API_KEY", API_KEY)  # of the new machine
    machine = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    raylet = machine.all_processes["raylet"][0].process.pid
    engine.one.hold(150)
    running = asyncio.create_task(run(sampler, source, target))
    await eventually(lambda: engine.one.is_holding and processes(SAMPLES, raylet), lambda: check_runs(running))
    kill(raylet)
    engine.one.release()
    report = await running
    assert (report.rows, report.answered) == (ROWS, ROWS)
    check(target, engine, "a machine of 2")

"""Exactly one record for each row, whichever process is killed. What was paid for is counted by the service."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from loops_local import LocalService

from .conftest import CountingEngine
from .programs import SMALL, Program, workers
from .rows import records, rows, write

ROWS = 600
IN_WORKER = SMALL["rows_per_block"] * SMALL["blocks_per_worker"]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def check(target: Path, engine: CountingEngine, name: str) -> int:
    """Check that there is one record for each row; return how many rows were paid for again."""
    found = records(target)
    assert sorted(record["id"] for record in found) == list(range(ROWS))
    assert all(record["label"] == f"l{record['id']}" and record["completions"][0]["tokens"] for record in found)
    assert len({record["key"] for record in found}) == ROWS
    again = sum(engine.one.counts.values()) - ROWS
    print(f"KILLS {name}: {ROWS} rows asked, {len(found)} records, {again} paid again")
    return again


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_two_workers_are_killed(
    kind: str, cluster: Cluster, service: LocalService, engine: CountingEngine, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "in", rows(ROWS), kind), tmp_path / "out"
    program = Program(cluster.address, service, source, target)
    for answered in (100, 300):
        engine.one.hold(answered)
        program.wait_until(lambda: engine.one.is_holding and workers(os.getpid()))
        kill(workers(os.getpid())[0])
    engine.one.release()
    report = program.report()
    assert (report["rows"], report["answered"], report["failed"]) == (ROWS, ROWS, 0)
    assert check(target, engine, f"2 workers, {kind}") <= 2 * IN_WORKER


def test_the_driver_is_killed(cluster: Cluster, service: LocalService, engine: CountingEngine, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", rows(ROWS), "jsonl"), tmp_path / "out"
    program = Program(cluster.address, service, source, target)
    engine.one.hold(ROWS // 2)
    program.wait_until(lambda: engine.one.is_holding and len(list(target.glob("part-*"))) >= 1)
    program.kill()
    engine.one.release()
    kept = len(records(target))
    assert 0 < kept < ROWS
    report = Program(cluster.address, service, source, target).report()
    assert (report["rows"], report["answered"]) == (ROWS, ROWS)
    assert report["already"] >= kept
    check(target, engine, "driver")
    assert not list(target.glob("_new*"))


def test_a_machine_is_killed(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, service: LocalService, engine: CountingEngine, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "in", rows(ROWS), "jsonl"), tmp_path / "out"
    monkeypatch.setenv("BASETEN_API_KEY", service.api_key)  # of the new machine
    machine = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    raylet = machine.all_processes["raylet"][0].process.pid
    program = Program(cluster.address, service, source, target)
    engine.one.hold(150)
    program.wait_until(lambda: engine.one.is_holding and workers(raylet))
    kill(raylet)
    engine.one.release()
    report = program.report()
    assert (report["rows"], report["answered"]) == (ROWS, ROWS)
    check(target, engine, "a machine of 2")

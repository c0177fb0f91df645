"""Batches that are cancelled, in `loops_async`: there are no tasks in `loops_sync`; and kills at any point."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import loops_async
import loops_sync
from loops_async import BatchSettings, row_key
from loops_local import LocalService
from loops_local.engine.base import SampleJob
from tests.support.batches import TWO_TOKENS, Batch, prompts_of, rows
from tests.support.colours import Async, Colour
from tests.support.engines import Engines, WatchedEngine
from tests.support.work import eventually


@pytest.fixture
def colour() -> Colour:
    return Async()


@pytest.fixture
async def batch(tmp_path: Path, colour: Colour, service: loops_async.ServiceClient, engine: WatchedEngine) -> Batch:
    return Batch(tmp_path, colour, await service.create_sampling_client(engine.name))


async def test_cancelling_writes_what_is_under_way(batch: Batch, engine: WatchedEngine, jobs: list[SampleJob]) -> None:
    batch.give(rows(50))
    engine.hold_samples()
    running = asyncio.ensure_future(batch.run())
    await eventually(lambda: engine.waiting_samples == 4)

    running.cancel()
    await asyncio.sleep(0)
    engine.release_samples()
    with pytest.raises(asyncio.CancelledError):
        await running

    asked = len(jobs)
    assert 4 <= asked <= 5
    assert len(batch.records()) == asked
    assert (await batch.run()).answered == 50
    assert max(prompts_of(jobs).values()) == 1


async def test_cancelling_twice_gives_up_what_is_under_way(batch: Batch, engine: WatchedEngine, colour: Colour) -> None:
    batch.give(rows(50))
    engine.hold_samples()
    running = asyncio.ensure_future(batch.run())
    await eventually(lambda: engine.waiting_samples == 4)

    for _ in range(2):
        running.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await running

    assert batch.records() == []
    await eventually(lambda: engine.waiting_samples == 0)


# --- kills ---

HOLD: Final = """
import pathlib, sys
from loops_async._batch.lock import only_run
with only_run(pathlib.Path(sys.argv[1]), "out.jsonl"):
    print("held", flush=True)
    sys.stdin.read()
"""


async def test_a_run_that_is_killed_gives_its_output_back(batch: Batch) -> None:
    batch.give(rows(2))
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLD, str(batch.lock), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert await other.stdout.readline() == b"held\n"
    assert f"another run, process {other.pid} on " in await batch.refuses()
    other.kill()
    await other.wait()
    assert batch.lock.exists()

    assert (await batch.run()).answered == 2

    assert not batch.lock.exists()


class Blocking:
    """A sampler of the blocking form, and what its service was asked."""

    def __init__(self, sampler: loops_sync.SamplingClient, asked: list[SampleJob]) -> None:
        self.sampler = sampler
        self.settings = BatchSettings.of(sampler, sampling_params=TWO_TOKENS)
        self.asked = asked

    def run(self, source: Path, target: Path, **options: Any) -> int:
        """Run a batch that must answer all, and return how often the service was asked."""
        self.asked.clear()
        report = loops_sync.sample_file(self.sampler, source, target, settings=self.settings, limit=3, **options)
        assert (report.answered + report.failed, report.stopped) == (report.rows, None)
        return len(self.asked)


@pytest.fixture(scope="module")
def blocking(local: LocalService, engines: Engines) -> Iterator[Blocking]:
    engine = engines("watched-in-kills")
    asked: list[SampleJob] = []
    sample = engine.sample

    def noted(job: SampleJob) -> Any:
        asked.append(job)
        return sample(job)

    engine.sample = noted  # type: ignore[method-assign]
    with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        yield Blocking(service.create_sampling_client(engine.name), asked)


def line(token: int, id_: int | str | None) -> str:
    return json.dumps({"prompt": [token]} | ({} if id_ is None else {"id": id_}))


LINES = st.lists(
    st.builds(line, st.integers(1, 3), st.sampled_from([None, 1, "1"])) | st.sampled_from(["{", "7", '{"id": 1}']),
    max_size=12,
)


@settings(max_examples=20, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(before=['{"prompt": [1]}'] * 3, more=["{"], where=0.999, order=[3, 1, 0, 2])
@given(before=LINES, more=LINES, where=st.floats(0, 1), order=st.permutations(range(24)))
def test_wherever_the_output_is_cut_each_row_has_one_record_in_the_end(
    blocking: Blocking,
    tmp_path_factory: pytest.TempPathFactory,
    before: list[str],
    more: list[str],
    where: float,
    order: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("kills")
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("\n".join(before))
    assert blocking.run(source, target) == sum("prompt" in line for line in before)

    # Whatever was under way when a process was killed, the output is a beginning of what it would be.
    whole = target.read_bytes()
    target.write_bytes(whole[: round(where * len(whole))])
    lines = [*before, *more]
    lines = [lines[number] for number in order if number < len(lines)]
    source.write_text("\n".join(lines) + "\n")
    kept = [json.loads(line) for line in target.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    asked = blocking.run(source, target)

    assert asked == sum("prompt" in line for line in lines) - sum("completions" in record for record in kept)
    records = [json.loads(line) for line in target.read_bytes().splitlines()]
    assert len({record["key"] for record in records}) == len(records) == len(lines)
    assert records[: len(kept)] == kept
    # The number behind a key only tells equal rows apart.
    objects = [json.loads(line) for line in lines if "id" in line or "prompt" in line]
    assert Counter(record["key"][:32] for record in records if "id" in record or "prompt" in record) == Counter(
        row_key(row, blocking.settings.digest) for row in objects
    )
    assert blocking.run(source, target) == 0

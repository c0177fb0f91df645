"""Batches on Ray: how they are planned, what is refused before anything is sent, and how they go on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.data._internal.logical.optimizers import get_execution_plan

from loops_async import BatchSettings, InputError, SamplingClient, SamplingParams, ServiceClient
from loops_async.ray import sample, sample_files
from loops_local import LocalService

from .conftest import CountingEngine
from .programs import SMALL
from .rows import records, rows, write

SETTINGS = BatchSettings(base_model="counting", sampling_params=SamplingParams(max_tokens=20))


@pytest.fixture(scope="module", autouse=True)
def connected(cluster: Cluster) -> Iterator[None]:
    ray.init(address=cluster.address, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
async def sampler(service: LocalService) -> AsyncIterator[SamplingClient]:
    async with ServiceClient(base_url=service.base_url, api_key=service.api_key, on_exit="leave") as client:
        yield await client.create_sampling_client("counting")


async def run(sampler: SamplingClient, source: Path, target: Path, **options: Any) -> Any:
    return await sample_files(source, target, sampler, **{"settings": SETTINGS, **SMALL, **options})


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
            (good, {"limit": 2}, "limit: must be at least the number of workers, 3"),
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
    assert not engine.one.counts
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
async def test_a_batch_goes_on(sampler: SamplingClient, engine: CountingEngine, kind: str, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", rows(40), kind), tmp_path / "out"
    first = await run(sampler, source, target)
    assert (first.rows, first.answered, first.already, first.stopped) == (40, 40, 0, None)
    with pytest.raises(InputError, match="max_tokens was 20 and is now 21"):
        await run(
            sampler,
            source,
            target,
            settings=BatchSettings(base_model="counting", sampling_params=SamplingParams(max_tokens=21)),
        )
    write(source, list(reversed(rows(40, first=8))), kind)  # 8 are gone, 8 are new
    with pytest.raises(InputError, match="has 8 records of rows that are gone"):
        await run(sampler, source, target)
    asked = sum(engine.one.counts.values())
    assert asked == 40
    second = await run(sampler, source, target, drop_stale=True)
    assert (second.rows, second.answered, second.already, second.stale) == (40, 40, 32, 8)
    assert sum(engine.one.counts.values()) == 48
    assert sorted(each["id"] for each in records(target)) == list(range(8, 48))
    assert sorted(each["id"] for each in records(target / "_stale")) == list(range(8))

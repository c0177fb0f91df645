"""Publishing: every sample gets one version, whole, whatever is published, replaced or killed meanwhile."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from loops_local import LocalService
from loops_local._execution.models import ModelHost
from loops_local._storage import adapters
from loops_local._storage.adapters import AdapterCache
from loops_local._storage.records import CheckpointRecord, Record
from loops_local._storage.store import Store
from loops_local.engine.echo import EchoAdapter, logprob
from tests.service.api import MODEL, Api
from tests.support.disk_steps import DiskSteps
from tests.support.engines import WatchedEngine
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import eventually

RANK = 8
ADAPTER_BYTES = EchoAdapter(RANK, step=0).nbytes


@pytest.fixture
def engine() -> Iterator[WatchedEngine]:
    engine = WatchedEngine(MODEL)
    yield engine
    engine.training.set()
    engine.reading.set()
    engine.release_samples()


@pytest.fixture
async def watched(serve: Callable[..., Any], engine: WatchedEngine, tmp_path: Path) -> Api:
    return await serve(engine=lambda _: engine, data_dir=tmp_path / "data")


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checkpoint of each request for an adapter, from when the request has begun to wait for it."""
    wanted: list[str] = []
    get = AdapterCache.get

    async def noted(self: AdapterCache, checkpoint_id: str, read: Any) -> Any:
        wanted.append(checkpoint_id)
        return await get(self, checkpoint_id, read)

    monkeypatch.setattr(AdapterCache, "get", noted)
    return wanted


class Hold:
    """A place where threads wait from `hold` to `release`."""

    def __init__(self) -> None:
        self._reached, self._free = threading.Event(), threading.Event()
        self._free.set()

    def hold(self) -> None:
        self._free.clear()

    def is_reached(self) -> bool:
        return self._reached.is_set()

    def release(self) -> None:
        self._free.set()

    def wait(self) -> None:
        if not self._free.is_set():
            self._reached.set()
            self._free.wait(PATIENCE_SECONDS)


@pytest.fixture
def held_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """Where the rows of checkpoints wait before they are written."""
    hold = Hold()
    put = Store.put

    def put_later(self: Store, *records: Record, delete: Sequence[Record] = ()) -> asyncio.Future[None]:
        async def work() -> None:
            await asyncio.to_thread(hold.wait)
            await put(self, *records, delete=delete)

        is_checkpoint = any(isinstance(record, CheckpointRecord) for record in records)
        return asyncio.ensure_future(work()) if is_checkpoint else put(self, *records, delete=delete)

    monkeypatch.setattr(Store, "put", put_later)
    yield hold
    hold.release()


@pytest.fixture
def held_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """Where directories wait before they are removed."""
    hold = Hold()
    rmtree = shutil.rmtree

    def rmtree_later(*args: Any, **options: Any) -> None:
        hold.wait()
        rmtree(*args, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree_later)
    yield hold
    hold.release()


def serving(data_dir: Path) -> LocalService:
    return LocalService(engine="echo", data_dir=data_dir, provisioning_seconds=0)


async def version_sampled(api: Api, run: dict[str, Any], path: str | None = None) -> int:
    """Sample a run's weights, or those of a checkpoint; return the version that its logprobs tell."""
    root = f"{api.local.base_url}/samplers/{run['sampler']['id']}/sync"
    choice, claimed = await api.sample(root, headers={} if path is None else {"X-Checkpoint-Path": path})
    told = choice["logprobs"]["token_logprobs"][0]
    [version] = [version for version in range(50) if told == logprob(7, 5, version)]
    assert claimed == (str(version) if path is None else None)
    return version


async def staged(api: Api) -> tuple[dict[str, Any], str]:
    """Return a run, and a checkpoint of its version 1 that is not served and has to be read."""
    run = await api.run(lora_rank=RANK)
    await api.train(run)
    path = (await api.publish(run, "one name", bump=False))["path"]
    await until_in_memory(api, 0)
    return run, path


def directories(data_dir: Path, run: dict[str, Any]) -> list[Path]:
    return list((data_dir / "checkpoints" / run["id"]).iterdir())


async def until_in_memory(api: Api, adapters: int) -> None:
    """Wait until so many adapters are in memory; a thread may drop its last one after its work is done."""

    async def are_in_memory() -> bool:
        text = (await api.ask("GET", "/metrics")).body.decode()
        [value] = re.findall(r"^loops_adapter_bytes (.*)$", text, re.MULTILINE)
        return float(value) == adapters * ADAPTER_BYTES

    await api.until(are_in_memory)


async def test_every_sample_is_whole_while_weights_are_published_under_one_name(api: Api) -> None:
    """The race itself: each answer's version is that of its logprobs, and a caller never gets an older one later."""
    run = await api.run()
    await api.train(run)
    path = (await api.publish(run, "live"))["path"]
    is_done = False

    async def sample(path: str | None) -> None:
        newest = 1
        while not is_done:
            version = await version_sampled(api, run, path)
            assert version >= newest
            newest = version

    async with asyncio.TaskGroup() as samplers:
        for pinned in (None, path, None, path):
            samplers.create_task(sample(pinned))
        for _ in range(20):
            await api.train(run)
            await api.publish(run, "live")
        is_done = True
    assert await version_sampled(api, run) == await version_sampled(api, run, path) == 21


@pytest.mark.parametrize("step", ["row", "files"])
async def test_in_the_midst_of_a_publication_samples_get_the_new_weights(
    watched: Api, held_rows: Hold, held_files: Hold, step: str
) -> None:
    """The publication is held before its row is written, or before the old files are removed."""
    run = await watched.run(lora_rank=RANK)
    await watched.train(run)
    path = (await watched.publish(run, "live"))["path"]
    await watched.train(run)
    held = held_rows if step == "row" else held_files
    held.hold()
    publishing = asyncio.create_task(watched.publish(run, "live"))
    await eventually(held.is_reached)
    assert await version_sampled(watched, run) == await version_sampled(watched, run, path) == 2
    held.release()
    assert (await publishing)["version"] == 2
    assert await version_sampled(watched, run) == await version_sampled(watched, run, path) == 2
    assert len(directories(watched.local.data_dir, run)) == len(await watched.checkpoints(run["id"])) == 1


async def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_to_its_end(
    watched: Api, engine: WatchedEngine, wanted: list[str]
) -> None:
    run, path = await staged(watched)
    await watched.train(run)
    engine.reading.clear()
    samples = [asyncio.create_task(version_sampled(watched, run, path)) for _ in range(2)]
    await eventually(lambda: engine.reads and len(wanted) == 2)
    await watched.publish(run, "one name", bump=False)
    await until_in_memory(watched, 0)
    samples.append(asyncio.create_task(version_sampled(watched, run, path)))
    await eventually(lambda: engine.reads == 2)
    engine.reading.set()
    assert await asyncio.gather(*samples) == [1, 1, 2]
    assert engine.reads == 2
    assert len(directories(watched.local.data_dir, run)) == len(await watched.checkpoints(run["id"])) == 1


async def test_files_stay_until_no_row_refers_to_them(
    watched: Api, engine: WatchedEngine, held_rows: Hold, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """The last reader of a checkpoint ends before the rows are written that replace it: a kill would need the files."""
    run, path = await staged(watched)
    await watched.train(run)
    engine.reading.clear()
    sample = asyncio.create_task(version_sampled(watched, run, path))
    await eventually(lambda: engine.reads)
    held_rows.hold()
    publishing = asyncio.create_task(watched.publish(run, "one name", bump=False))
    await eventually(held_rows.is_reached)
    engine.reading.set()
    assert await sample == 1
    shutil.copytree(watched.local.data_dir, tmp_path / "killed")
    async with serving(tmp_path / "killed") as local:
        assert await version_sampled(Api(local, http), run, path) == 1
    held_rows.release()
    await publishing
    assert await version_sampled(watched, run, path) == 2
    assert len(directories(watched.local.data_dir, run)) == 1


async def test_a_caller_who_leaves_in_the_midst_of_a_read_disturbs_no_other(
    watched: Api, engine: WatchedEngine, wanted: list[str]
) -> None:
    run, path = await staged(watched)
    engine.reading.clear()
    leaving, staying = (asyncio.create_task(version_sampled(watched, run, path)) for _ in range(2))
    await eventually(lambda: engine.reads and len(wanted) == 2)
    leaving.cancel()
    await asyncio.wait([leaving])
    await watched.publish(run, "one name", bump=False)
    engine.reading.set()
    assert await staying == 1


async def test_weights_published_while_the_old_ones_are_read_after_a_restart_are_served(
    serve: Callable[..., Any], watched: Api, engine: WatchedEngine
) -> None:
    run = await watched.run(lora_rank=RANK)
    await watched.train(run)
    await watched.publish(run, "live")
    data_dir = watched.local.data_dir
    await watched.local.__aexit__(None, None, None)
    api = await serve(engine=lambda _: engine, data_dir=data_dir)
    moved = f"{api.local.base_url}/trainers/{run['id']}"
    await api.train(moved)
    engine.reads = 0
    engine.reading.clear()
    first = asyncio.create_task(version_sampled(api, run))
    await eventually(lambda: engine.reads)
    await api.publish(moved, "live")
    assert await version_sampled(api, run) == 2, "without waiting for the old ones"
    engine.reading.set()
    assert await first == 2
    assert len(directories(data_dir, run)) == 1


async def test_a_trainer_loads_a_checkpoint_whole_that_another_run_replaces(
    watched: Api, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All runs of a model have one training thread: the load is in its queue, behind the save that replaces."""
    queued = 0
    submit = ModelHost.run_in_training_thread

    def counted(self: ModelHost, *args: Any, **options: Any) -> asyncio.Future[Any]:
        nonlocal queued
        queued += 1
        return submit(self, *args, **options)

    busy, run, other = [await watched.run(lora_rank=RANK) for _ in range(3)]
    await watched.train(busy)
    await watched.train(run)
    path = (await watched.operate(run, "save_state", {"name": "best"}))["path"]
    monkeypatch.setattr(ModelHost, "run_in_training_thread", counted)
    engine.training.clear()
    engine.reading.clear()
    tasks = []
    for work in (
        watched.train(busy),
        watched.operate(run, "save_state", {"name": "best"}),
        watched.operate(other, "load_state_with_optimizer", {"path": path}),
    ):
        tasks.append(asyncio.create_task(work))
        await eventually(lambda: queued == len(tasks))
    _, saving, loading = tasks
    engine.training.set()
    await saving
    await eventually(lambda: engine.reads)
    engine.reading.set()
    assert await loading == {"step": 1}
    assert len(directories(watched.local.data_dir, run)) == 1


async def test_a_sample_under_way_keeps_its_weights_and_its_version(watched: Api, engine: WatchedEngine) -> None:
    run = await watched.run(lora_rank=RANK)
    await watched.train(run)
    await watched.publish(run, "live")
    engine.hold_samples()
    early = asyncio.create_task(version_sampled(watched, run))
    await eventually(lambda: engine.waiting_samples)
    await watched.train(run)
    await watched.publish(run, "live")
    await until_in_memory(watched, 2)
    late = asyncio.create_task(version_sampled(watched, run))
    await eventually(lambda: engine.waiting_samples == 2)
    engine.release_samples()
    assert (await early, await late) == (1, 2)


async def test_a_kill_between_any_two_steps_of_a_publication_leaves_the_old_weights_or_the_new(
    http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    with pytest.MonkeyPatch.context() as patch:
        steps = DiskSteps(original, tmp_path, patch)
        async with serving(original) as local:
            api = Api(local, http)
            run = await api.run()
            await api.train(run)
            await api.publish(run, "live")
            await api.train(run)
            with steps.recorded():
                path = (await api.publish(run, "live"))["path"]
    versions = []
    for copy in steps.copies:
        async with serving(copy) as local:
            api = Api(local, http)
            versions.append(await version_sampled(api, run))
            assert await version_sampled(api, run, path) == versions[-1]
            assert len(directories(copy, run)) == len(await api.checkpoints(run["id"])) == 1
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}
    assert len(versions) > 8


async def test_only_what_is_served_or_used_stays_in_memory(watched: Api, engine: WatchedEngine) -> None:
    run = await watched.run(lora_rank=RANK)
    for i in range(12):
        await watched.train(run)
        await watched.publish(run, f"step-{i}")
        await version_sampled(watched, run)
    await until_in_memory(watched, 1)
    assert engine.reads == 0


async def test_checkpoints_that_requests_name_stay_in_memory_up_to_a_number_of_bytes(
    watched: Api, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "MAX_KEPT_BYTES", 3 * ADAPTER_BYTES)
    run = await watched.run(lora_rank=RANK)
    paths = []
    for i in range(6):
        await watched.train(run)
        paths.append((await watched.publish(run, f"step-{i}", bump=False))["path"])
    await until_in_memory(watched, 0)
    for _ in range(2):
        assert [await version_sampled(watched, run, path) for path in paths[:3]] == [1, 2, 3]
    assert engine.reads == 3
    assert [await version_sampled(watched, run, path) for path in [paths[0], *paths[3:]]] == [1, 4, 5, 6]
    await until_in_memory(watched, 3)
    assert engine.reads == 6
    await version_sampled(watched, run, paths[1])
    assert engine.reads == 7, "the least recently used one was dropped"
    await watched.publish(run, "step-5", bump=False)
    await until_in_memory(watched, 2)


async def test_figures_are_in_the_format_of_prometheus(api: Api) -> None:
    await api.get("/metrics", key=None, status=401)
    await api.run(base_model='quoted "name" \\')
    answer = await api.ask("GET", "/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    text = answer.body.decode()
    assert 'loops_kv_cache_bytes{model="quoted \\"name\\" \\\\"} 0\n' in text
    sample = re.compile(r'(\w+)(?:\{model="(?:[^"\\]|\\.)*"\})? ([\d.e+-]+)')
    typed = {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            typed[name] = kind
        elif not line.startswith("# HELP"):
            found = sample.fullmatch(line)
            assert found is not None, line
            assert (typed[found[1]] == "counter") == found[1].endswith("_total")
            assert float(found[2]) >= 0
    assert {"loops_adapter_bytes", "loops_kv_cache_bytes", "loops_prefix_cache_bytes"} <= typed.keys()

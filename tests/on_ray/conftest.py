"""Tests on Ray, in an environment of their own (`tools/ray.sh`). Without Ray, those that need it are left out."""

from __future__ import annotations

import importlib.util
import math
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from loops_async import SamplingClient, ServiceClient
from loops_local import LocalService, serve_in_thread
from loops_local.engine.base import SampleJob, SampleOutcome
from loops_local.engine.echo import EchoEngine, EchoSampler

HAS_RAY = importlib.util.find_spec("ray") is not None

collect_ignore = [] if HAS_RAY else ["test_batches.py", "test_kills.py", "test_outputs.py", "test_ray_executor.py"]

API_KEY = "of-each-node"
"""Workers read it where they run, so it must be there before the cluster starts."""

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "BASETEN_API_KEY": API_KEY,
}


class CountingSampler(EchoSampler):
    """Answers of random sizes; counts what was asked for by the first two tokens of the prompt.

    After `hold(n)`, no request but the first n is answered until the next `hold`, or `release`.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[int, int]] = Counter()
        self.in_flight = 0
        self.most_in_flight = 0
        self._most: float = math.inf
        self._changed = threading.Condition()
        self._random = Random(7)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(64)

    def submit(self, job: SampleJob) -> Future[SampleOutcome]:
        with self._lock:
            first, second, *_ = job.prompt.to_ints()
            self.counts[first, second] += 1
            number = self.counts.total()
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            size = self._random.randint(1, job.params.max_tokens or 1)
        future: Future[SampleOutcome] = Future()
        self._threads.submit(self._answer, number, replace(job, params=replace(job.params, max_tokens=size)), future)
        return future

    @property
    def is_holding(self) -> bool:
        return self.counts.total() > self._most

    def hold(self, most: float) -> None:
        with self._changed:
            self._most = most
            self._changed.notify_all()

    def answer_one_more(self) -> None:
        self.hold(self._most + 1)

    def release(self) -> None:
        self.hold(math.inf)

    def _answer(self, number: int, job: SampleJob, future: Future[SampleOutcome]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: number <= self._most)
        with self._lock:
            self.in_flight -= 1
        if future.set_running_or_notify_cancel():
            future.set_result(super().submit(job).result())


class CountingEngine(EchoEngine):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.one = CountingSampler()

    def sampler(self) -> Any:
        return self.one


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine("counting")


@pytest.fixture
def service(engine: CountingEngine) -> Iterator[LocalService]:
    with serve_in_thread(engine=lambda _: engine, api_key=API_KEY, provisioning_seconds=0.0) as service:
        yield service
        engine.one.release()


@pytest.fixture
async def sampler(service: LocalService) -> AsyncIterator[SamplingClient]:
    async with ServiceClient(base_url=service.base_url, api_key=API_KEY, on_exit="leave") as client:
        yield await client.create_sampling_client("counting")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """One cluster for all tests: it takes long to start, on a busy machine longer than Ray itself waits for."""
    from ray.cluster_utils import Cluster

    for attempt in range(3):
        try:
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": 100 << 20})
            break
        except Exception:
            if attempt == 2:
                raise
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
def connected(cluster: Any) -> Iterator[None]:
    """One connection, too: the processes that Ray has started for it serve the next test as well."""
    import ray

    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()

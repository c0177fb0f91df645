"""Measurements: the requests of each deployment, and what the machine spends on them."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from msgspec import Struct

from loops_async.types import DeploymentMetrics, MetricPoint, NodeMetrics, ResponseTimes, StatusCounts

__all__ = ["Machine", "Meter", "Window"]

_REQUESTS_KEPT: Final = 20_000
_SAMPLES_KEPT: Final = 10_000
_SAMPLE_SECONDS: Final = 1.0
_STATM: Final = Path("/proc/self/statm")


class _Timed(Struct, frozen=True):
    time: float


T = TypeVar("T", bound=_Timed)


class Window(Struct, frozen=True):
    """A stretch of time in seconds since 1970, in steps. Counts are given per `divisor` seconds."""

    start: float
    end: float
    step: float
    divisor: float

    @property
    def times(self) -> list[datetime]:
        """The beginnings of the steps."""
        count = math.ceil((self.end - self.start) / self.step)
        return [datetime.fromtimestamp(self.start + i * self.step, UTC) for i in range(count)]

    def split(self, items: Iterable[T]) -> Iterator[tuple[datetime, list[T]]]:
        """Return each step's beginning and items."""
        times = self.times
        steps: list[list[T]] = [[] for _ in times]
        for item in items:
            index = math.floor((item.time - self.start) / self.step)
            if 0 <= index < len(steps) and item.time < self.end:
                steps[index].append(item)
        return zip(times, steps, strict=True)

    def rate(self, count: int) -> float:
        """Return a count of one step per `divisor` seconds."""
        return count * self.divisor / self.step


class _Request(_Timed, frozen=True):
    seconds: float
    status: int
    concurrent: int


class _Sample(_Timed, frozen=True):
    cores: float
    memory: int | None


class Machine:
    """What this process spends, sampled when something happens, at most once a second."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=_SAMPLES_KEPT)
        self._last = time.time(), time.process_time()

    def sample(self) -> None:
        """Note the cores in use since the last sample, and the memory."""
        now, spent = time.time(), time.process_time()
        last_time, last_spent = self._last
        if now - last_time >= _SAMPLE_SECONDS:
            self._samples.append(_Sample(now, (spent - last_spent) / (now - last_time), _resident_bytes()))
            self._last = now, spent

    def node(self, window: Window) -> NodeMetrics:
        """Return the samples of a window: mean cores, largest memory."""
        cores: list[MetricPoint] = []
        memory: list[MetricPoint] = []
        for at, samples in window.split(self._samples):
            used = [sample.cores for sample in samples]
            held = [sample.memory for sample in samples if sample.memory is not None]
            if used:
                cores.append(MetricPoint(value=sum(used) / len(used), timestamp=at))
            if held:
                memory.append(MetricPoint(value=max(held), timestamp=at))
        return NodeMetrics(node_id="0", cpu_usage=cores, cpu_memory_usage_bytes=memory)


class Meter:
    """The requests of one deployment; the latest are kept, in memory."""

    def __init__(self) -> None:
        self._requests: deque[_Request] = deque(maxlen=_REQUESTS_KEPT)

    def record(self, seconds: float, status: int, concurrent: int) -> None:
        """Note a request that is answered: how long it took, and how many there were at once."""
        self._requests.append(_Request(time.time(), seconds, status, concurrent))

    def metrics(self, window: Window, machine: Machine) -> DeploymentMetrics:
        """Return the measurements of a window. There is no GPU."""
        volume: list[MetricPoint] = []
        concurrent: list[MetricPoint] = []
        latencies: list[ResponseTimes] = []
        statuses: list[StatusCounts] = []
        for at, requests in window.split(self._requests):
            volume.append(MetricPoint(value=window.rate(len(requests)), timestamp=at))
            most = max((request.concurrent for request in requests), default=0)
            concurrent.append(MetricPoint(value=most, timestamp=at))
            latencies.append(_latencies(at, [request.seconds for request in requests]))
            statuses.append(_statuses(at, [request.status for request in requests], window))
        node = machine.node(window)
        return DeploymentMetrics(
            inference_volume=volume,
            concurrent_requests=concurrent,
            response_time_stats=latencies,
            inference_volume_by_status=statuses,
            cpu_usage=node.cpu_usage,
            cpu_memory_usage_bytes=node.cpu_memory_usage_bytes,
            per_node_metrics=[node],
        )


def _latencies(at: datetime, seconds: Sequence[float]) -> ResponseTimes:
    if not seconds:
        return ResponseTimes(timestamp=at)
    ordered = sorted(1000 * value for value in seconds)
    p50, p95, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95, 0.99))
    return ResponseTimes(timestamp=at, p50=p50, p95=p95, p99=p99)


def _statuses(at: datetime, statuses: Sequence[int], window: Window) -> StatusCounts:
    two, four, five = (window.rate(sum(status // 100 == kind for status in statuses)) for kind in (2, 4, 5))
    return StatusCounts(timestamp=at, status_2xx=two, status_4xx=four, status_5xx=five)


def _resident_bytes() -> int | None:
    """Return the memory that the process holds, where the system tells it (Linux)."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None

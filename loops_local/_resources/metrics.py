"""Metrics: the requests of each deployment, and the processor and memory that this process uses."""

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

__all__ = ["ProcessMetrics", "RequestMetrics", "Window", "percentiles", "resident_bytes"]

_MAX_REQUESTS: Final = 20_000
_MAX_SAMPLES: Final = 10_000
_MIN_INTERVAL_SECONDS: Final = 1.0
_STATM: Final = Path("/proc/self/statm")


class _Timed(Struct, frozen=True):
    time: float


T = TypeVar("T", bound=_Timed)


class Window(Struct, frozen=True):
    """A period in seconds since 1970, divided into steps. Counts are given per `divisor` seconds."""

    start: float
    end: float
    step: float
    divisor: float

    @property
    def times(self) -> list[datetime]:
        """The start of each step."""
        count = math.ceil((self.end - self.start) / self.step)
        return [datetime.fromtimestamp(self.start + i * self.step, UTC) for i in range(count)]

    def split(self, items: Iterable[T]) -> Iterator[tuple[datetime, list[T]]]:
        """Return the start and the items of each step."""
        times = self.times
        steps: list[list[T]] = [[] for _ in times]
        for item in items:
            index = math.floor((item.time - self.start) / self.step)
            if 0 <= index < len(steps) and item.time < self.end:
                steps[index].append(item)
        return zip(times, steps, strict=True)

    def rate(self, count: int) -> float:
        """Convert the count of one step to a count per `divisor` seconds."""
        return count * self.divisor / self.step


class _Request(_Timed, frozen=True):
    seconds: float
    status: int
    concurrent: int


class _Measurement(_Timed, frozen=True):
    cores: float
    memory: int | None


class ProcessMetrics:
    """The cores and memory that this process uses, measured when requests end, at most once a second."""

    def __init__(self) -> None:
        self._measurements: deque[_Measurement] = deque(maxlen=_MAX_SAMPLES)
        self._last = time.time(), time.process_time()

    def measure(self) -> None:
        """Record the cores used since the last measurement, and the memory."""
        now, used = time.time(), time.process_time()
        last_time, last_used = self._last
        if now - last_time >= _MIN_INTERVAL_SECONDS:
            cores = (used - last_used) / (now - last_time)
            self._measurements.append(_Measurement(now, cores, resident_bytes()))
            self._last = now, used

    def node_metrics(self, window: Window) -> NodeMetrics:
        """Return the mean number of cores and the largest memory in each step."""
        cores: list[MetricPoint] = []
        memory: list[MetricPoint] = []
        for at, measured in window.split(self._measurements):
            used = [measurement.cores for measurement in measured]
            held = [measurement.memory for measurement in measured if measurement.memory is not None]
            if used:
                cores.append(MetricPoint(value=sum(used) / len(used), timestamp=at))
            if held:
                memory.append(MetricPoint(value=max(held), timestamp=at))
        return NodeMetrics(node_id="0", cpu_usage=cores, cpu_memory_usage_bytes=memory)


class RequestMetrics:
    """The latest requests of one deployment, in memory."""

    def __init__(self) -> None:
        self._requests: deque[_Request] = deque(maxlen=_MAX_REQUESTS)

    def record(self, seconds: float, status: int, *, concurrent: int) -> None:
        """Add a request: how long it took, its status, and how many requests ran at the same time."""
        self._requests.append(_Request(time.time(), seconds, status, concurrent))

    def deployment_metrics(self, window: Window, process: ProcessMetrics) -> DeploymentMetrics:
        """Return the metrics of a window; those of GPUs are left out, since there is none."""
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
        node = process.node_metrics(window)
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
    p50, p95, p99 = percentiles([1000 * value for value in seconds], 0.5, 0.95, 0.99)
    return ResponseTimes(timestamp=at, p50=p50, p95=p95, p99=p99)


def percentiles(values: Sequence[float], *shares: float) -> list[float]:
    """Return, for each share, the smallest value that this share of all does not exceed."""
    ordered = sorted(values)
    return [ordered[math.ceil(share * len(ordered)) - 1] for share in shares]


def _statuses(at: datetime, statuses: Sequence[int], window: Window) -> StatusCounts:
    two, four, five = (window.rate(sum(status // 100 == kind for status in statuses)) for kind in (2, 4, 5))
    return StatusCounts(timestamp=at, status_2xx=two, status_4xx=four, status_5xx=five)


def resident_bytes() -> int | None:
    """Return the memory of this process, None where the system does not report it (outside Linux)."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None

"""Plots of a deployment's metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from time import time
from typing import Annotated, Final, TypeAlias

import typer

from ..control_plane import ControlPlane
from ..types import DeploymentMetrics, MetricPoint, ResponseTimes, StatusCounts
from ._options import duration
from ._show import columns_of_terminal, emit, plot, show_text, size

PLOT_WIDTH: Final = 60
INDENT: Final = 2


def _checked(text: str) -> str:
    duration(text)
    return text


Since: TypeAlias = Annotated[
    str,
    typer.Option(metavar="DURATION", help="How much of the past to plot, e.g. 90s, 30m, 2h or 1d.", callback=_checked),
]


async def show(plane: ControlPlane, deployment_id: str, since: str, *, as_json: bool) -> None:
    """Print plots of the metrics of a deployment."""
    end = time()
    start = end - duration(since)
    width = min(PLOT_WIDTH, (columns_of_terminal() or PLOT_WIDTH + INDENT) - INDENT)
    found = await plane.get_deployment_metrics(
        deployment_id,
        start_epoch_millis=int(start * 1000),
        end_epoch_millis=int(end * 1000),
        step_seconds=max(1, round((end - start) / width)),
    )

    def show_plots(found: DeploymentMetrics) -> None:
        measured = {name: [point for point in points if math.isfinite(point[1])] for name, points in _series(found)}
        plotted = {name: points for name, points in measured.items() if points}
        for name, points in plotted.items():
            _show_plot(name, plot(points, start=start, end=end, width=width), [value for _, value in points])
        if not plotted:
            show_text(f"no metrics in the last {since}")

    emit(found, as_json, show_plots)


def _show_plot(name: str, lines: Sequence[str], values: Sequence[float]) -> None:
    shown: Callable[[float], str] = _size if name.split("[")[0].endswith("bytes") else "{:.4g}".format
    show_text(f"{name}: {shown(values[-1])} now, {shown(max(values))} at most")
    show_text("\n".join(f"{' ' * INDENT}{line}" for line in lines))


def _size(count: float) -> str:
    return size(round(count))


def _series(found: DeploymentMetrics) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Yield the name of each metric, with its points ``(time, value)``."""
    plain: dict[str, list[MetricPoint]] = {
        "requests": found.inference_volume,
        "concurrent_requests": found.concurrent_requests,
        "cpu_usage": found.cpu_usage,
        "cpu_memory_usage_bytes": found.cpu_memory_usage_bytes,
        "storage_usage_bytes": found.ephemeral_storage.usage_bytes,
        **{f"gpu_utilization[{rank}]": points for rank, points in found.gpu_utilization.items()},
        **{f"gpu_memory_usage_bytes[{rank}]": points for rank, points in found.gpu_memory_usage_bytes.items()},
    }
    for name, points in plain.items():
        yield name, [(each.timestamp.timestamp(), each.value) for each in points if each.value is not None]
    of_each: list[tuple[str, str, Sequence[ResponseTimes | StatusCounts]]] = [
        *((f"response_time_{name}_ms", name, found.response_time_stats) for name in ("p50", "p95", "p99")),
        *((f"answers_{name[-3:]}", name, found.inference_volume_by_status) for name in ("status_4xx", "status_5xx")),
    ]
    for name, field, each in of_each:
        values = [(one.timestamp.timestamp(), getattr(one, field)) for one in each if getattr(one, field) is not None]
        yield name, values if any(value for _, value in values) else []

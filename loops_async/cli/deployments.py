"""``loops deployments``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from time import time
from typing import Annotated, Final

import typer

from ..control_plane import ControlPlane
from ..types import Deployment, DeploymentMetrics, LogLevel, LogLine, MetricPoint, ResponseTimes, StatusCounts
from ._connection import on_control_plane
from ._deactivate import deactivate_all
from ._options import AsJson, Everyone, duration
from ._show import Columns, emit, plot, show_fields, show_json_line, show_table, show_text, size

app: typer.Typer = typer.Typer(no_args_is_help=True, help="Deployments of trainers.")

FOLLOW_SECONDS = 2.0
PLOT_WIDTH: Final = 60

COLUMNS: Final[Columns[Deployment]] = {
    "deployment": lambda deployment: deployment.id,
    "model": lambda deployment: deployment.base_model,
    "status": lambda deployment: deployment.status.name,
    "run": lambda deployment: deployment.active_run_id or deployment.latest_run_id,
    "sampler status": lambda deployment: deployment.sampler and deployment.sampler.status.name,
    "created": lambda deployment: deployment.created_at,
}
FIELDS: Final[Columns[Deployment]] = {
    "id": lambda deployment: deployment.id,
    "status": lambda deployment: deployment.status.name,
    "base model": lambda deployment: deployment.base_model,
    "active run": lambda deployment: deployment.active_run_id,
    "latest run": lambda deployment: deployment.latest_run_id,
    "machines": lambda deployment: deployment.instance_type and deployment.instance_type.name,
    "nodes": lambda deployment: deployment.node_count,
    "availability": lambda deployment: deployment.availability_model,
    "url": lambda deployment: deployment.base_url,
    "created": lambda deployment: deployment.created_at,
    "by": lambda deployment: deployment.user and deployment.user.email,
}


@app.command("list")
def list_(context: typer.Context, everyone: Everyone = False, as_json: AsJson = False) -> None:
    """List the deployments of trainers, in every state."""
    found = on_control_plane(context, lambda plane: plane.list_deployments(scope="org" if everyone else None))
    emit(found, as_json, partial(show_table, COLUMNS))


@app.command()
def show(context: typer.Context, deployment_id: str, as_json: AsJson = False) -> None:
    """Show a deployment."""
    found = on_control_plane(context, lambda plane: plane.get_deployment(deployment_id))
    emit(found, as_json, partial(show_fields, FIELDS))


@app.command()
def deactivate(
    context: typer.Context,
    deployment_ids: Annotated[list[str], typer.Argument(metavar="DEPLOYMENT_ID…")],
    as_json: AsJson = False,
) -> None:
    """Deactivate deployments. Unsaved training state is lost."""
    deactivate_all(context, deployment_ids, ControlPlane.deactivate_deployment, as_json=as_json)


@app.command()
def logs(
    context: typer.Context,
    deployment_id: str,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Also show new lines, until Ctrl-C.")] = False,
    since: Annotated[
        str, typer.Option(help="Show this much of the past, e.g. 90s, 30m, 2h or 1d; at most 7d.")
    ] = "30m",
    level: Annotated[LogLevel | None, typer.Option(help="Leave out lines of a lower level.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The largest number of past lines.")] = 500,
    as_json: AsJson = False,
) -> None:
    """Show the log of a deployment; --json prints one object per line."""
    seconds = duration(since)

    async def work(plane: ControlPlane) -> None:
        # If there are more lines than the limit, the newest are shown.
        lines = await plane.get_deployment_logs(
            deployment_id,
            start_epoch_millis=_millis(time() - seconds),
            direction="desc",
            limit=limit,
            min_level=level,
        )
        lines.reverse()
        _show_lines(lines, as_json=as_json)
        if follow:
            async for line in _new_lines(plane, deployment_id, lines, level):
                _show_lines([line], as_json=as_json)

    on_control_plane(context, work)


async def _new_lines(
    plane: ControlPlane, deployment_id: str, shown: list[LogLine], level: LogLevel | None
) -> AsyncGenerator[LogLine]:
    """Yield the lines after those in `shown`, endlessly."""
    since = _millis(time())
    while True:
        # The newest millisecond is fetched again, since it may have more lines by now.
        since = max((_millis(line.time.timestamp()) for line in shown), default=since)
        shown = [line for line in shown if _millis(line.time.timestamp()) == since]
        await asyncio.sleep(FOLLOW_SECONDS)
        lines = await plane.get_deployment_logs(
            deployment_id, start_epoch_millis=since, direction="asc", limit=1000, min_level=level
        )
        fresh = [line for line in lines if line not in shown]
        for line in fresh:
            yield line
        shown += fresh


def _show_lines(lines: list[LogLine], *, as_json: bool) -> None:
    for line in lines:
        if as_json:
            show_json_line(line)
        else:
            where = f" [{line.replica}]" if line.replica else ""
            show_text(f"{line.time:%Y-%m-%d %H:%M:%S} {line.level or '-':7}{where} {line.message}")


def _millis(seconds: float) -> int:
    return int(seconds * 1000)


@app.command()
def metrics(
    context: typer.Context,
    deployment_id: str,
    since: Annotated[str, typer.Option(help="Show this much of the past, e.g. 90s, 30m, 2h or 1d.")] = "1h",
    as_json: AsJson = False,
) -> None:
    """Plot the metrics of a deployment."""
    end = time()
    start = end - duration(since)

    async def work(plane: ControlPlane) -> DeploymentMetrics:
        return await plane.get_deployment_metrics(
            deployment_id,
            start_epoch_millis=_millis(start),
            end_epoch_millis=_millis(end),
            step_seconds=max(1, round((end - start) / PLOT_WIDTH)),
        )

    def show_plots(found: DeploymentMetrics) -> None:
        plotted = {name: points for name, points in _series(found) if points}
        for name, points in plotted.items():
            _show_plot(name, points, start, end)
        if not plotted:
            show_text(f"no metrics in the last {since}")

    emit(on_control_plane(context, work), as_json, show_plots)


def _show_plot(name: str, points: list[tuple[float, float]], start: float, end: float) -> None:
    shown: Callable[[float], str] = _size if name.split("[")[0].endswith("bytes") else "{:.4g}".format
    values = [value for _, value in points]
    show_text(f"{name}: {shown(values[-1])} now, {shown(max(values))} at most")
    show_text("\n".join(f"  {line}" for line in plot(points, start=start, end=end, width=PLOT_WIDTH)))


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

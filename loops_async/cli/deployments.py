"""``loops deployments``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from time import time
from typing import Annotated

import typer

from ..control_plane import ControlPlane
from ..types import DeploymentMetrics, LogLevel, LogLine, MetricPoint, ResponseTimes, StatusCounts
from ._connection import on_control_plane
from ._deactivate import deactivate_all
from ._options import AsJson, Everybody, duration
from ._show import plot, show_fields, show_json, show_json_line, show_table, show_text, size

app: typer.Typer = typer.Typer(no_args_is_help=True, help="Deployments: what trainers run on.")

FOLLOW_SECONDS = 2.0
COLUMNS = 60


@app.command("list")
def list_(context: typer.Context, everybody: Everybody = False, as_json: AsJson = False) -> None:
    """List deployments of trainers, in all states."""
    found = on_control_plane(context, lambda plane: plane.list_deployments(scope="org" if everybody else None))
    if as_json:
        show_json(found)
        return
    show_table(
        ["deployment", "model", "status", "run", "sampler status", "created"],
        [
            (
                each.id,
                each.base_model,
                each.status.name,
                each.active_run_id or each.latest_run_id,
                each.sampler and each.sampler.status.name,
                each.created_at,
            )
            for each in found
        ],
    )


@app.command()
def show(context: typer.Context, deployment_id: str, as_json: AsJson = False) -> None:
    """Show a deployment."""
    found = on_control_plane(context, lambda plane: plane.get_deployment(deployment_id))
    fields = {
        "id": found.id,
        "status": found.status.name,
        "base model": found.base_model,
        "active run": found.active_run_id,
        "latest run": found.latest_run_id,
        "machines": found.instance_type and found.instance_type.name,
        "nodes": found.node_count,
        "availability": found.availability_model,
        "url": found.base_url,
        "created": found.created_at,
        "by": found.user and found.user.email,
    }
    show_json(found) if as_json else show_fields(fields)


@app.command()
def deactivate(
    context: typer.Context,
    deployment_ids: Annotated[list[str], typer.Argument(metavar="DEPLOYMENT_ID…")],
    as_json: AsJson = False,
) -> None:
    """Switch deployments off. What was not saved is lost."""
    deactivate_all(context, deployment_ids, ControlPlane.deactivate_deployment, as_json=as_json)


@app.command()
def logs(
    context: typer.Context,
    deployment_id: str,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
    since: Annotated[str, typer.Option(help="How far back: 90s, 30m, 2h, 1d (at most 7d).")] = "30m",
    level: Annotated[LogLevel | None, typer.Option(help="Leave out less serious lines.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most lines to begin with.")] = 500,
    as_json: AsJson = False,
) -> None:
    """Show a deployment's log; with --json a line of JSON each."""
    seconds = duration(since)

    async def work(plane: ControlPlane) -> None:
        # The newest lines, if there are more than wanted.
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
    """Yield the lines after those that were shown, for ever."""
    since = _millis(time())
    while True:
        # The newest millisecond is asked for again, since more lines may have come in it.
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
    since: Annotated[str, typer.Option(help="How far back: 90s, 30m, 2h, 1d.")] = "1h",
    as_json: AsJson = False,
) -> None:
    """Draw what was measured of a deployment."""
    end = time()
    start = end - duration(since)

    async def work(plane: ControlPlane) -> DeploymentMetrics:
        return await plane.get_deployment_metrics(
            deployment_id,
            start_epoch_millis=_millis(start),
            end_epoch_millis=_millis(end),
            step_seconds=max(1, round((end - start) / COLUMNS)),
        )

    found = on_control_plane(context, work)
    if as_json:
        show_json(found)
        return
    drawn = {name: points for name, points in _series(found) if points}
    for name, points in drawn.items():
        shown: Callable[[float], str] = _size if name.split("[")[0].endswith("bytes") else "{:.4g}".format
        values = [value for _, value in points]
        show_text(f"{name}: {shown(values[-1])} now, {shown(max(values))} at most")
        show_text("\n".join(f"  {line}" for line in plot(points, start=start, end=end, width=COLUMNS)))
    if not drawn:
        show_text(f"nothing was measured in the last {since}")


def _size(count: float) -> str:
    return size(round(count))


def _series(found: DeploymentMetrics) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Yield each measurement's name, and its values with their times."""
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

"""``loops top``: what runs, with its requests, response times and losses, live."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import typer
from msgspec import Struct, structs
from rich.console import Group
from rich.live import Live
from rich.text import Text

from .._http.messages import Request
from .._session.runtime import Runtime
from ..control_plane import ControlPlane
from ..errors import LoopsError
from ..types import DeploymentMetrics
from ._connection import all_of, on_service
from ._options import AsJson, Quiet
from ._show import Columns, emit_rows, is_terminal, out, table_lines
from .running import COLUMNS, Entry, running

EVERY_SECONDS: Final = 2.0
WINDOW: Final = timedelta(minutes=1)
"""How far back requests are counted."""

LOSSES: Final = "/dashboard/data"
"""Where the embedded service tells the losses of runs; no other one does."""


class Row(Entry, frozen=True, kw_only=True):
    """What runs, and its figures of the last minute; what the service does not tell is None."""

    requests_per_second: float | None = None
    p95_ms: float | None = None
    step: int | None = None
    loss: float | None = None


class _RunFigures(Struct, frozen=True):
    id: str
    step: int | None = None
    last_loss: float | None = None


class _Figures(Struct, frozen=True):
    runs: list[_RunFigures] = []


_FIGURES: Final[Columns[Row]] = {
    "requests/s": lambda row: None if row.requests_per_second is None else f"{row.requests_per_second:.3g}",
    "p95": lambda row: _time_in_words(row.p95_ms),
    "loss": lambda row: None if row.loss is None else f"{row.loss:.4g}",
    "step": lambda row: row.step,
}

_TOP: Final[Columns[Row]] = {
    **{name: COLUMNS[name] for name in ("id", "kind", "status")},
    **_FIGURES,
    **{name: column for name, column in COLUMNS.items() if name not in ("id", "kind", "status")},
}


def top(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
    everyone: Annotated[bool, typer.Option("--all", help="Also show those of the whole organization.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what runs, with requests a second, response time and loss: every 2 s in a terminal, else once."""
    is_live = is_terminal() and not (once or quiet or as_json)

    async def work(runtime: Runtime) -> list[Row]:
        tells_losses = await _tells_losses(runtime.control_plane)
        if is_live:
            await _show_live(context, runtime, tells_losses=tells_losses, everyone=everyone)
        return await _rows(context, runtime, tells_losses=tells_losses, everyone=everyone)

    emit_rows(_TOP, on_service(context, work), as_json=as_json, quiet=quiet)


async def _show_live(context: typer.Context, runtime: Runtime, *, tells_losses: bool, everyone: bool) -> None:
    """Show the table until the command is interrupted."""
    with Live(console=out, auto_refresh=False, screen=True) as live:
        while True:
            rows = await _rows(context, runtime, tells_losses=tells_losses, everyone=everyone)
            head = f"{runtime.settings.base_url}: {len(rows)} running, {datetime.now():%H:%M:%S}; Ctrl-C ends"
            live.update(Group(Text(head, style="dim"), *table_lines(_TOP, rows)), refresh=True)
            await asyncio.sleep(EVERY_SECONDS)


async def _rows(context: typer.Context, runtime: Runtime, *, tells_losses: bool, everyone: bool) -> list[Row]:
    plane = runtime.control_plane
    found = await running(context, plane, everyone=everyone)
    figures: Mapping[str, _RunFigures] = await _figures(runtime) if tells_losses else {}
    rows, _ = await all_of(_row(plane, entry, figures.get(entry.id)) for entry in found)
    return rows


async def _row(plane: ControlPlane, entry: Entry, figures: _RunFigures | None) -> Row:
    metrics = await _metrics(plane, entry)
    return Row(
        **structs.asdict(entry),
        requests_per_second=_mean([point.value for point in metrics.inference_volume]),
        p95_ms=max((each.p95 for each in metrics.response_time_stats if each.p95 is not None), default=None),
        step=None if figures is None else figures.step,
        loss=None if figures is None else figures.last_loss,
    )


async def _metrics(plane: ControlPlane, entry: Entry) -> DeploymentMetrics:
    """Return the figures of the last minute; none where the service does not tell."""
    if entry.deployment_id is None:
        return DeploymentMetrics()
    now = datetime.now(UTC)
    try:
        return await plane.get_deployment_metrics(
            entry.deployment_id,
            start_epoch_millis=int((now - WINDOW).timestamp() * 1000),
            end_epoch_millis=int(now.timestamp() * 1000) + 1,
            step_seconds=int(WINDOW.total_seconds()),
            time_divisor_seconds=1,
        )
    except LoopsError:  # the row is worth more than its figures
        return DeploymentMetrics()


async def _tells_losses(plane: ControlPlane) -> bool:
    try:
        return (await plane.get_capabilities()).metrics
    except LoopsError:
        return False


async def _figures(runtime: Runtime) -> Mapping[str, _RunFigures]:
    request = Request(method="GET", url=f"{runtime.settings.base_url}{LOSSES}", what="get the losses of runs")
    try:
        return {each.id: each for each in (await runtime.transport.fetch(request, _Figures)).runs}
    except LoopsError:
        return {}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _time_in_words(ms: float | None) -> str | None:
    if ms is None:
        return None
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"

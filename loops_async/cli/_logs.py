"""The log of a deployment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from time import time
from typing import Annotated, TypeAlias

import typer
from msgspec import Struct

from ..control_plane import ControlPlane
from ..types import LogLevel, LogLine
from ._options import at_most, duration, one_of
from ._show import show_json_line, show_text

FOLLOW_SECONDS = 2.0

Follow: TypeAlias = Annotated[bool, typer.Option("--follow", "-f", help="Also show new lines, until Ctrl-C.")]
Since: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="DURATION",
        help="How much of the past to show, e.g. 90s, 30m, 2h or 1d; at most 7d.",
        callback=at_most("7d"),
    ),
]
Level: TypeAlias = Annotated[
    LogLevel | None, typer.Option(metavar=one_of(LogLevel), help="Leave out lines of a lower level.")
]
Limit: TypeAlias = Annotated[
    int, typer.Option(min=1, max=1000, metavar="N", help="How many past lines to show at most: the newest.")
]


class Selection(Struct, frozen=True, kw_only=True):
    """Which lines to show."""

    since: str
    level: LogLevel | None
    limit: int
    follow: bool


async def show(plane: ControlPlane, deployment_id: str, wanted: Selection, *, as_json: bool) -> None:
    """Print the lines of a deployment's log; with `follow`, endlessly."""
    # If there are more lines than the limit, the newest are shown.
    lines = await plane.get_deployment_logs(
        deployment_id,
        start_epoch_millis=_millis(time() - duration(wanted.since)),
        direction="desc",
        limit=wanted.limit,
        min_level=wanted.level,
    )
    lines.reverse()
    _show_lines(lines, as_json=as_json)
    if wanted.follow:
        async for line in new_lines(plane, deployment_id, lines, wanted.level):
            _show_lines([line], as_json=as_json)


async def new_lines(
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

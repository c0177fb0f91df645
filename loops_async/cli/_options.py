"""Options that several commands have."""

from __future__ import annotations

import re
from typing import Annotated, Final, TypeAlias

import typer

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Everybody: TypeAlias = Annotated[bool, typer.Option("--all", help="The whole organization's, not only yours.")]
ReadyTimeout: TypeAlias = Annotated[float, typer.Option(help="Seconds until it must be ready.", min=0.1)]
Keep: TypeAlias = Annotated[bool, typer.Option("--keep", help="Leave it as it is when it fails or you interrupt.")]
NoWait: TypeAlias = Annotated[bool, typer.Option("--no-wait", help="Return before it is ready.")]
Spot: TypeAlias = Annotated[bool, typer.Option("--spot", help="Cheaper machines that may be taken away.")]

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str) -> float:
    """Return the seconds that ``90s``, ``30m``, ``2h`` or ``1d`` stand for."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"must be such as 90s, 30m, 2h or 1d; got {text!r}")
    return float(found[1]) * _SECONDS[found[2]]

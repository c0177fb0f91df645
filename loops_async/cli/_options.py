"""Options that several commands have."""

from __future__ import annotations

import re
from typing import Annotated, Final, TypeAlias

import typer

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Print only ids, one a line.")]
Everyone: TypeAlias = Annotated[bool, typer.Option("--all", help="List those of the whole organization.")]
ReadyTimeout: TypeAlias = Annotated[float, typer.Option(help="Seconds to wait until it is ready.", min=0.1)]
Keep: TypeAlias = Annotated[bool, typer.Option("--keep", help="Do not deactivate it on failure or Ctrl-C.")]
NoWait: TypeAlias = Annotated[bool, typer.Option("--no-wait", help="Do not wait until it is ready.")]
Spot: TypeAlias = Annotated[bool, typer.Option("--spot", help="Use cheaper machines that may be preempted.")]

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str) -> float:
    """Return the seconds of a duration, e.g. ``90s``, ``30m``, ``2h`` or ``1d``."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"expected a duration, e.g. 90s, 30m, 2h or 1d; got {text!r}")
    return float(found[1]) * _SECONDS[found[2]]

"""Switching several things off with one command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import typer

from ..control_plane import ControlPlane
from ._connection import all_of, end, on_control_plane
from ._show import show_json, show_text


def deactivate_all(
    context: typer.Context,
    ids: Sequence[str],
    switch_off: Callable[[ControlPlane, str], Awaitable[object]],
    *,
    as_json: bool,
) -> None:
    """Switch off what has these ids, at once, and end the command with what was not possible."""

    async def one(plane: ControlPlane, id_: str) -> str:
        await switch_off(plane, id_)
        return id_

    done, failures = on_control_plane(context, lambda plane: all_of(one(plane, id_) for id_ in ids))
    if as_json:
        show_json({"deactivated": done})
    elif done:
        show_text(f"deactivated {', '.join(done)}")
    end(failures)

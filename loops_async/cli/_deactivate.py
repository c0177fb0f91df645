"""Deactivating several objects with one command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import typer

from ..control_plane import ControlPlane
from ._connection import all_of, end, on_control_plane
from ._show import emit, show_text


def deactivate_all(
    context: typer.Context,
    ids: Sequence[str],
    deactivate: Callable[[ControlPlane, str], Awaitable[object]],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Deactivate objects concurrently, print the ids of those that succeed, and end with the errors of the others."""

    async def one(plane: ControlPlane, id_: str) -> str:
        await deactivate(plane, id_)
        return id_

    done, failures = on_control_plane(context, lambda plane: all_of(one(plane, id_) for id_ in ids))
    if done or as_json:
        text = "\n".join(done) if quiet else f"deactivated {', '.join(done)}"
        emit({"deactivated": done}, as_json, lambda _: show_text(text))
    end(context, failures)

"""``loops capabilities``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..types import UseCase
from ._connection import on_control_plane
from ._options import AsJson
from ._show import show_json, show_table


def capabilities(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Only this base model.")] = None,
    use_case: Annotated[UseCase | None, typer.Option(help="What for.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="For sequences of this length.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the base models that the service supports."""
    found = on_control_plane(
        context, lambda plane: plane.get_capabilities(model=model, use_case=use_case, max_seq_len=max_seq_len)
    )
    if as_json:
        show_json(found)
        return
    show_table(
        ["model", "longest sequence", "images", "usable", "what is missing"],
        [
            (
                each.model_name,
                each.max_seq_len or each.max_context_length,
                _word(each.supports_vision_language),
                _word(each.enabled),
                each.enablement_details and (each.enablement_details.remediation or each.enablement_details.reason),
            )
            for each in found.supported_models
        ],
    )


def _word(is_so: bool | None) -> str | None:
    return None if is_so is None else "yes" if is_so else "no"

"""``loops capabilities``."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from ..types import SupportedModel, UseCase
from ._connection import on_control_plane
from ._options import AsJson, Quiet, one_of
from ._show import Columns, emit_rows, show_json

COLUMNS: Final[Columns[SupportedModel]] = {
    "model": lambda model: model.model_name,
    "longest sequence": lambda model: model.max_seq_len or model.max_context_length,
    "images": lambda model: _yes_or_no(model.supports_vision_language),
    "usable": lambda model: _yes_or_no(model.enabled),
    "how to enable": lambda model: (
        model.enablement_details and (model.enablement_details.remediation or model.enablement_details.reason)
    ),
}


def capabilities(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Only this base model.")] = None,
    use_case: Annotated[UseCase | None, typer.Option(metavar=one_of(UseCase), help="Only models for this.")] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Only models for sequences of this length.", min=1, metavar="TOKENS")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List the base models that the service supports."""
    found = on_control_plane(
        context, lambda plane: plane.get_capabilities(model=model, use_case=use_case, max_seq_len=max_seq_len)
    )
    if as_json:
        show_json(found)
    else:
        emit_rows(COLUMNS, found.supported_models, as_json=False, quiet=quiet)


def _yes_or_no(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"

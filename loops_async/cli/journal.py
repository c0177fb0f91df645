"""``loops journal``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from .._journal.summary import CreatedThing, ShownOperation, Summary, operations, summary
from ..errors import JournalError
from ._connection import fail, paragraph
from ._exit_codes import exit_code
from ._help import App
from ._options import AsJson, Quiet
from ._show import Columns, emit_fields, emit_rows, show_table, size

app: App = App("Journals: what a program with `ServiceClient(journal=PATH)` has done.")

FIELDS: Final[Columns[Summary]] = {
    "journal": lambda found: found.path,
    "service": lambda found: found.base_url,
    "begun": lambda found: found.begun,
    "session": lambda found: found.session,
    "samples": lambda found: found.samples,
    "batches of rollouts": lambda found: found.batches,
    "size": lambda found: size(found.size_bytes),
}
CREATED: Final[Columns[CreatedThing]] = {
    "id": lambda row: row.id,
    "kind": lambda row: row.kind,
    "status": lambda row: "not answered" if row.id is None else "deactivated" if row.deactivated else "created",
    "operations": lambda row: ", ".join(f"{count} {state}" for state, count in sorted(row.states.items())) or None,
    "begun": lambda row: row.begun,
    "model": lambda row: row.model,
    "last state": lambda row: row.last_state,
}
OPERATIONS: Final[Columns[ShownOperation]] = {
    "place": lambda row: row.place,
    "operation": lambda row: row.operation,
    "status": lambda row: row.state,
    "datums": lambda row: row.datums or None,
    "begun": lambda row: row.begun,
    "id": lambda row: row.operation_id,
}


@app.command()
def show(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file of the journal.")],
    run_id: Annotated[str | None, typer.Option("--run", help="List the operations of this run.", metavar="RUN")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what a journal has: runs, samplers, operations. It may be in use; no request is made."""
    try:
        if run_id is not None:
            emit_rows(OPERATIONS, operations(path, run_id), as_json=as_json, quiet=quiet)
            return
        found = summary(path)
    except JournalError as error:
        fail(paragraph(context, error), exit_code(error))
    if quiet:
        emit_rows(CREATED, found.created, as_json=False, quiet=True)
        return
    emit_fields(FIELDS, found, as_json=as_json, quiet=False)
    if not as_json:
        show_table(CREATED, found.created)

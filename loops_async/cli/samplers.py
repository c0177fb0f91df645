"""``loops samplers``."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from .._session.deactivation import deactivate_sampler
from .._session.requests import sampler_request
from ..control_plane import ControlPlane
from ..errors import InputError
from ..types import Sampler
from ._connection import connection, on_control_plane, run, service, team_id
from ._deactivate import deactivate_all
from ._help import App
from ._options import (
    AsJson,
    Everyone,
    Keep,
    NoWait,
    Quiet,
    ReadyTimeout,
    SamplerId,
    SamplerIds,
    Spot,
    checkpoint_path,
    text,
)
from ._readiness import readiness
from ._show import Columns, emit_fields, emit_rows

app: App = App("Samplers of runs, of checkpoints and of base models.")

COLUMNS: Final[Columns[Sampler]] = {
    "sampler": lambda sampler: sampler.id,
    "status": lambda sampler: sampler.status.name,
    "model": lambda sampler: sampler.base_model,
    "created": lambda sampler: sampler.created_at,
    "deployment": lambda sampler: sampler.deployment_id,
}
FIELDS: Final[Columns[Sampler]] = {
    "id": lambda sampler: sampler.id,
    "status": lambda sampler: sampler.status.name,
    "base model": lambda sampler: sampler.base_model,
    "model": lambda sampler: sampler.model_id,
    "deployment": lambda sampler: sampler.deployment_id,
    "url": lambda sampler: sampler.base_url,
    "created": lambda sampler: sampler.created_at,
    "by": lambda sampler: sampler.user and sampler.user.email,
}


@app.command()
def create(
    context: typer.Context,
    base_model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A base model; by default that of --checkpoint.", callback=text()),
    ] = None,
    model_path: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="PATH",
            help="The bt://loops:<run>/sampler_weights/<name> to serve.",
            callback=checkpoint_path("sampler_weights"),
        ),
    ] = None,
    max_seq_length: Annotated[
        int | None,
        typer.Option("--max-seq-len", help="The longest prompt plus completion.", min=1, metavar="TOKENS"),
    ] = None,
    num_replicas: Annotated[
        int | None, typer.Option("--replicas", help="Copies of the sampler.", min=1, metavar="N")
    ] = None,
    spot: Spot = False,
    ready_timeout: ReadyTimeout = 3600.0,
    keep: Keep = False,
    no_wait: NoWait = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Create a sampler of a base model or of a checkpoint, and wait until it is ready."""
    if base_model is None and model_path is None:
        raise typer.BadParameter("give a base model, or --checkpoint", param_hint="'MODEL'")

    async def work() -> Sampler:
        async with service(context) as client:
            plane = client.control_plane
            request = sampler_request(
                connection(context).settings,
                client.session_id,
                base_model=base_model or await _model_of(plane, str(model_path)),
                model_path=model_path,
                max_seq_length=max_seq_length,
                num_replicas=num_replicas,
                availability_model="spot" if spot else None,
            )
            if no_wait:
                return await plane.create_sampler(request, team_id=await team_id(context, plane))
            with readiness() as shown:
                created = await client.provision_sampler(
                    request, ready_timeout=ready_timeout, keep_on_failure=keep, on_progress=shown.update
                )
            return await plane.get_sampler(created.id)

    emit_fields(FIELDS, run(context, work()), as_json=as_json, quiet=quiet)


async def _model_of(plane: ControlPlane, path: str) -> str:
    """Return the base model of a checkpoint."""
    found = await plane.list_checkpoints(checkpoint_path=path)
    known = found[0].base_model if found else None
    if known is None:
        raise InputError("--checkpoint", f"the service does not know the base model of {path}; give MODEL, too")
    return known


@app.command("list")
def list_(context: typer.Context, everyone: Everyone = False, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List samplers, the newest first."""

    async def work(plane: ControlPlane) -> list[Sampler]:
        team = await team_id(context, plane)
        return await plane.list_samplers(scope="org" if everyone else None, team_id=team)

    emit_rows(COLUMNS, on_control_plane(context, work), as_json=as_json, quiet=quiet)


@app.command()
def show(context: typer.Context, sampler_id: SamplerId, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Show a sampler."""
    found = on_control_plane(context, lambda plane: plane.get_sampler(sampler_id))
    emit_fields(FIELDS, found, as_json=as_json, quiet=quiet)


@app.command()
def deactivate(context: typer.Context, sampler_ids: SamplerIds, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Deactivate samplers that are not paired with a run."""

    async def one(plane: ControlPlane, sampler_id: str) -> None:
        await deactivate_sampler(plane, (await plane.get_sampler(sampler_id)).id)

    deactivate_all(context, sampler_ids, one, as_json=as_json, quiet=quiet)

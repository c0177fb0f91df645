"""``loops samplers``."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Final

import typer

from .._session.deactivation import deactivate_sampler
from .._session.requests import sampler_request
from ..control_plane import ControlPlane
from ..errors import InputError
from ..protocol import CheckpointUri
from ..types import Sampler
from ._connection import connection, on_control_plane, run, service, team_id
from ._deactivate import deactivate_all
from ._options import AsJson, Everyone, Keep, NoWait, ReadyTimeout, Spot
from ._readiness import readiness
from ._show import Columns, emit, show_fields, show_table

app: typer.Typer = typer.Typer(no_args_is_help=True, help="Samplers of runs, of checkpoints and of base models.")

COLUMNS: Final[Columns[Sampler]] = {
    "sampler": lambda sampler: sampler.id,
    "model": lambda sampler: sampler.base_model,
    "status": lambda sampler: sampler.status.name,
    "deployment": lambda sampler: sampler.deployment_id,
    "created": lambda sampler: sampler.created_at,
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
    base_model: Annotated[str | None, typer.Argument(help="A base model; by default that of --checkpoint.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="bt://loops:<run>/sampler_weights/<name> to serve.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="The longest prompt plus completion in tokens.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of the sampler.")] = None,
    spot: Spot = False,
    ready_timeout: ReadyTimeout = 3600.0,
    keep: Keep = False,
    no_wait: NoWait = False,
    as_json: AsJson = False,
) -> None:
    """Create a sampler of a base model or of a checkpoint, and wait until it is ready."""

    async def work() -> Sampler:
        async with service(context) as client:
            plane = client.control_plane
            request = sampler_request(
                connection(context).settings,
                client.session_id,
                base_model=await _base_model(plane, base_model, checkpoint),
                model_path=checkpoint,
                max_seq_length=max_seq_len,
                num_replicas=replicas,
                availability_model="spot" if spot else None,
            )
            if no_wait:
                return await plane.create_sampler(request, team_id=await team_id(context, plane))
            with readiness() as shown:
                created = await client.provision_sampler(
                    request, ready_timeout=ready_timeout, keep_on_failure=keep, on_progress=shown.update
                )
            return await plane.get_sampler(created.id)

    created = run(work())
    emit(created, as_json, lambda created: show_table(COLUMNS, [created]))


async def _base_model(plane: ControlPlane, base_model: str | None, checkpoint: str | None) -> str:
    if checkpoint is None:
        if base_model is None:
            raise InputError("BASE_MODEL", "give a base model, or --checkpoint")
        return base_model
    CheckpointUri.parse(checkpoint, kind="sampler_weights", path="--checkpoint")
    found = await plane.list_checkpoints(checkpoint_path=checkpoint)
    known = found[0].base_model if found else None
    if base_model is None and known is None:
        raise InputError("--checkpoint", f"the service does not know the base model of {checkpoint}; give it, too")
    return base_model or str(known)


@app.command("list")
def list_(context: typer.Context, everyone: Everyone = False, as_json: AsJson = False) -> None:
    """List samplers, the newest first."""

    async def work(plane: ControlPlane) -> list[Sampler]:
        team = await team_id(context, plane)
        return await plane.list_samplers(scope="org" if everyone else None, team_id=team)

    emit(on_control_plane(context, work), as_json, partial(show_table, COLUMNS))


@app.command()
def show(context: typer.Context, sampler_id: str, as_json: AsJson = False) -> None:
    """Show a sampler."""
    found = on_control_plane(context, lambda plane: plane.get_sampler(sampler_id))
    emit(found, as_json, partial(show_fields, FIELDS))


@app.command()
def deactivate(
    context: typer.Context,
    sampler_ids: Annotated[list[str], typer.Argument(metavar="SAMPLER_ID…")],
    as_json: AsJson = False,
) -> None:
    """Deactivate samplers that are not paired with a run."""

    async def one(plane: ControlPlane, sampler_id: str) -> None:
        await deactivate_sampler(plane, (await plane.get_sampler(sampler_id)).id)

    deactivate_all(context, sampler_ids, one, as_json=as_json)

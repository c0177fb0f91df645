"""``loops samplers``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .._session.provisioning import switch_off_sampler
from ..control_plane import ControlPlane
from ..errors import InputError
from ..protocol import CheckpointUri
from ..types import AvailabilityModel, CreateSamplerRequest, Sampler
from ._connection import on_control_plane, run, service, team_id
from ._deactivate import deactivate_all
from ._options import AsJson, Everybody, Keep, NoWait, ReadyTimeout, Spot
from ._readiness import readiness
from ._show import show_fields, show_json, show_table

app: typer.Typer = typer.Typer(no_args_is_help=True, help="Samplers: of runs, of checkpoints and of base models.")


@app.command()
def create(
    context: typer.Context,
    base_model: Annotated[str | None, typer.Argument(help="A base model; a checkpoint knows its own.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="bt://loops:<run>/sampler_weights/<name> to serve.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Longest prompt with its completion in tokens.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies.")] = None,
    spot: Spot = False,
    ready_timeout: ReadyTimeout = 3600.0,
    keep: Keep = False,
    no_wait: NoWait = False,
    as_json: AsJson = False,
) -> None:
    """Create a sampler of a base model or of a checkpoint, and wait until it is ready."""
    newer: dict[str, Any] = {
        "num_replicas": replicas,
        "availability_model": AvailabilityModel.SPOT if spot else None,
    }

    async def work() -> Sampler:
        async with service(context) as client:
            request = CreateSamplerRequest(
                session_id=client.session_id,
                base_model=await _model(client.control_plane, base_model, checkpoint),
                model_path=checkpoint,
                max_seq_length=max_seq_len,
                **{field: value for field, value in newer.items() if value is not None},
            )
            if no_wait:
                team = await team_id(context, client.control_plane)
                return await client.control_plane.create_sampler(request, team_id=team)
            with readiness() as shown:
                made = await client.provision_sampler(
                    request, ready_timeout=ready_timeout, keep_on_failure=keep, on_progress=shown.tell
                )
            return await client.control_plane.get_sampler(made.id)

    made = run(work())
    show_json(made) if as_json else _show([made])


async def _model(plane: ControlPlane, base_model: str | None, checkpoint: str | None) -> str:
    if checkpoint is None:
        if base_model is None:
            raise InputError("BASE_MODEL", "give a base model, or --checkpoint")
        return base_model
    CheckpointUri.parse(checkpoint, kind="sampler_weights", path="--checkpoint")
    found = await plane.list_checkpoints(checkpoint_path=checkpoint)
    known = found[0].base_model if found else None
    if base_model is None and known is None:
        raise InputError("--checkpoint", f"the service does not know the model of {checkpoint}; give it, too")
    return base_model or str(known)


@app.command("list")
def list_(context: typer.Context, everybody: Everybody = False, as_json: AsJson = False) -> None:
    """List samplers, the newest first."""

    async def work(plane: ControlPlane) -> list[Sampler]:
        team = await team_id(context, plane)
        return await plane.list_samplers(scope="org" if everybody else None, team_id=team)

    found = on_control_plane(context, work)
    show_json(found) if as_json else _show(found)


@app.command()
def show(context: typer.Context, sampler_id: str, as_json: AsJson = False) -> None:
    """Show a sampler."""
    found = on_control_plane(context, lambda plane: plane.get_sampler(sampler_id))
    fields = {
        "id": found.id,
        "status": found.status.name,
        "base model": found.base_model,
        "model": found.model_id,
        "deployment": found.deployment_id,
        "url": found.base_url,
        "created": found.created_at,
        "by": found.user and found.user.email,
    }
    show_json(found) if as_json else show_fields(fields)


@app.command()
def deactivate(
    context: typer.Context,
    sampler_ids: Annotated[list[str], typer.Argument(metavar="SAMPLER_ID…")],
    as_json: AsJson = False,
) -> None:
    """Switch off samplers that belong to no run."""

    async def switch_off(plane: ControlPlane, id_: str) -> None:
        await switch_off_sampler(plane, await plane.get_sampler(id_))

    deactivate_all(context, sampler_ids, switch_off, as_json=as_json)


def _show(samplers: list[Sampler]) -> None:
    show_table(
        ["sampler", "model", "status", "deployment", "created"],
        [(each.id, each.base_model, each.status.name, each.deployment_id, each.created_at) for each in samplers],
    )

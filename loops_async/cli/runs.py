"""``loops runs``."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Final

import typer

from .._session.deactivation import deactivate_run
from .._session.provisioning import ProgressReporter, ProvisioningOptions, wait_until_ready
from .._session.requests import run_request
from .._session.runtime import Runtime
from ..client import ServiceClient
from ..control_plane import ControlPlane
from ..types import Run
from ._connection import all_of, connection, end, on_control_plane, on_service, run, service, team_id
from ._deactivate import deactivate_all
from ._options import AsJson, Everyone, Keep, NoWait, ReadyTimeout, Spot
from ._readiness import Readiness, readiness
from ._show import Columns, emit, show_fields, show_table

app: typer.Typer = typer.Typer(no_args_is_help=True, help="Runs: each is a trainer with its sampler.")

COLUMNS: Final[Columns[Run]] = {
    "run": lambda run: run.id,
    "name": lambda run: run.name,
    "model": lambda run: run.base_model,
    "status": lambda run: run.status.name,
    "sampler": lambda run: run.sampler and run.sampler.id,
    "sampler status": lambda run: run.sampler and run.sampler.status.name,
    "created": lambda run: run.created_at,
}
FIELDS: Final[Columns[Run]] = {
    "id": lambda run: run.id,
    "name": lambda run: run.name,
    "status": lambda run: run.status.name,
    "base model": lambda run: run.base_model,
    "session": lambda run: run.session_id,
    "deployment": lambda run: run.deployment_id,
    "trainer": lambda run: run.base_url,
    "sampler": lambda run: run.sampler and run.sampler.id,
    "sampler status": lambda run: run.sampler and run.sampler.status.name,
    "created": lambda run: run.created_at,
    "by": lambda run: run.user and run.user.email,
}


@app.command()
def create(
    context: typer.Context,
    base_model: Annotated[str, typer.Argument(help="A Hugging Face repository id; see `loops capabilities`.")],
    rank: Annotated[int, typer.Option(help="The LoRA rank.")] = 32,
    seed: Annotated[int | None, typer.Option(help="Makes the new adapter reproducible.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="The longest example in tokens.")] = None,
    replicas: Annotated[int, typer.Option(help="Data-parallel copies.")] = 1,
    scale_down_delay: Annotated[int, typer.Option(help="Seconds without requests before it is scaled to zero.")] = 3600,
    path: Annotated[str | None, typer.Option(help="bt://loops:<run>/weights/<name> to start from.")] = None,
    name: Annotated[str | None, typer.Option(help="A display name.")] = None,
    sampler_replicas: Annotated[int | None, typer.Option(help="Copies of the sampler.")] = None,
    spot: Spot = False,
    count: Annotated[int, typer.Option(min=1, help="The number of runs to create.")] = 1,
    ready_timeout: ReadyTimeout = 3600.0,
    keep: Keep = False,
    no_wait: NoWait = False,
    as_json: AsJson = False,
) -> None:
    """Create runs, and wait until their trainers are ready."""

    async def one(client: ServiceClient, shown: Readiness) -> Run:
        request = run_request(
            connection(context).settings,
            client.session_id,
            base_model=base_model,
            lora_rank=rank,
            seed=seed,
            max_seq_len=max_seq_len,
            replicas=replicas,
            scale_down_delay_seconds=scale_down_delay,
            path=path,
            name=name,
            sampler_num_replicas=sampler_replicas,
            availability_model="spot" if spot else None,
        )
        plane = client.control_plane
        if no_wait:
            return await plane.create_run(request, team_id=await team_id(context, plane))
        created = await client.provision_run(
            request, ready_timeout=ready_timeout, keep_on_failure=keep, on_progress=shown.update
        )
        return await plane.get_run(created.id)

    async def work() -> tuple[list[Run], list[Exception]]:
        async with service(context) as client:
            with readiness() as shown:
                return await all_of(one(client, shown) for _ in range(count))

    _end_with(*run(work()), as_json=as_json)


@app.command("list")
def list_(
    context: typer.Context,
    base_model: Annotated[str | None, typer.Option("--model", help="Only runs of this base model.")] = None,
    everyone: Everyone = False,
    as_json: AsJson = False,
) -> None:
    """List runs."""

    async def work(plane: ControlPlane) -> list[Run]:
        team = await team_id(context, plane)
        return await plane.list_runs(base_model=base_model, scope="org" if everyone else None, team_id=team)

    emit(on_control_plane(context, work), as_json, partial(show_table, COLUMNS))


@app.command()
def show(context: typer.Context, run_id: str, as_json: AsJson = False) -> None:
    """Show a run."""
    found = on_control_plane(context, lambda plane: plane.get_run(run_id))
    emit(found, as_json, partial(show_fields, FIELDS))


@app.command()
def wait(
    context: typer.Context,
    run_ids: Annotated[list[str], typer.Argument(metavar="RUN_ID…")],
    ready_timeout: ReadyTimeout = 3600.0,
    as_json: AsJson = False,
) -> None:
    """Wait until the trainers of runs are ready."""

    async def one(runtime: Runtime, run_id: str, shown: Readiness) -> Run:
        found = await runtime.control_plane.get_run(run_id)
        options = ProvisioningOptions(ready_timeout=ready_timeout, on_progress=shown.update)
        await wait_until_ready(runtime, found, options, ProgressReporter("run", options))
        return await runtime.control_plane.get_run(run_id)

    async def work(runtime: Runtime) -> tuple[list[Run], list[Exception]]:
        with readiness() as shown:
            return await all_of(one(runtime, run_id, shown) for run_id in run_ids)

    _end_with(*on_service(context, work), as_json=as_json)


@app.command()
def deactivate(
    context: typer.Context,
    run_ids: Annotated[list[str], typer.Argument(metavar="RUN_ID…")],
    as_json: AsJson = False,
) -> None:
    """Deactivate runs with their samplers. Unsaved training state is lost."""

    async def one(plane: ControlPlane, run_id: str) -> None:
        await deactivate_run(plane, await plane.get_run(run_id))

    deactivate_all(context, run_ids, one, as_json=as_json)


def _end_with(runs: list[Run], failures: list[Exception], *, as_json: bool) -> None:
    if runs or as_json:
        emit(runs, as_json, partial(show_table, COLUMNS))
    end(failures)

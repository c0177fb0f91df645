"""``loops runs``."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from .._session.deactivation import deactivate_run, deployment_id_of
from .._session.provisioning import ProgressReporter, ProvisioningOptions, wait_until_ready
from .._session.requests import run_request
from .._session.runtime import Runtime
from ..client import ServiceClient
from ..control_plane import ControlPlane
from ..errors import UnsupportedError
from ..types import Run
from . import _logs, _metrics
from ._connection import all_of, connection, end, on_control_plane, on_service, run, service, team_id
from ._deactivate import deactivate_all
from ._help import App
from ._options import (
    AsJson,
    Everyone,
    Keep,
    NoWait,
    Quiet,
    ReadyTimeout,
    RunId,
    RunIds,
    Spot,
    checkpoint_path,
    text,
)
from ._readiness import Readiness, readiness
from ._show import Columns, emit_fields, emit_rows

app: App = App("Runs: each is a trainer with its sampler.")

COLUMNS: Final[Columns[Run]] = {
    "run": lambda run: run.id,
    "status": lambda run: run.status.name,
    "model": lambda run: run.base_model,
    "created": lambda run: run.created_at,
    "sampler": lambda run: run.sampler and run.sampler.id,
    "sampler status": lambda run: run.sampler and run.sampler.status.name,
    "name": lambda run: run.name if run.name != run.base_model else None,
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
    base_model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A Hugging Face repository id; see `loops capabilities`.", callback=text()
        ),
    ],
    lora_rank: Annotated[int, typer.Option("--rank", help="The LoRA rank.", min=1, metavar="N")] = 32,
    seed: Annotated[int | None, typer.Option(help="Makes the new adapter reproducible.", metavar="N")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="The longest example.", min=1, metavar="TOKENS")] = None,
    replicas: Annotated[int, typer.Option(help="Data-parallel copies.", min=1, metavar="N")] = 1,
    scale_down_delay_seconds: Annotated[
        int,
        typer.Option(
            "--scale-down-delay", help="Time without requests until it is scaled to zero.", min=1, metavar="SECONDS"
        ),
    ] = 3600,
    path: Annotated[
        str | None,
        typer.Option(help="The bt://loops:<run>/weights/<name> to start from.", callback=checkpoint_path("weights")),
    ] = None,
    name: Annotated[str | None, typer.Option(help="A display name.", callback=text(most=255))] = None,
    sampler_num_replicas: Annotated[
        int | None, typer.Option("--sampler-replicas", help="Copies of the sampler.", min=1, metavar="N")
    ] = None,
    spot: Spot = False,
    count: Annotated[int, typer.Option(min=1, help="How many runs to create.", metavar="N")] = 1,
    ready_timeout: ReadyTimeout = 3600.0,
    keep: Keep = False,
    no_wait: NoWait = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Create runs, and wait until their trainers are ready."""

    async def one(client: ServiceClient, shown: Readiness) -> Run:
        request = run_request(
            connection(context).settings,
            client.session_id,
            base_model=base_model,
            lora_rank=lora_rank,
            seed=seed,
            max_seq_len=max_seq_len,
            replicas=replicas,
            scale_down_delay_seconds=scale_down_delay_seconds,
            path=path,
            name=name,
            sampler_num_replicas=sampler_num_replicas,
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

    _end_with(context, *run(context, work()), as_json=as_json, quiet=quiet)


@app.command("list")
def list_(
    context: typer.Context,
    base_model: Annotated[str | None, typer.Option("--model", help="Only runs of this base model.")] = None,
    active: Annotated[bool, typer.Option("--active", help="Leave out those that were replaced or shut down.")] = False,
    everyone: Everyone = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List runs."""

    async def work(plane: ControlPlane) -> list[Run]:
        team = await team_id(context, plane)
        found = await plane.list_runs(base_model=base_model, scope="org" if everyone else None, team_id=team)
        return [each for each in found if not active or each.status.name != "INACTIVE"]

    emit_rows(COLUMNS, on_control_plane(context, work), as_json=as_json, quiet=quiet)


@app.command()
def show(context: typer.Context, run_id: RunId, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Show a run."""
    found = on_control_plane(context, lambda plane: plane.get_run(run_id))
    emit_fields(FIELDS, found, as_json=as_json, quiet=quiet)


@app.command()
def wait(
    context: typer.Context,
    run_ids: RunIds,
    ready_timeout: ReadyTimeout = 3600.0,
    quiet: Quiet = False,
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

    _end_with(context, *on_service(context, work), as_json=as_json, quiet=quiet)


@app.command()
def logs(
    context: typer.Context,
    run_id: RunId,
    follow: _logs.Follow = False,
    since: _logs.Since = "30m",
    level: _logs.Level = None,
    limit: _logs.Limit = 500,
    as_json: AsJson = False,
) -> None:
    """Show the log of a run's trainer; --json prints one object a line."""
    wanted = _logs.Selection(since=since, level=level, limit=limit, follow=follow)

    async def work(plane: ControlPlane) -> None:
        await _logs.show(plane, await _deployment_id(plane, run_id), wanted, as_json=as_json)

    on_control_plane(context, work)


@app.command()
def metrics(context: typer.Context, run_id: RunId, since: _metrics.Since = "1h", as_json: AsJson = False) -> None:
    """Plot the metrics of a run's trainer."""

    async def work(plane: ControlPlane) -> None:
        await _metrics.show(plane, await _deployment_id(plane, run_id), since, as_json=as_json)

    on_control_plane(context, work)


async def _deployment_id(plane: ControlPlane, run_id: str) -> str:
    run = await plane.get_run(run_id)
    found = await deployment_id_of(plane, run)
    if found is None:
        raise UnsupportedError(
            f"run {run_id} is serverless, or its deployment is gone: the service has no log and no metrics of it"
        )
    return found


@app.command()
def deactivate(context: typer.Context, run_ids: RunIds, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Deactivate runs with their samplers. Unsaved training state is lost."""

    async def one(plane: ControlPlane, run_id: str) -> None:
        await deactivate_run(plane, await plane.get_run(run_id))

    deactivate_all(context, run_ids, one, as_json=as_json, quiet=quiet)


def _end_with(
    context: typer.Context, runs: list[Run], failures: list[Exception], *, as_json: bool, quiet: bool
) -> None:
    if runs or as_json:
        emit_rows(COLUMNS, runs, as_json=as_json, quiet=quiet)
    end(context, failures)

"""``loops runs``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .._session.provisioning import Wishes, switch_off_run, until_ready
from .._session.runtime import Runtime
from ..client import ServiceClient
from ..control_plane import ControlPlane
from ..types import AvailabilityModel, CreateRunRequest, Run
from ._connection import all_of, end, on_control_plane, run, runtime, service, team_id
from ._deactivate import deactivate_all
from ._options import AsJson, Everybody, Keep, NoWait, ReadyTimeout, Spot
from ._readiness import Readiness, readiness
from ._show import show_fields, show_json, show_table

app: typer.Typer = typer.Typer(no_args_is_help=True, help="Runs: a trainer each, with its sampler.")


@app.command()
def create(
    context: typer.Context,
    base_model: Annotated[str, typer.Argument(help="A Hugging Face repository id; see `loops capabilities`.")],
    rank: Annotated[int, typer.Option(help="The LoRA rank.")] = 32,
    seed: Annotated[int | None, typer.Option(help="Makes the fresh adapter reproducible.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Longest example in tokens.")] = None,
    replicas: Annotated[int, typer.Option(help="Data-parallel copies.")] = 1,
    scale_down_delay: Annotated[int, typer.Option(help="Seconds that it stays up unused.")] = 3600,
    path: Annotated[str | None, typer.Option(help="bt://loops:<run>/weights/<name> to start from.")] = None,
    name: Annotated[str | None, typer.Option(help="A display name.")] = None,
    sampler_replicas: Annotated[int | None, typer.Option(help="Copies of the sampler.")] = None,
    spot: Spot = False,
    count: Annotated[int, typer.Option(min=1, help="How many runs to create at once.")] = 1,
    ready_timeout: ReadyTimeout = 3600.0,
    keep: Keep = False,
    no_wait: NoWait = False,
    as_json: AsJson = False,
) -> None:
    """Create runs and wait until their trainers are ready."""
    newer: dict[str, Any] = {
        "name": name,
        "sampler_num_replicas": sampler_replicas,
        "availability_model": AvailabilityModel.SPOT if spot else None,
    }

    async def one(client: ServiceClient, shown: Readiness) -> Run:
        request = CreateRunRequest(
            session_id=client.session_id,
            base_model=base_model,
            lora_rank=rank,
            seed=seed,
            max_seq_len=max_seq_len,
            replicas=replicas,
            scale_down_delay_seconds=scale_down_delay,
            path=path,
            **{field: value for field, value in newer.items() if value is not None},
        )
        if no_wait:
            return await client.control_plane.create_run(request, team_id=await team_id(context, client.control_plane))
        made = await client.provision_run(
            request, ready_timeout=ready_timeout, keep_on_failure=keep, on_progress=shown.tell
        )
        return await client.control_plane.get_run(made.id)

    async def work() -> tuple[list[Run], list[Exception]]:
        async with service(context) as client:
            with readiness() as shown:
                return await all_of(one(client, shown) for _ in range(count))

    _end_with(*run(work()), as_json=as_json)


@app.command("list")
def list_(
    context: typer.Context,
    base_model: Annotated[str | None, typer.Option("--model", help="Only runs of this base model.")] = None,
    everybody: Everybody = False,
    as_json: AsJson = False,
) -> None:
    """List runs."""

    async def work(plane: ControlPlane) -> list[Run]:
        team = await team_id(context, plane)
        return await plane.list_runs(base_model=base_model, scope="org" if everybody else None, team_id=team)

    found = on_control_plane(context, work)
    show_json(found) if as_json else _show(found)


@app.command()
def show(context: typer.Context, run_id: str, as_json: AsJson = False) -> None:
    """Show a run."""
    found = on_control_plane(context, lambda plane: plane.get_run(run_id))
    if as_json:
        show_json(found)
        return
    sampler = found.sampler
    show_fields(
        {
            "id": found.id,
            "name": found.name,
            "status": found.status.name,
            "base model": found.base_model,
            "session": found.session_id,
            "deployment": found.deployment_id,
            "trainer": found.base_url,
            "sampler": sampler and sampler.id,
            "sampler status": sampler and sampler.status.name,
            "created": found.created_at,
            "by": found.user and found.user.email,
        }
    )


@app.command()
def wait(
    context: typer.Context,
    run_ids: Annotated[list[str], typer.Argument(metavar="RUN_ID…")],
    ready_timeout: ReadyTimeout = 3600.0,
    as_json: AsJson = False,
) -> None:
    """Wait until the trainers of runs are ready."""

    async def one(opened: Runtime, run_id: str, shown: Readiness) -> Run:
        found = await opened.control_plane.get_run(run_id)
        await until_ready(opened, found, Wishes("run", ready_timeout=ready_timeout, on_progress=shown.tell))
        return await opened.control_plane.get_run(run_id)

    async def work() -> tuple[list[Run], list[Exception]]:
        async with runtime(context) as opened:
            with readiness() as shown:
                return await all_of(one(opened, run_id, shown) for run_id in run_ids)

    _end_with(*run(work()), as_json=as_json)


@app.command()
def deactivate(
    context: typer.Context,
    run_ids: Annotated[list[str], typer.Argument(metavar="RUN_ID…")],
    as_json: AsJson = False,
) -> None:
    """Switch runs off, with their samplers. What was not saved is lost."""

    async def switch_off(plane: ControlPlane, id_: str) -> None:
        await switch_off_run(plane, await plane.get_run(id_))

    deactivate_all(context, run_ids, switch_off, as_json=as_json)


def _end_with(runs: list[Run], failures: list[Exception], *, as_json: bool) -> None:
    if as_json:
        show_json(runs)
    elif runs:
        _show(runs)
    end(failures)


def _show(runs: list[Run]) -> None:
    show_table(
        ["run", "name", "model", "status", "sampler", "sampler status", "created"],
        [
            (
                each.id,
                each.name,
                each.base_model,
                each.status.name,
                each.sampler and each.sampler.id,
                each.sampler and each.sampler.status.name,
                each.created_at,
            )
            for each in runs
        ],
    )

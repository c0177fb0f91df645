"""``loops checkpoints``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .._checkpoints.download import checkpoint_files, download
from ..control_plane import ControlPlane
from ..errors import NotFoundError
from ..types import (
    CheckpointDownload,
    CheckpointFile,
    CheckpointSource,
    DeployCheckpointsRequest,
    DeployedModel,
    DownloadProgress,
)
from ._connection import control_plane, on_control_plane, run, runtime
from ._options import AsJson
from ._show import errors, show_fields, show_json, show_table, show_text, size

app: typer.Typer = typer.Typer(no_args_is_help=True, help="Checkpoints: what runs have saved.")

CheckpointId = Annotated[str, typer.Argument(help="A checkpoint's id, or its bt:// path.")]


@app.command("list")
def list_(
    context: typer.Context,
    run_id: Annotated[str | None, typer.Option("--run", help="The checkpoints of this run.")] = None,
    base_model: Annotated[str | None, typer.Option("--model", help="Those of this base model.")] = None,
    path: Annotated[str | None, typer.Option(help="The one at this bt:// path.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of a run, of a model or at a path; give one of these."""
    found = on_control_plane(
        context, lambda plane: plane.list_checkpoints(run_id=run_id, base_model=base_model, checkpoint_path=path)
    )
    if as_json:
        show_json(found)
        return
    show_table(
        ["checkpoint", "name", "for", "run", "model", "rank", "size", "created"],
        [
            (
                each.id,
                each.checkpoint_id,
                each.target,
                each.run_id,
                each.base_model,
                each.lora_adapter_config and each.lora_adapter_config.rank,
                size(each.size_bytes),
                each.created_at,
            )
            for each in found
        ],
    )


@app.command()
def files(context: typer.Context, checkpoint: CheckpointId, as_json: AsJson = False) -> None:
    """List a checkpoint's files; with --json also their short-lived URLs."""

    async def work() -> list[CheckpointFile]:
        async with runtime(context) as opened:
            checkpoint_id = await _id(opened.control_plane, checkpoint)
            return [file async for file in checkpoint_files(opened, checkpoint_id)]

    found = run(work())
    if as_json:
        show_json(found)
        return
    show_table(
        ["file", "size", "node", "written"],
        [(each.relative_file_name, size(each.size_bytes), each.node_rank, each.last_modified) for each in found],
    )


@app.command("download")
def download_(
    context: typer.Context,
    checkpoint: CheckpointId,
    to: Annotated[Path | None, typer.Option(help="A directory; by default one named after the checkpoint.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download a checkpoint. What was stopped half-way is gone on with by the same command."""

    async def work() -> CheckpointDownload:
        async with runtime(context) as opened:
            checkpoint_id = await _id(opened.control_plane, checkpoint)
            with _progress() as bar:
                task = bar.add_task("", total=None, files="listing files")

                def tell(done: DownloadProgress) -> None:
                    bar.update(
                        task,
                        completed=done.bytes_done,
                        total=done.bytes_total,
                        files=f"{done.files_done} of {done.files_total} files",
                    )

                return await download(opened, checkpoint_id, to or Path(checkpoint_id), tell)

    done = run(work())
    if as_json:
        show_json(done)
    else:
        fetched = f", {size(done.bytes_fetched)} of it now" if done.bytes_fetched != done.bytes_written else ""
        show_text(f"{done.file_count} files, {size(done.bytes_written)}{fetched}, in {done.dest_dir}")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.fields[files]}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )


@app.command()
def source(context: typer.Context, checkpoint: CheckpointId, as_json: AsJson = False) -> None:
    """Show where a checkpoint's files are kept."""

    async def work(plane: ControlPlane) -> CheckpointSource:
        return await plane.get_checkpoint_source(await _id(plane, checkpoint))

    found = on_control_plane(context, work)
    if as_json:
        show_json(found)
    else:
        show_fields({"kind": found.kind, "volume": found.volume_ref, "path": found.path})


@app.command()
def validate(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="bt://loops:<run>/sampler_weights/<name>.")],
    run_id: Annotated[str | None, typer.Option("--run", help="The run whose sampler is to load it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a sampler can load a checkpoint."""

    async def work(plane: ControlPlane) -> None:
        await plane.validate_checkpoint(path, run_id=run_id)

    on_control_plane(context, work)
    show_json({"valid": path}) if as_json else show_text(f"{path} can be loaded")


@app.command()
def deploy(
    context: typer.Context,
    checkpoints: Annotated[list[str], typer.Argument(metavar="CHECKPOINT…", help="Ids or bt:// paths.")],
    model_name: Annotated[str, typer.Option(help="What the model is to be called.")],
    instance_type: Annotated[str, typer.Option(help="The id of the instance type to run on.")],
    hf_secret: Annotated[str, typer.Option(help="The workspace's secret that holds a Hugging Face token.")],
    as_json: AsJson = False,
) -> None:
    """Deploy sampler checkpoints as a model. Doing it twice makes two."""

    async def work() -> DeployedModel:
        async with control_plane(context) as plane:
            request = DeployCheckpointsRequest(
                checkpoint_ids=[await _id(plane, each) for each in checkpoints],
                model_name=model_name,
                instance_type_id=instance_type,
                hf_secret_name=hf_secret,
            )
            return await plane.deploy_checkpoints(request)

    made = run(work())
    if as_json:
        show_json(made)
    else:
        show_fields({"model": made.model_id, "deployment": made.deployment_id})


async def _id(plane: ControlPlane, checkpoint: str) -> str:
    """Return the id of the checkpoint that an argument means."""
    if not checkpoint.startswith("bt:"):
        return checkpoint
    found = await plane.list_checkpoints(checkpoint_path=checkpoint)
    if not found:
        raise NotFoundError(f"there is no checkpoint {checkpoint}", status=404)
    return found[0].id

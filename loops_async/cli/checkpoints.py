"""``loops checkpoints``."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Annotated, Final

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from .._checkpoints.download import download
from .._checkpoints.listing import checkpoint_files, checkpoints_of_all_runs
from .._session.runtime import Runtime
from ..control_plane import ControlPlane
from ..errors import NotFoundError
from ..protocol import CheckpointKind, CheckpointUri
from ..types import (
    Checkpoint,
    CheckpointDownload,
    CheckpointFile,
    CheckpointSource,
    DeployCheckpointsRequest,
    DeployedModel,
    DownloadProgress,
)
from ._connection import on_control_plane, on_service
from ._help import App
from ._options import AsJson, CheckpointId, CheckpointIds, Quiet, checkpoint_path, text
from ._show import Columns, emit, emit_fields, emit_rows, errors, is_live, note, progress, show_text, size

app: App = App("Checkpoints that runs have saved.")

NOTE_SECONDS = 60.0
"""How often the progress of a download is told where it cannot be shown in place."""

WIDE_ENOUGH: Final = 80
"""How many columns a terminal must have for a bar."""

COLUMNS: Final[Columns[Checkpoint]] = {
    "checkpoint": lambda checkpoint: checkpoint.id,
    "path": lambda checkpoint: _path(checkpoint),
    "created": lambda checkpoint: checkpoint.created_at,
    "size": lambda checkpoint: size(checkpoint.size_bytes),
    "model": lambda checkpoint: checkpoint.base_model,
    "rank": lambda checkpoint: checkpoint.lora_adapter_config and checkpoint.lora_adapter_config.rank,
}
FILE_COLUMNS: Final[Columns[CheckpointFile]] = {
    "file": lambda file: file.relative_file_name,
    "size": lambda file: size(file.size_bytes),
    "node": lambda file: file.node_rank,
    "written": lambda file: file.last_modified,
}
SOURCE_FIELDS: Final[Columns[CheckpointSource]] = {
    "kind": lambda source: source.kind,
    "volume": lambda source: source.volume_ref,
    "path": lambda source: source.path,
}
MODEL_FIELDS: Final[Columns[DeployedModel]] = {
    "model": lambda model: model.model_id,
    "deployment": lambda model: model.deployment_id,
}


@app.command("list")
def list_(
    context: typer.Context,
    run_id: Annotated[str | None, typer.Option("--run", metavar="RUN", help="Those of this run.")] = None,
    base_model: Annotated[str | None, typer.Option("--model", help="Those of this base model.")] = None,
    path: Annotated[str | None, typer.Option(help="The one at this bt:// path.", callback=checkpoint_path())] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of all runs, or with one of --run, --model, --path only those."""
    if (given := 3 - [run_id, base_model, path].count(None)) > 1:
        raise typer.BadParameter("give only one of --run, --model, --path")

    async def find(plane: ControlPlane) -> list[Checkpoint]:
        if not given:
            return await checkpoints_of_all_runs(plane)
        return await plane.list_checkpoints(run_id=run_id, base_model=base_model, checkpoint_path=path)

    found = on_control_plane(context, find)
    emit_rows(COLUMNS, found, as_json=as_json, quiet=quiet)


def _path(checkpoint: Checkpoint) -> CheckpointUri:
    kind: CheckpointKind = "weights" if checkpoint.target == "trainer" else "sampler_weights"
    return CheckpointUri(checkpoint.run_id, kind, checkpoint.checkpoint_id)


@app.command()
def files(context: typer.Context, checkpoint: CheckpointId, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the files of a checkpoint; --json also prints their short-lived URLs."""

    async def work(runtime: Runtime) -> list[CheckpointFile]:
        checkpoint_id = await _id(runtime.control_plane, checkpoint)
        return [file async for file in checkpoint_files(runtime.control_plane, checkpoint_id)]

    emit_rows(FILE_COLUMNS, on_service(context, work), as_json=as_json, quiet=quiet)


@app.command("download")
def download_(
    context: typer.Context,
    checkpoint: CheckpointId,
    to: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="Where to; by default a directory of the checkpoint's id.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a checkpoint. The same command resumes an interrupted download."""

    async def work(runtime: Runtime) -> CheckpointDownload:
        checkpoint_id = await _id(runtime.control_plane, checkpoint)
        with _download_progress() as update:
            return await download(runtime, checkpoint_id, to or Path(checkpoint_id), update)

    emit(on_service(context, work), as_json, _show_download)


@contextmanager
def _download_progress() -> Generator[Callable[[DownloadProgress], None]]:
    """Show the progress while the block runs; yields the function that updates it."""
    columns: list[ProgressColumn] = [TextColumn("{task.fields[files]}"), DownloadColumn()]
    if errors.width >= WIDE_ENOUGH:
        columns += [BarColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    with progress(*columns) as bar:
        task = bar.add_task("", total=None, files="listing files")
        next_note = 0.0

        def update(now: DownloadProgress) -> None:
            nonlocal next_note
            files = f"{now.files_done} of {now.files_total} files"
            bar.update(task, completed=now.bytes_done, total=now.bytes_total, files=files)
            if not is_live() and monotonic() >= next_note:
                next_note = monotonic() + NOTE_SECONDS
                note(f"download: {files}, {size(now.bytes_done)} of {size(now.bytes_total)}")

        yield update


def _show_download(done: CheckpointDownload) -> None:
    fetched = f", {size(done.bytes_fetched)} of it now" if done.bytes_fetched != done.bytes_written else ""
    if not done.bytes_fetched:
        fetched = ", already complete"
    show_text(f"{done.file_count} files, {size(done.bytes_written)}{fetched}, in {done.dest_dir}")


@app.command()
def source(context: typer.Context, checkpoint: CheckpointId, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Show where the files of a checkpoint are stored."""

    async def work(plane: ControlPlane) -> CheckpointSource:
        return await plane.get_checkpoint_source(await _id(plane, checkpoint))

    emit_fields(SOURCE_FIELDS, on_control_plane(context, work), as_json=as_json, quiet=quiet)


@app.command()
def validate(
    context: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="The bt://loops:<run>/sampler_weights/<name> of a checkpoint.",
            callback=checkpoint_path("sampler_weights"),
        ),
    ],
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="The run whose sampler is to load it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a sampler can load a checkpoint."""
    on_control_plane(context, lambda plane: plane.validate_checkpoint(path, run_id=run_id))
    emit({"valid": path}, as_json, lambda _: show_text(f"{path} can be loaded"))


@app.command()
def deploy(
    context: typer.Context,
    checkpoints: CheckpointIds,
    model_name: Annotated[str, typer.Option(help="The name of the new model.", callback=text())],
    instance_type_id: Annotated[
        str,
        typer.Option(
            "--instance-type", metavar="INSTANCE", help="The id of the instance type to run on.", callback=text()
        ),
    ],
    hf_secret_name: Annotated[
        str,
        typer.Option(
            "--hf-secret", metavar="NAME", help="The workspace's secret with a Hugging Face token.", callback=text()
        ),
    ],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Deploy sampler checkpoints as a model. Each call creates a new model."""

    async def work(plane: ControlPlane) -> DeployedModel:
        request = DeployCheckpointsRequest(
            checkpoint_ids=[await _id(plane, each) for each in checkpoints],
            model_name=model_name,
            instance_type_id=instance_type_id,
            hf_secret_name=hf_secret_name,
        )
        return await plane.deploy_checkpoints(request)

    emit_fields(MODEL_FIELDS, on_control_plane(context, work), as_json=as_json, quiet=quiet)


async def _id(plane: ControlPlane, checkpoint: str) -> str:
    """Return the id of a checkpoint that is given by its id or its path."""
    if not checkpoint.startswith("bt:"):
        return checkpoint
    found = await plane.list_checkpoints(checkpoint_path=checkpoint)
    if not found:
        raise NotFoundError(f"there is no checkpoint {checkpoint}", status=404)
    return found[0].id

"""Listing and downloading what a run has saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loops_async import (
    CheckpointTarget,
    DownloadProgress,
    InputError,
    LoraAdapterConfig,
    NotFoundError,
    ServiceClient,
    TrainingClient,
)
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.work import train


@pytest.fixture
async def saved(trainer: TrainingClient) -> str:
    """The id of a checkpoint of three files and one step."""
    await train(trainer)
    await (await trainer.save_state("one"))
    (checkpoint,) = await trainer.list_checkpoints()
    return checkpoint.id


async def test_both_kinds_are_listed(trainer: TrainingClient, engine: WatchedEngine, service: ServiceClient) -> None:
    await trainer.save_state("one")
    await (await trainer.save_weights_for_sampler("one"))

    listed = await trainer.list_checkpoints()
    assert {(one.checkpoint_id, one.target) for one in listed} == {
        ("one", CheckpointTarget.TRAINER),
        ("one", CheckpointTarget.SAMPLER),
    }
    assert len({one.id for one in listed}) == 2
    assert all(one.size_bytes > 0 for one in listed)
    assert {(one.run_id, one.base_model, one.lora_adapter_config) for one in listed} == {
        (trainer.run_id, engine.name, LoraAdapterConfig(rank=8))
    }
    assert await service.list_checkpoints(trainer.run_id) == listed


async def test_files_come_in_pages(trainer: TrainingClient, service: ServiceClient, saved: str) -> None:
    whole = await service.get_checkpoint_archive_url(saved)
    first = await service.get_checkpoint_archive_url(saved, 2)
    rest = await trainer.get_checkpoint_archive_url(saved, 2, 2)

    names = [file.relative_file_name for file in whole.presigned_urls]
    assert names == ["adapter_config.json", "adapter_model.safetensors", "trainer_state.json"]
    assert [file.relative_file_name for file in first.presigned_urls + rest.presigned_urls] == names
    assert [page.next_page_token for page in (whole, first, rest)] == [None, 2, None]
    assert {page.total_count for page in (whole, first, rest)} == {3}
    with pytest.raises(InputError, match="page_size"):
        await service.get_checkpoint_archive_url(saved, 0)


async def test_downloading(trainer: TrainingClient, service: ServiceClient, saved: str, tmp_path: Path) -> None:
    told: list[DownloadProgress] = []
    place = tmp_path / "new" / "place"
    downloaded = await service.download_checkpoint(saved, dest_dir=place, on_progress=told.append)

    files = sorted(path.name for path in downloaded.dest_dir.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "trainer_state.json"]
    assert json.loads((downloaded.dest_dir / "adapter_config.json").read_text())["r"] == 8
    assert json.loads((downloaded.dest_dir / "trainer_state.json").read_text()) == {"step": 1}
    assert downloaded.file_count == 3
    assert downloaded.bytes_written == sum(path.stat().st_size for path in downloaded.dest_dir.iterdir())
    size = downloaded.bytes_written
    assert told[-1] == DownloadProgress(bytes_done=size, bytes_total=size, files_done=3, files_total=3)
    assert [each.bytes_done for each in told] == sorted(each.bytes_done for each in told)
    assert (await trainer.download_checkpoint(saved, dest_dir=str(tmp_path / "again"))).file_count == 3


async def test_the_progress_of_a_download_that_was_done_before(
    service: ServiceClient, saved: str, tmp_path: Path
) -> None:
    done = await service.download_checkpoint(saved, dest_dir=tmp_path)
    told: list[DownloadProgress] = []
    again = await service.download_checkpoint(saved, dest_dir=tmp_path, on_progress=told.append)
    assert again.bytes_fetched == 0
    assert (told[-1].files_done, told[-1].bytes_done) == (3, done.bytes_written)


async def test_what_is_not_there(service: ServiceClient, colour: Colour, tmp_path: Path) -> None:
    calls: list[Any] = [
        service.list_checkpoints("no-such-run"),
        service.get_checkpoint_archive_url("no-such-checkpoint"),
        service.download_checkpoint("no-such-checkpoint", dest_dir=tmp_path),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match="no-such"):
            await call


async def test_those_of_all_runs(service: ServiceClient, engine: WatchedEngine) -> None:
    runs = [await service.create_lora_training_client(engine.name) for _ in range(3)]
    for run in (*runs, runs[0]):
        await (await run.save_state(f"state-{run.run_id[:4]}"))
        await (await run.save_weights_for_sampler("weights"))
    listed = [one for one in await service.list_all_checkpoints() if one.run_id in {run.run_id for run in runs}]
    of_each = [one for run in runs for one in await run.list_checkpoints()]
    assert listed == sorted(of_each, key=lambda one: one.created_at)
    assert len(listed) == 6

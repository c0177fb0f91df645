"""Listing and downloading what a run has saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loops_async import CheckpointTarget, InputError, LoraAdapterConfig, NotFoundError, ServiceClient, TrainingClient
from loops_local import LocalService
from tests.contract._colours import Colour
from tests.contract._engine import WatchedEngine
from tests.contract._helpers import train


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
    downloaded = await service.download_checkpoint(saved, dest_dir=tmp_path / "new" / "place")

    files = sorted(path.name for path in downloaded.dest_dir.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "trainer_state.json"]
    assert json.loads((downloaded.dest_dir / "adapter_config.json").read_text())["r"] == 8
    assert json.loads((downloaded.dest_dir / "trainer_state.json").read_text()) == {"step": 1}
    assert downloaded.file_count == 3
    assert downloaded.bytes_written == sum(path.stat().st_size for path in downloaded.dest_dir.iterdir())
    assert (await trainer.download_checkpoint(saved, dest_dir=str(tmp_path / "again"))).file_count == 3


async def test_file_urls_never_see_the_key(
    service: ServiceClient, local: LocalService, saved: str, tmp_path: Path
) -> None:
    hits = local.faults.watch(f"GET /files/{saved}/*", times=3)
    await service.download_checkpoint(saved, dest_dir=tmp_path)
    assert ["Authorization" in hit.headers for hit in hits] == [False] * 3


async def test_a_broken_download_goes_on_where_it_stopped(
    service: ServiceClient, local: LocalService, saved: str, tmp_path: Path
) -> None:
    drops = local.faults.drop("GET /files/*.safetensors", times=2)
    await service.download_checkpoint(saved, dest_dir=tmp_path)
    assert len(drops) == 2

    (tmp_path / "trainer_state.json").unlink()
    hits = local.faults.watch("GET /files/*", times=3)
    await service.download_checkpoint(saved, dest_dir=tmp_path)
    assert [Path(hit.path).name for hit in hits] == ["trainer_state.json"]


async def test_an_expired_url_is_asked_for_again(
    service: ServiceClient, local: LocalService, saved: str, tmp_path: Path
) -> None:
    local.faults.answer("GET /files/*/adapter_config.json", 403, {"message": "the URL has expired"})
    listings = local.faults.watch(f"GET */checkpoints/{saved}/files", times=2)
    assert (await service.download_checkpoint(saved, dest_dir=tmp_path)).file_count == 3
    assert len(listings) == 2


async def test_what_is_not_there(service: ServiceClient, colour: Colour, tmp_path: Path) -> None:
    calls: list[Any] = [
        service.list_checkpoints("no-such-run"),
        service.get_checkpoint_archive_url("no-such-checkpoint"),
        service.download_checkpoint("no-such-checkpoint", dest_dir=tmp_path),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match="no-such"):
            await call

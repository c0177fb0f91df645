"""What the service writes is its user's alone, and silent connections do not stop it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from loops_local import LocalService, _service
from tests.service.api import Api
from tests.support.patience import PATIENCE_SECONDS


async def test_files_of_the_data_directory_are_private(http: aiohttp.ClientSession, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with LocalService(engine="echo", data_dir=data_dir, provisioning_seconds=0) as local:
        api = Api(local, http)
        run = await api.run()
        await api.train(run)
        await api.operate(run, "save_state", {"name": "a"})
        await api.publish(run)
        await api.get(f"/v1/loops/deployments/{run['deployment_id']}/debug_archive/files")
        await api.get(f"{run['sampler']['base_url']}/tokenizer")
        assert public(data_dir) == []
        await api.train(run)
    assert (data_dir / "trainers" / run["id"]).is_dir()
    assert public(data_dir) == []


async def test_files_that_were_public_are_made_private(http: aiohttp.ClientSession, tmp_path: Path) -> None:
    (tmp_path / "api_key").write_text("a-key-of-ours")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints").chmod(0o755)
    async with LocalService(engine="echo", data_dir=tmp_path):
        assert public(tmp_path / "checkpoints") == []
        assert not (tmp_path / "api_key").stat().st_mode & 0o077


def public(directory: Path) -> list[str]:
    """The files and directories that others than their owner can use."""
    return [str(path) for path in (directory, *directory.rglob("*")) if path.stat().st_mode & 0o077]


async def test_a_connection_without_a_request_is_closed(
    http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_service, "_FIRST_REQUEST_SECONDS", 0.05)
    async with LocalService(engine="echo") as local:
        host, port = local.base_url.removeprefix("http://").split(":")
        connections = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        for (_, writer), part in zip(connections, (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n"), strict=True):
            writer.write(part)
        async with asyncio.timeout(PATIENCE_SECONDS):
            for reader, writer in connections:
                await reader.read()
                writer.close()
        await Api(local, http).get("/v1/teams")

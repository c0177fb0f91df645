"""Downloads: through kills, expiry and corruption; and listings of any number of pages."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sys
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops_async import (
    CheckpointFile,
    CheckpointFilesResponse,
    DownloadProgress,
    ProtocolError,
    ServiceClient,
    UnsupportedError,
)
from loops_async._checkpoints import download
from loops_async._checkpoints.checksums import stated_checksum
from tests.clock import Clock
from tests.control_plane.files import FileStore
from tests.control_plane.stub import KEY, Colour, Stub

CONTENT = random.Random(7).randbytes(100_000)


@pytest.fixture
async def client(stub: Stub) -> AsyncIterator[ServiceClient]:
    async with ServiceClient(base_url=stub.url, api_key=KEY) as client:
        yield client


def found_in(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def base64(algorithm: str, content: bytes) -> str:
    return b64encode(hashlib.new(algorithm, content).digest()).decode()


# --- kills ---

DOWNLOAD = """
import asyncio, sys
import loops_async as loops

async def main():
    async with loops.ServiceClient() as service:
        await service.download_checkpoint("c1", dest_dir=sys.argv[1])

asyncio.run(main())
"""


async def test_a_download_that_is_killed_goes_on(stub: Stub, tmp_path: Path) -> None:
    content = random.Random(8)
    files = {f"layer-{n}/shard-{n}.safetensors": content.randbytes(50_000 + n) for n in range(40)}
    store = FileStore(stub, files)
    store.limit = store.total // 2
    environment = os.environ | {"LOOPS_BASE_URL": stub.url, "BASETEN_API_KEY": KEY}
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", DOWNLOAD, str(tmp_path), env=environment)
    await asyncio.wait_for(store.waiting.wait(), 30)
    killed.kill()
    await killed.wait()
    assert not found_in(tmp_path).keys() & files.keys(), "whole or not at all"
    left = found_in(tmp_path / ".c1.part")
    assert any(name.startswith("whole/") for name in left)

    store.go.set()
    stub.asked.clear()
    async with ServiceClient(base_url=stub.url, api_key=KEY) as service:
        done = await service.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == files
    assert done.bytes_written == store.total
    ranges = {asked.path.split("?")[0]: asked.headers.get("Range") for asked in stub.asked}
    spared = 0
    for number, (name, content) in enumerate(files.items()):
        if f"whole/{name}" in left:
            assert f"/store/{number}" not in ranges
            spared += len(content)
        else:
            # A file that was not yet checked is asked for its last byte at least.
            start = min(len(left.get(f"half/{name}", b"")), len(content) - 1)
            assert ranges[f"/store/{number}"] == (f"bytes={start}-" if start else None)
            spared += start
    assert done.bytes_fetched == store.total - spared


async def test_a_kill_between_the_last_byte_and_the_check_costs_one_byte(
    client: ServiceClient, stub: Stub, tmp_path: Path
) -> None:
    stated = {"Repr-Digest": f"sha-256=:{base64('sha256', CONTENT)}:"}
    FileStore(stub, {"a": CONTENT}, headers=stated)
    half = tmp_path / ".c1.part" / "half" / "a"
    half.parent.mkdir(parents=True)
    half.write_bytes(CONTENT)
    assert (await client.download_checkpoint("c1", dest_dir=tmp_path)).bytes_fetched == 1
    assert found_in(tmp_path) == {"a": CONTENT}


async def test_a_half_file_that_was_corrupted_is_found_out(client: ServiceClient, stub: Stub, tmp_path: Path) -> None:
    FileStore(stub, {"a": CONTENT}, headers={"Repr-Digest": f"sha-256=:{base64('sha256', CONTENT)}:"})
    half = tmp_path / ".c1.part" / "half" / "a"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"x" * 10)
    with pytest.raises(ProtocolError, match="a does not have the sha256 that its store states"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": CONTENT}


# --- checks ---


@pytest.mark.parametrize(
    ("header", "form", "algorithm"),
    [
        ("Repr-Digest", "sha-256=:{}:", "sha256"),
        ("Repr-Digest", "sha-512=:{}:, sha-256=:AAAA:", "sha512"),
        ("Digest", "SHA-256={}", "sha256"),
        ("x-goog-hash", "crc32c=n03x6A==,md5={}", "md5"),
        ("x-amz-checksum-sha256", "{}", "sha256"),
        ("x-ms-blob-content-md5", "{}", "md5"),
    ],
)
async def test_checksums_are_compared_where_one_is_stated(
    client: ServiceClient, stub: Stub, tmp_path: Path, header: str, form: str, algorithm: str
) -> None:
    FileStore(stub, {"a": CONTENT}, headers={header: form.format(base64(algorithm, CONTENT))})
    await client.download_checkpoint("c1", dest_dir=tmp_path / "right")
    assert found_in(tmp_path / "right") == {"a": CONTENT}

    FileStore(stub, {"a": CONTENT}, headers={header: form.format(base64(algorithm, b"another file"))})
    stub.forget("GET /store/0")
    with pytest.raises(ProtocolError, match=f"does not have the {algorithm}"):
        await client.download_checkpoint("c1", dest_dir=tmp_path / "wrong")
    assert found_in(tmp_path / "wrong") == {}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"ETag": '"d41d8cd98f00b204e9800998ecf8427e"'},
        {"x-amz-checksum-sha256": "n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg=-3"},
        {"Repr-Digest": "sha-256=:AAAA:"},
        {"Digest": "unixsum=30637"},
        {"x-goog-hash": "crc32c=n03x6A=="},
    ],
)
def test_what_is_no_checksum_of_the_file_is_left_alone(headers: dict[str, str]) -> None:
    assert stated_checksum(headers) is None


async def test_a_part_that_was_not_asked_for_is_refused(client: ServiceClient, stub: Stub, tmp_path: Path) -> None:
    store = FileStore(stub, {"a": CONTENT}, headers={"Content-Range": "bytes 5-9/10"})
    half = tmp_path / ".c1.part" / "half" / "a"
    half.parent.mkdir(parents=True)
    half.write_bytes(CONTENT[:100])
    with pytest.raises(ProtocolError, match=r"asked for bytes from 100, got bytes 5-9/10"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {}
    assert store.sent["a"] <= len(CONTENT)


async def test_a_silent_store_is_given_up_and_gone_on_with(
    client: ServiceClient, stub: Stub, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "IDLE_SECONDS", 0.1)
    store = FileStore(stub, {"a": CONTENT})
    store.limit = 50_000
    downloading = asyncio.create_task(client.download_checkpoint("c1", dest_dir=tmp_path))
    await store.waiting.wait()
    while stub.count("GET /store/0") < 2:  # noqa: ASYNC110 - until it has given up
        await asyncio.sleep(0)
    store.go.set()
    await downloading
    assert found_in(tmp_path) == {"a": CONTENT}
    assert "Range" in stub.asked[-1].headers


async def test_urls_that_expire_half_way_are_renewed_together(
    client: ServiceClient, stub: Stub, tmp_path: Path
) -> None:
    files = {f"f{n}": CONTENT[n : n + 500] for n in range(30)}
    store = FileStore(stub, files)
    store.expired = {1}
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == files
    assert store.listings == 2


async def test_progress_is_told(stub: Stub, colour: Colour, tmp_path: Path) -> None:
    files = {f"f{n}": CONTENT[: 10_000 * n] for n in range(4)}
    FileStore(stub, files)
    told: list[DownloadProgress] = []
    for place in ("new", "new"):
        told.clear()
        await colour.service(
            stub.url,
            lambda service, place=place: service.download_checkpoint(
                "c1", dest_dir=tmp_path / place, on_progress=told.append
            ),
        )
        assert told[-1] == DownloadProgress(bytes_done=60_000, bytes_total=60_000, files_done=4, files_total=4)
        assert [each.bytes_done for each in told] == sorted(each.bytes_done for each in told)


# --- listings ---


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            {"kind": "volume", "volume_ref": "bdn:ns/vol:tag", "path": "run/step-1"},
            r"c1 is on volume bdn:ns/vol:tag, in directory 'run/step-1'.*mount that volume",
        ),
        ({"kind": "tape"}, r"'tape', which has no file URLs"),
    ],
    ids=["volume", "unknown"],
)
async def test_a_checkpoint_without_file_urls(
    stub: Stub, colour: Colour, tmp_path: Path, source: dict[str, str], said: str
) -> None:
    refusal = {"code": "BAD_REQUEST", "message": "not presignable", "details": {"reason": "NOT_PRESIGNABLE"}}
    stub.on("GET /v1/loops/checkpoints/c1/files", refusal, status=400)
    stub.on("GET /v1/loops/checkpoints/c1/source", {"source": source})
    with pytest.raises(UnsupportedError, match=said):
        await colour.service(stub.url, lambda service: service.download_checkpoint("c1", dest_dir=tmp_path))


async def test_files_can_be_iterated_over(stub: Stub, colour: Colour) -> None:
    store = FileStore(stub, {f"f{n}": b"" for n in range(7)})

    async def names(service: Any) -> list[str]:
        return [file.relative_file_name async for file in service.checkpoint_files("c1", page_size=3)]

    def blocking_names(service: Any) -> list[str]:
        return [file.relative_file_name for file in service.checkpoint_files("c1", page_size=3)]

    listed = await colour.service(stub.url, names if type(colour) is Colour else blocking_names)
    assert listed == list(store.files)
    assert stub.count("GET /v1/loops/checkpoints/c1/files") == 3


async def test_a_listing_that_is_not_whole_is_refused(client: ServiceClient, stub: Stub, tmp_path: Path) -> None:
    stub.on("GET /v1/loops/checkpoints/c1/files", {"presigned_urls": [], "total_count": 3})
    with pytest.raises(ProtocolError, match="its pages list 0 files of 3"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)


@given(st.integers(0, 40), st.integers(1, 50), st.lists(st.integers(1, 12), max_size=50))
def test_pages_of_any_size_make_one_listing(count: int, page_size: int, served: list[int]) -> None:
    """A service may give fewer files than were asked for, and other numbers each time."""
    everything = [CheckpointFile(url=f"u{n}", relative_file_name=f"f{n}") for n in range(count)]
    sizes = iter(served)

    class Pages:
        async def get_checkpoint_files(self, _: str, *, page_size: int, page_token: int) -> CheckpointFilesResponse:
            end = page_token + min(page_size, next(sizes, page_size))
            return CheckpointFilesResponse(
                presigned_urls=everything[page_token:end],
                next_page_token=end if end < count else None,
                total_count=count,
            )

    async def listed() -> list[CheckpointFile]:
        runtime: Any = SimpleNamespace(control_plane=Pages())
        return [file async for file in download.checkpoint_files(runtime, "c1", page_size=page_size)]

    assert asyncio.run(listed()) == everything

"""Downloads through kills, cancellation, broken connections, expired URLs and full disks: whole in the end, or not."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import hashlib
import os
import random
import sys
import warnings
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import msgspec
import pytest
from aiohttp import web

from loops_async import (
    CheckpointFile,
    ConnectError,
    DownloadProgress,
    LoopsError,
    PermissionDeniedError,
    ProtocolError,
    ServiceClient,
)
from loops_async._checkpoints import download
from loops_async._checkpoints.download import Item, Staging
from loops_async._http.retry import OUTAGE
from tests.support.clock import Clock
from tests.support.files import SIGNED, FileStore, entry, found_in
from tests.support.patience import PATIENCE_SECONDS
from tests.support.scripted import KEY, Hold, Reply, Say, ScriptedService, hang_up_in_the_body
from tests.support.secrecy import all_that_it_shows
from tests.support.work import eventually

CONTENT = random.Random(7).randbytes(100_000)

DOWNLOAD = """
import asyncio, sys
import loops_async as loops

async def main():
    async with loops.ServiceClient() as service:
        await service.download_checkpoint("c1", dest_dir=sys.argv[1])

asyncio.run(main())
"""


def staged(directory: Path, name: str, size: int) -> Item:
    """Return the paths of a file of checkpoint ``c1`` while it is downloaded."""
    file = msgspec.convert(entry("http://files.invalid/x", name, size), CheckpointFile)
    return Staging(directory, ".c1.part").arrange([file])[0]


def leave_half(directory: Path, content: bytes, version: str = "") -> None:
    """Leave what an interrupted download of `CONTENT` as file ``a`` of checkpoint ``c1`` would."""
    item = staged(directory, "a", len(CONTENT))
    write(item.partial, content)
    write(item.validator, version.encode())


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def base64(algorithm: str, content: bytes) -> str:
    return b64encode(hashlib.new(algorithm, content).digest()).decode()


# --- kills and cancellation ---


async def test_a_download_that_is_killed_goes_on(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path
) -> None:
    contents = random.Random(8)
    files = {f"layer-{n}/shard-{n}.safetensors": contents.randbytes(50_000 + n) for n in range(40)}
    total = sum(map(len, files.values()))
    store.holds(files)
    store.limit = total // 2
    environment = os.environ | {"LOOPS_BASE_URL": service.url, "BASETEN_API_KEY": KEY}
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", DOWNLOAD, str(tmp_path), env=environment)
    await asyncio.wait_for(store.waiting.wait(), PATIENCE_SECONDS)
    killed.kill()
    await killed.wait()
    assert not found_in(tmp_path).keys() & files.keys(), "whole or not at all"
    items = [staged(tmp_path, name, len(content)) for name, content in files.items()]
    fetched = {item.name: item.partial.stat().st_size for item in items if item.partial.exists()}
    complete = {item.name for item in items if item.complete.exists()}
    assert complete

    store.go.set()
    service.seen.clear()
    done = await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == files
    assert done.bytes_written == total
    ranges = {seen.path: seen.headers.get("Range") for seen in service.seen}
    spared = 0
    for number, (name, content) in enumerate(files.items()):
        if name in complete:
            assert f"/store/c1/{number}" not in ranges
            spared += len(content)
        else:
            # A file that was not yet checked is asked for its last byte at least.
            start = min(fetched.get(name, 0), len(content) - 1)
            assert ranges[f"/store/c1/{number}"] == (f"bytes={start}-" if start else None)
            spared += start
    assert done.bytes_fetched == total - spared


async def test_a_download_that_is_cancelled_goes_on(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path
) -> None:
    files = {"a": b"1234", "b": b"56"}
    store.holds(files)
    held = Hold(Say())
    service.answer("GET", "/store/c1/1", held)
    stopped = asyncio.create_task(client.download_checkpoint("c1", dest_dir=tmp_path))
    await held.arrived.wait()
    while not staged(tmp_path, "a", 4).complete.exists():  # noqa: ASYNC110 - nothing else tells when a file is whole
        await asyncio.sleep(0)
    stopped.cancel()
    await asyncio.wait([stopped])
    assert stopped.cancelled()
    assert not found_in(tmp_path).keys() & files.keys(), "whole or not at all"
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == files
    assert store.asked(0) == 1


class Stop(BaseException):
    """What a program raises to end itself, past every `except Exception`."""


@pytest.mark.parametrize("kind", [ValueError, Stop])
async def test_what_the_callback_raises_ends_a_download(
    client: ServiceClient, store: FileStore, tmp_path: Path, kind: type[BaseException]
) -> None:
    def stop(_: DownloadProgress) -> None:
        raise kind("enough")

    store.holds({"a": b"1234", "b": b"5678"})
    with pytest.raises(kind, match="enough"):
        await client.download_checkpoint("c1", dest_dir=tmp_path, on_progress=stop)


async def test_a_cancelled_download_closes_its_files(client: ServiceClient, store: FileStore, tmp_path: Path) -> None:
    store.holds({"a": CONTENT})
    store.limit = 50_000
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = asyncio.create_task(client.download_checkpoint("c1", dest_dir=tmp_path))
        await store.waiting.wait()
        while not found_in(tmp_path):  # noqa: ASYNC110 - nothing else tells when a file is opened
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        del task
        gc.collect()
    store.go.set()
    assert [str(warning.message) for warning in caught] == []


# --- connections and URLs ---


async def test_a_broken_connection_goes_on_where_it_broke(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path, quick: Clock
) -> None:
    async def break_off(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(CONTENT))})
        await response.prepare(request)
        await response.write(CONTENT[:50_000])
        partial = staged(tmp_path, "a", len(CONTENT)).partial
        while not partial.exists() or not partial.stat().st_size:  # noqa: ASYNC110 - nothing else tells
            await asyncio.sleep(0)
        assert request.transport is not None
        request.transport.close()
        return response

    store.holds({"a": CONTENT, "b": b"whole"})
    service.answer("GET", "/store/c1/0", break_off)
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": CONTENT, "b": b"whole"}
    first, second = service.seen_at("GET", "/store/c1/0")
    assert "Range" not in first.headers
    assert 0 < int(second.headers["Range"].removeprefix("bytes=").removesuffix("-")) <= 50_000


async def test_a_store_that_always_begins_anew_is_not_asked_for_ever(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path, quick: Clock
) -> None:
    received: list[int] = []

    def break_off_at(size: int) -> Reply:
        async def break_off(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": str(len(CONTENT))})
            await response.prepare(request)
            await response.write(CONTENT[:size])
            while received[-1:] != [size]:  # noqa: ASYNC110 - nothing else tells
                await asyncio.sleep(0)
            assert request.transport is not None
            request.transport.close()
            return response

        return break_off

    store.holds({"a": CONTENT})
    service.answer("GET", "/store/c1/0", *map(break_off_at, (3000, 1000, 2000) * 20))
    with pytest.raises(ConnectError):
        await client.download_checkpoint(
            "c1", dest_dir=tmp_path, on_progress=lambda progress: received.append(progress.bytes_done)
        )
    assert quick.now == pytest.approx(OUTAGE.seconds)


async def test_a_silent_store_is_asked_again_for_the_rest(
    client: ServiceClient,
    store: FileStore,
    service: ScriptedService,
    tmp_path: Path,
    quick: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "IDLE_SECONDS", 0.1)
    store.holds({"a": CONTENT})
    store.limit = 50_000
    downloading = asyncio.create_task(client.download_checkpoint("c1", dest_dir=tmp_path))
    await store.waiting.wait()
    await eventually(lambda: "Range" in service.seen[-1].headers)
    store.go.set()
    await downloading
    assert found_in(tmp_path) == {"a": CONTENT}


@pytest.mark.parametrize("status", [400, 401, 403, 410])
async def test_urls_that_expire_half_way_are_renewed_together(
    client: ServiceClient, store: FileStore, tmp_path: Path, status: int
) -> None:
    files = {f"f{n}": CONTENT[n : n + 500] for n in range(30)}
    store.holds(files)
    store.expired, store.refusal = {1}, status
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == files
    assert store.listings == 2


async def test_a_refused_file_is_an_error_that_says_so_without_the_signature(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path
) -> None:
    store.holds({"a": b"1234"})
    service.always("GET", "/store/c1/0", Say(403, f"<Error>no: /store/c1/0?{SIGNED}</Error>"))
    with pytest.raises(PermissionDeniedError, match=r"download a .*answered 403: <Error>no") as refused:
        await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert "5ecret" not in all_that_it_shows(refused.value)
    assert found_in(tmp_path) == {}


# --- files that changed, and stores that refuse ---


@pytest.mark.parametrize(
    ("headers", "sent"),
    [
        ({"ETag": '"v1"'}, '"v1"'),
        ({"ETag": 'W/"v1"', "Last-Modified": "Wed, 24 Jun 2026 18:20:39 GMT"}, "Wed, 24 Jun 2026 18:20:39 GMT"),
        ({"ETag": 'W/"v1"'}, None),
        ({}, None),
    ],
    ids=["tag", "time", "weak tag", "nothing"],
)
async def test_a_resumed_download_names_the_version_it_began_with(
    client: ServiceClient,
    store: FileStore,
    service: ScriptedService,
    tmp_path: Path,
    headers: dict[str, str],
    sent: str,
) -> None:
    store.holds({"a": CONTENT}, headers=headers)
    store.limit = 50_000
    stopped = asyncio.create_task(client.download_checkpoint("c1", dest_dir=tmp_path))
    await store.waiting.wait()
    while not (partial := staged(tmp_path, "a", len(CONTENT)).partial).exists() or not partial.stat().st_size:  # noqa: ASYNC110 - nothing else tells
        await asyncio.sleep(0)
    stopped.cancel()
    await asyncio.wait([stopped])
    store.go.set()
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": CONTENT}
    last = service.seen_at("GET", "/store/c1/0")[-1]
    assert "Range" in last.headers
    assert last.headers.get("If-Range") == sent


@pytest.mark.parametrize("stage", ["partial", "complete"])
async def test_what_was_downloaded_of_another_version_is_not_used(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path, stage: str
) -> None:
    write(getattr(staged(tmp_path, "a", len(CONTENT)), stage), b"x" * (len(CONTENT) if stage == "complete" else 1000))
    store.holds({"a": CONTENT}, last_modified="2026-06-25T09:00:00Z")
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": CONTENT}
    [seen] = service.seen_at("GET", "/store/c1/0")
    assert "Range" not in seen.headers


async def test_a_file_that_changes_at_a_store_that_ignores_if_range_is_downloaded_anew(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path, quick: Clock
) -> None:
    store.holds({"a": CONTENT}, headers={"ETag": '"v2"'})
    leave_half(tmp_path, b"x" * 1000, '"v1"')
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": CONTENT}
    assert ["Range" in seen.headers for seen in service.seen_at("GET", "/store/c1/0")] == [True, False]


async def test_a_store_that_does_not_have_the_range_is_asked_for_the_whole_file_once(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path
) -> None:
    store.holds({"a": CONTENT})
    leave_half(tmp_path, CONTENT[:1000])
    service.answer("GET", "/store/c1/0", Say(416, "", {"Content-Range": f"bytes */{len(CONTENT)}"}))
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": CONTENT}
    assert ["Range" in seen.headers for seen in service.seen_at("GET", "/store/c1/0")] == [True, False]


# --- contents that are not what they should be ---


@pytest.mark.parametrize(("listed", "kind"), [(3, ProtocolError), (5, ConnectError)], ids=["longer", "shorter"])
async def test_a_file_of_another_size_never_gets_its_name(
    client: ServiceClient, store: FileStore, tmp_path: Path, quick: Clock, listed: int, kind: type[LoopsError]
) -> None:
    store.holds({"a": b"1234"}, size_bytes=listed)
    with pytest.raises(kind, match=rf"a has 4 bytes; the listing says {listed}"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert "a" not in found_in(tmp_path)


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
    client: ServiceClient, store: FileStore, tmp_path: Path, header: str, form: str, algorithm: str
) -> None:
    store.holds({"a": CONTENT}, headers={header: form.format(base64(algorithm, CONTENT))})
    await client.download_checkpoint("c1", dest_dir=tmp_path / "right")
    assert found_in(tmp_path / "right") == {"a": CONTENT}

    store.holds({"a": CONTENT}, headers={header: form.format(base64(algorithm, b"another file"))})
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
async def test_what_is_no_checksum_of_the_file_is_left_alone(
    client: ServiceClient, store: FileStore, tmp_path: Path, headers: dict[str, str]
) -> None:
    store.holds({"a": CONTENT}, headers=headers)
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": CONTENT}


async def test_a_kill_between_the_last_byte_and_the_check_costs_one_byte(
    client: ServiceClient, store: FileStore, tmp_path: Path
) -> None:
    store.holds({"a": CONTENT}, headers={"Repr-Digest": f"sha-256=:{base64('sha256', CONTENT)}:"})
    leave_half(tmp_path, CONTENT)
    assert (await client.download_checkpoint("c1", dest_dir=tmp_path)).bytes_fetched == 1
    assert found_in(tmp_path) == {"a": CONTENT}


async def test_a_half_file_that_was_corrupted_is_found_out(
    client: ServiceClient, store: FileStore, tmp_path: Path
) -> None:
    store.holds({"a": CONTENT}, headers={"Repr-Digest": f"sha-256=:{base64('sha256', CONTENT)}:"})
    leave_half(tmp_path, b"x" * 10)
    with pytest.raises(ProtocolError, match="a does not have the sha256 that its store states"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": CONTENT}


async def test_another_part_than_the_one_requested_is_refused(
    client: ServiceClient, store: FileStore, tmp_path: Path
) -> None:
    store.holds({"a": CONTENT}, headers={"Content-Range": "bytes 5-9/10"})
    leave_half(tmp_path, CONTENT[:100])
    with pytest.raises(ProtocolError, match=r"requested bytes from 100, got bytes 5-9/10"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {}


# --- the disk ---


async def test_files_are_flushed_where_only_a_writable_one_can_be(
    client: ServiceClient, store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync_of_windows(number: int) -> None:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync_of_windows)
    store.holds({"a": CONTENT})
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": CONTENT}


async def test_a_name_that_the_file_system_refuses_is_a_typed_error(
    client: ServiceClient, store: FileStore, tmp_path: Path
) -> None:
    store.holds({"/".join(["x" * 250] * 20): b"1"})  # each part is short enough, the whole path is not
    with pytest.raises(ProtocolError, match=r"cannot hold 'xxx.*too long"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    async def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(anyio.AsyncFile, "write", no_space)
        yield


async def test_an_error_of_the_disk_is_raised_as_itself(
    client: ServiceClient, store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.holds({"a": b"1234", "b": b"56"})
    with full_disk(monkeypatch), pytest.raises(OSError, match="No space left on device") as full:
        await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert full.value.errno == errno.ENOSPC
    assert not isinstance(full.value, LoopsError)
    assert store.asked(0) <= 1, "more tries do not make more space"


@pytest.mark.parametrize("planted", ["file", "directory"])
async def test_a_symbolic_link_in_place_of_a_half_file_is_not_followed(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path, quick: Clock, planted: str
) -> None:
    outside, dest = tmp_path / "outside", tmp_path / "dest"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    store.holds({"file": b"the new content"})
    service.always("GET", "/store/c1/0", hang_up_in_the_body)
    with pytest.raises(ConnectError):
        await client.download_checkpoint("c1", dest_dir=dest)
    item = staged(dest, "file", len(b"the new content"))
    half = item.partial
    half.unlink()
    item.validator.unlink()
    if planted == "file":
        half.symlink_to(outside / "file")
    else:
        half.parent.rmdir()
        half.parent.symlink_to(outside)
    with pytest.raises(ProtocolError, match="symbolic link"):
        await client.download_checkpoint("c1", dest_dir=dest)
    assert found_in(outside) == {"file": b"precious"}

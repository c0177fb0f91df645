"""Downloading a checkpoint: nothing outside its directory, nothing half, nothing mixed up, no key to the files."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import Any

import anyio
import pytest
from aiohttp import web
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from loops_async import (
    ConnectError,
    InputError,
    LoopsError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    ServiceClient,
)
from tests.clock import Clock
from tests.wire.conftest import KEY
from tests.wire.scripted import Hold, Reply, Say, ScriptedService, hang_up_in_the_body
from tests.wire.secrecy import all_that_it_shows
from tests.wire.stubbed import Stubbed

FILES = "/v1/loops/checkpoints/c1/files"
SIGNED = "X-Signature=5ecret5ignature"


def entry(url: str, name: str, size: int, rank: int = 0) -> dict[str, Any]:
    return {
        "url": url,
        "relative_file_name": name,
        "node_rank": rank,
        "size_bytes": size,
        "last_modified": "2026-06-24T18:20:39Z",
    }


def page(files: list[dict[str, Any]], next_page: int | None = None) -> dict[str, Any]:
    return {"presigned_urls": files, "next_page_token": next_page, "total_count": len(files)}


class Store:
    """The files of checkpoints as a service lists and serves them."""

    def __init__(self, service: ScriptedService) -> None:
        self.service = service

    def holds(self, files: dict[str, bytes], *, checkpoint: str = "c1", **changes: Any) -> None:
        """List these files from now on, and serve them."""
        entries = []
        for number, (name, content) in enumerate(files.items()):
            path = f"/store/{checkpoint}/{number}"
            self.service.always("GET", path, self._ranges(content))
            entries.append(entry(f"{self.service.url}{path}?{SIGNED}", name, len(content)) | changes)
        self.service.always("GET", f"/v1/loops/checkpoints/{checkpoint}/files", Say(body=page(entries)))

    def _ranges(self, content: bytes) -> Reply:
        async def serve(request: web.BaseRequest) -> web.StreamResponse:
            wanted = request.headers.get("Range")
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            said = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if wanted else {}
            return web.Response(status=206 if wanted else 200, body=content[start:], headers=said)

        return serve

    def asked(self, number: int = 0, checkpoint: str = "c1") -> int:
        return len(self.service.seen_at("GET", f"/store/{checkpoint}/{number}"))


@pytest.fixture
def store(service: ScriptedService) -> Store:
    return Store(service)


def found_in(directory: Path) -> dict[str, bytes]:
    found = {}
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # moved meanwhile
            if path.is_file():
                found[path.relative_to(directory).as_posix()] = path.read_bytes()
    return found


async def test_files_arrive_whole_and_without_the_key(
    client: ServiceClient, store: Store, service: ScriptedService, tmp_path: Path
) -> None:
    files = {"adapter_config.json": b"{}", "weights/part-0.safetensors": bytes(range(256)) * 9000, "empty": b""}
    store.holds(files)
    got = await client.download_checkpoint("c1", dest_dir=tmp_path / "new")
    assert found_in(tmp_path / "new") == files
    assert (got.dest_dir, got.file_count, got.bytes_written) == (
        tmp_path / "new",
        3,
        sum(map(len, files.values())),
    )
    fetched = [seen for seen in service.seen if seen.path.startswith("/store/")]
    assert len(fetched) == 3
    assert all(seen.query == SIGNED and "Authorization" not in seen.headers for seen in fetched)


async def test_pages_are_followed(
    client: ServiceClient, store: Store, service: ScriptedService, tmp_path: Path
) -> None:
    store.holds({"a": b"1", "b": b"2", "c": b"3"})
    entries = [entry(f"{service.url}/store/c1/{number}", name, 1) for number, name in enumerate("abc")]
    service.answer("GET", FILES, Say(body=page(entries[:2], 2)), Say(body=page(entries[2:])))
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": b"1", "b": b"2", "c": b"3"}
    assert [seen.query for seen in service.seen_at("GET", FILES)] == [
        "page_size=1000&page_token=0",
        "page_size=1000&page_token=2",
    ]


async def test_pages_that_go_round_are_not_followed(
    client: ServiceClient, service: ScriptedService, tmp_path: Path
) -> None:
    service.always("GET", FILES, Say(body=page([], 0)))
    with pytest.raises(ProtocolError, match="names 0 as the next"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)


# --- names ---

UNSAFE = [
    "../x",
    "a/../../x",
    "/etc/x",
    "..",
    ".",
    "",
    "a/./b",
    "a//b",
    "a/",
    "..\\x",
    "a\\b",
    "C:x",
    "C:\\x",
    "a/C:/x",
    "a/C:x",
    "\\\\host\\share\\x",
    "a\x00b",
    "a\nb",
    "x\u202egnp.exe",
    "a/.. /b",
    "x.",
    "x ",
]


@pytest.mark.parametrize("name", UNSAFE, ids=repr)
async def test_unsafe_names_are_refused_before_anything_is_written(
    client: ServiceClient, store: Store, tmp_path: Path, name: str
) -> None:
    store.holds({"harmless": b"1", name: b"2"})
    with pytest.raises(ProtocolError, match="nothing was written"):
        await client.download_checkpoint("c1", dest_dir=tmp_path / "dest")
    assert found_in(tmp_path) == {}
    assert store.asked(0) == store.asked(1) == 0


@pytest.mark.parametrize(
    "names", [["a", "A"], ["dir/x", "DIR/x"], ["a", "a/b"], ["A", "a/b"], ["ß", "SS"], ["a/b/c", "a/b"]], ids=repr
)
async def test_names_that_would_overwrite_each_other_are_refused(
    client: ServiceClient, store: Store, tmp_path: Path, names: list[str]
) -> None:
    store.holds({name: name.encode() for name in names})
    with pytest.raises(ProtocolError, match="nothing was written"):
        await client.download_checkpoint("c1", dest_dir=tmp_path / "dest")
    assert found_in(tmp_path) == {}


async def test_the_same_name_twice_from_one_node_is_refused(
    client: ServiceClient, service: ScriptedService, tmp_path: Path
) -> None:
    twice = [entry(f"{service.url}/store/c1/0", "a", 1), entry(f"{service.url}/store/c1/1", "a", 1)]
    service.always("GET", FILES, Say(body=page(twice)))
    with pytest.raises(ProtocolError, match="nothing was written"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)


async def test_the_same_name_from_several_nodes_is_kept_apart(
    client: ServiceClient, store: Store, service: ScriptedService, tmp_path: Path
) -> None:
    store.holds({"x": b"of node 0", "y": b"of node 1!"})
    shards = [entry(f"{service.url}/store/c1/{rank}", "optimizer/shard", 9 + rank, rank) for rank in (0, 1)]
    service.always("GET", FILES, Say(body=page(shards)))
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert sorted(found_in(tmp_path).values()) == [b"of node 0", b"of node 1!"]


async def test_a_name_that_looks_like_a_temporary_one_is_safe(
    client: ServiceClient, store: Store, tmp_path: Path
) -> None:
    files = {"a": b"the file", "a.part": b"and another", "a.part.part": b"and one more"}
    store.holds(files)
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == files


segments = st.one_of(
    st.sampled_from(["..", ".", "", "~", "C:", "a", "A", "con", "a.part", "x" * 40, "node-0", "é"]),
    st.text(st.characters(codec="utf-8"), max_size=6),
)
listed_names = st.lists(
    st.tuples(st.lists(segments, min_size=1, max_size=4).map("/".join), st.integers(0, 1)), min_size=1, max_size=5
)


@given(listed_names)
@example([("../x", 0)])
@example([("a/C:x", 0)])
@example([("a", 0), ("a", 1), ("node-0/a", 0)])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_listed_nothing_leaves_the_directory_and_nothing_is_lost(listing: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as outer:
        dest = Path(outer, "some", "where", "dest")
        files = {number: (name, rank, f"content of {number}".encode()) for number, (name, rank) in enumerate(listing)}
        try:
            asyncio.run(_download_stubbed(files, dest))
        except ProtocolError:
            assert found_in(Path(outer)) == {}, "all or nothing"
        else:
            found = found_in(dest)
            assert sorted(found.values()) == sorted(content for _, _, content in files.values())
            assert found_in(Path(outer)).keys() == {f"some/where/dest/{name}" for name in found}
            for name in found:
                on_windows = PureWindowsPath("D:/dest", *name.split("/"))
                assert on_windows.is_relative_to("D:/dest")


async def _download_stubbed(files: dict[int, tuple[str, int, bytes]], dest: Path) -> None:
    url = "http://loops.invalid"
    with Stubbed() as stubbed:
        stubbed.post(f"{url}/v1/loops/sessions", payload={"session": {"id": "s1"}})
        entries = [
            entry(f"{url}/store/{number}", name, len(content), rank) for number, (name, rank, content) in files.items()
        ]
        stubbed.get(f"{url}{FILES}?page_size=1000&page_token=0", payload=page(entries), repeat=True)
        for number, (_, _, content) in files.items():
            stubbed.get(f"{url}/store/{number}", body=content, repeat=True)
        async with ServiceClient(api_key=KEY, base_url=url) as client:
            await client.download_checkpoint("c1", dest_dir=dest)


@pytest.mark.parametrize("link", ["dir", "dir/file", "other"], ids=["directory", "file", "file at the top"])
async def test_symbolic_links_are_not_followed_out_of_the_directory(
    client: ServiceClient, store: Store, tmp_path: Path, link: str
) -> None:
    outside, dest = tmp_path / "outside", tmp_path / "dest"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    place = dest / link
    place.parent.mkdir(parents=True)
    place.symlink_to(outside if link == "dir" else outside / "file")
    store.holds({"dir/file": b"new", "other": b"new"})
    with pytest.raises(ProtocolError, match=r"symbolic link; nothing was written"):
        await client.download_checkpoint("c1", dest_dir=dest)
    assert found_in(outside) == {"file": b"precious"}


@pytest.mark.parametrize("planted", ["file", "directory"])
async def test_a_symbolic_link_in_place_of_a_half_file_is_not_followed(
    client: ServiceClient, store: Store, service: ScriptedService, tmp_path: Path, quick: Clock, planted: str
) -> None:
    outside, dest = tmp_path / "outside", tmp_path / "dest"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    store.holds({"file": b"the new content"})
    service.always("GET", "/store/c1/0", hang_up_in_the_body)
    with pytest.raises(ConnectError):
        await client.download_checkpoint("c1", dest_dir=dest)
    [half] = [path for path in dest.rglob("*") if path.is_file()]
    half.unlink()
    if planted == "file":
        half.symlink_to(outside / "file")
    else:
        half.parent.rmdir()
        half.parent.symlink_to(outside)
    with pytest.raises(ProtocolError, match="symbolic link"):
        await client.download_checkpoint("c1", dest_dir=dest)
    assert found_in(outside) == {"file": b"precious"}


async def test_a_destination_that_is_a_file_is_refused(client: ServiceClient, store: Store, tmp_path: Path) -> None:
    store.holds({"a": b"1"})
    (tmp_path / "dest").write_bytes(b"precious")
    with pytest.raises(InputError, match="must be a directory"):
        await client.download_checkpoint("c1", dest_dir=tmp_path / "dest")


# --- contents ---


@pytest.mark.parametrize(("listed", "kind"), [(3, ProtocolError), (5, ConnectError)], ids=["longer", "shorter"])
async def test_a_file_of_another_size_never_gets_its_name(
    client: ServiceClient, store: Store, tmp_path: Path, quick: Clock, listed: int, kind: type[LoopsError]
) -> None:
    store.holds({"a": b"1234"}, size_bytes=listed)
    with pytest.raises(kind, match=rf"a has 4 bytes; the listing says {listed}"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert "a" not in found_in(tmp_path)


async def test_what_broke_off_goes_on_where_it_stopped(
    client: ServiceClient, store: Store, service: ScriptedService, tmp_path: Path, quick: Clock
) -> None:
    content = bytes(range(256)) * 4

    async def break_off(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(content))})
        await response.prepare(request)
        await response.write(content[:100])
        await asyncio.sleep(0)
        assert request.transport is not None
        request.transport.close()
        return response

    store.holds({"a": content, "b": b"whole"})
    service.answer("GET", "/store/c1/0", break_off)
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": content, "b": b"whole"}
    first, second = service.seen_at("GET", "/store/c1/0")
    assert "Range" not in first.headers
    assert second.headers.get("Range", "bytes=0-") in ("bytes=0-", "bytes=100-")


async def test_a_later_call_goes_on_where_one_was_stopped(
    client: ServiceClient, store: Store, service: ScriptedService, tmp_path: Path
) -> None:
    files = {"a": b"1234", "b": b"56"}
    store.holds(files)
    held = Hold(Say())
    service.answer("GET", "/store/c1/1", held)
    stopped = asyncio.create_task(client.download_checkpoint("c1", dest_dir=tmp_path))
    await held.arrived.wait()
    while ".c1.part/whole/a" not in found_in(tmp_path):  # noqa: ASYNC110 - nothing else tells when a file is whole
        await asyncio.sleep(0)
    stopped.cancel()
    await asyncio.wait([stopped])
    assert not found_in(tmp_path).keys() & files.keys(), "whole or not at all"
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == files
    assert store.asked(0) == 1


async def test_two_checkpoints_in_one_directory_are_not_mixed_up(
    client: ServiceClient, store: Store, tmp_path: Path
) -> None:
    # The adapters of two steps have the same names and sizes.
    store.holds({"adapter_model.safetensors": b"weights of step 1"}, checkpoint="c1")
    later = {"last_modified": "2026-06-24T18:20:40Z"}
    store.holds({"adapter_model.safetensors": b"weights of step 2"}, checkpoint="c2", **later)
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    await client.download_checkpoint("c2", dest_dir=tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"weights of step 2"


async def test_what_is_there_is_left_alone(client: ServiceClient, store: Store, tmp_path: Path) -> None:
    files = {"a": b"1234", "dir/b": b"56"}
    store.holds(files)
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    (tmp_path / "dir/b").unlink()
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == files
    assert (store.asked(0), store.asked(1)) == (1, 2)


async def test_what_was_changed_is_fetched_again(client: ServiceClient, store: Store, tmp_path: Path) -> None:
    store.holds({"a": b"1234"})
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    (tmp_path / "a").write_bytes(b"MINE")
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": b"1234"}


@pytest.mark.parametrize("status", [401, 403, 410])
async def test_a_url_that_expired_is_asked_for_again(
    client: ServiceClient, store: Store, service: ScriptedService, tmp_path: Path, status: int
) -> None:
    store.holds({"a": b"1234", "b": b"56"})
    service.answer("GET", "/store/c1/1", Say(status, "<Error>expired</Error>"))
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": b"1234", "b": b"56"}
    assert len(service.seen_at("GET", FILES)) == 2


async def test_a_refused_file_is_an_error_that_says_so_without_the_signature(
    client: ServiceClient, store: Store, service: ScriptedService, tmp_path: Path
) -> None:
    store.holds({"a": b"1234"})
    service.always("GET", "/store/c1/0", Say(403, f"<Error>no: /store/c1/0?{SIGNED}</Error>"))
    with pytest.raises(PermissionDeniedError, match=r"download a .*answered 403: <Error>no") as refused:
        await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert "5ecret" not in all_that_it_shows(refused.value)
    assert found_in(tmp_path) == {}


async def test_a_checkpoint_that_does_not_exist(
    client: ServiceClient, service: ScriptedService, tmp_path: Path
) -> None:
    service.always("GET", FILES, Say(404, {"message": "no such checkpoint"}))
    with pytest.raises(NotFoundError, match=r"files of checkpoint c1.*no such checkpoint"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)


async def test_an_error_of_the_disk_is_raised_as_itself(
    client: ServiceClient, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.holds({"a": b"1234", "b": b"56"})
    with full_disk(monkeypatch), pytest.raises(OSError, match="No space left on device") as full:
        await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert full.value.errno == errno.ENOSPC
    assert store.asked(0) <= 1, "more tries do not make more space"


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    async def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(anyio.AsyncFile, "write", no_space)
        yield


async def test_a_cancelled_download_leaves_nothing_under_its_name(
    client: ServiceClient, store: Store, service: ScriptedService, tmp_path: Path
) -> None:
    store.holds({"a": b"1234"})
    held = Hold(Say())
    service.answer("GET", "/store/c1/0", held)
    task = asyncio.create_task(client.download_checkpoint("c1", dest_dir=tmp_path))
    await held.arrived.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert "a" not in found_in(tmp_path)
    held.go.set()
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": b"1234"}


async def test_a_cancelled_download_closes_its_files(
    client: ServiceClient, store: Store, service: ScriptedService, tmp_path: Path
) -> None:
    half_sent = asyncio.Event()

    async def stop_half_way(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "4"})
        await response.prepare(request)
        await response.write(b"12")
        half_sent.set()
        await asyncio.Event().wait()
        return response

    store.holds({"a": b"1234"})
    service.answer("GET", "/store/c1/0", stop_half_way)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = asyncio.create_task(client.download_checkpoint("c1", dest_dir=tmp_path))
        await half_sent.wait()
        while not found_in(tmp_path):  # noqa: ASYNC110 - nothing else tells when a file is opened
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        del task
        gc.collect()
    assert [str(warning.message) for warning in caught] == []

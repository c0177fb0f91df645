"""Downloading a checkpoint: nothing outside its directory, nothing mixed up, no key to the files, whole listings."""

from __future__ import annotations

import asyncio
import gzip
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from loops_async import InputError, NotFoundError, ProtocolError, ServiceClient, UnsupportedError
from tests.support.colours import Colour
from tests.support.files import FILES, SIGNED, FileStore, entry, found_in, page
from tests.support.scripted import KEY, Say, ScriptedService
from tests.support.stubbed import Stubbed

HOST = "https://loops.invalid"


async def test_files_arrive_whole_and_without_the_key(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path
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
    assert all(seen.query.startswith(SIGNED) and "Authorization" not in seen.headers for seen in fetched)


async def test_a_signed_url_is_sent_byte_for_byte(
    client: ServiceClient, service: ScriptedService, tmp_path: Path
) -> None:
    path, query = "/store/runs%3Ar1/a%2Bb%28v1%29.bin", "X-Amz-Credential=AK%2F2026%2Fs3&sig=ab%2bc%3D"
    service.always("GET", FILES, Say(body=page([entry(f"{service.url}{path}?{query}", "a", 5)])))
    service.always("GET", path, Say(body=b"12345"))
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": b"12345"}
    assert service.seen_at("GET", path)[0].query == query


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("is_relative", [True, False])
async def test_a_redirect_of_a_file_store_is_followed_without_the_key(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path, status: int, is_relative: bool
) -> None:
    store.holds({"a": b"12345"})
    place = "/elsewhere%3A?sig=a%2fb"
    service.always("GET", "/store/c1/0", Say(status, "", {"Location": place if is_relative else service.url + place}))
    service.always("GET", "/elsewhere%3A", Say(body=b"12345"))
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": b"12345"}
    [seen] = service.seen_at("GET", "/elsewhere%3A")
    assert seen.query == "sig=a%2fb"
    assert "Authorization" not in seen.headers


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("/store/c1/0", "redirected more than 5 times"),
        ("file:///etc/passwd", "which is not followed"),
        ("", "redirect"),
    ],
)
async def test_a_redirect_that_leads_nowhere_is_refused(
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path, place: str, said: str
) -> None:
    store.holds({"a": b"12345"})
    service.always("GET", "/store/c1/0", Say(302, "", {"Location": place}))
    with pytest.raises(ProtocolError, match=said):
        await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert store.asked() <= 6


async def test_a_file_that_is_stored_compressed_is_kept_as_it_is_stored(
    client: ServiceClient, store: FileStore, tmp_path: Path
) -> None:
    stored = gzip.compress(b'{"r": 16}' * 100)
    store.holds({"a": stored}, headers={"Content-Encoding": "gzip"})
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": stored}


@pytest.mark.parametrize(
    "time", ["Wed, 24 Jun 2026 18:20:39 GMT", "", "2026-06-24T18:20:39", "0001-01-01T00:00:00", 1782325239, None]
)
async def test_times_of_any_form_are_read(
    client: ServiceClient, store: FileStore, tmp_path: Path, time: str | int | None
) -> None:
    store.holds({"a": b"12345"}, last_modified=time)
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": b"12345"}


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
    "weights.bin:stream",
    "CON",
    "a/aux.safetensors",
    "com1.json",
    "LPT\u00b9",
    "nul .txt",
    "a?b",
    "a|b",
    "x" * 256,
    "\u00e9" * 128,
]


@pytest.mark.parametrize("name", UNSAFE, ids=repr)
async def test_unsafe_names_are_refused_before_anything_is_written(
    client: ServiceClient, store: FileStore, tmp_path: Path, name: str
) -> None:
    store.holds({"harmless": b"1", name: b"2"})
    with pytest.raises(ProtocolError, match=r"unsafe file name.*nothing was written"):
        await client.download_checkpoint("c1", dest_dir=tmp_path / "dest")
    assert found_in(tmp_path) == {}
    assert store.asked(0) == store.asked(1) == 0


@pytest.mark.parametrize(
    "names", [["a", "A"], ["dir/x", "DIR/x"], ["a", "a/b"], ["A", "a/b"], ["ß", "SS"], ["a/b/c", "a/b"]], ids=repr
)
async def test_names_that_would_overwrite_each_other_are_refused(
    client: ServiceClient, store: FileStore, tmp_path: Path, names: list[str]
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
    client: ServiceClient, store: FileStore, service: ScriptedService, tmp_path: Path
) -> None:
    store.holds({"x": b"of node 0", "y": b"of node 1!"})
    shards = [entry(f"{service.url}/store/c1/{rank}", "optimizer/shard", 9 + rank, rank) for rank in (0, 1)]
    service.always("GET", FILES, Say(body=page(shards)))
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {
        "node-0/optimizer/shard": b"of node 0",
        "node-1/optimizer/shard": b"of node 1!",
    }


async def test_a_name_that_looks_like_a_temporary_one_is_safe(
    client: ServiceClient, store: FileStore, tmp_path: Path
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


@asynccontextmanager
async def stubbed_client() -> AsyncIterator[tuple[Stubbed, ServiceClient]]:
    with Stubbed() as stubbed:
        stubbed.post(f"{HOST}/v1/loops/sessions", payload={"session": {"id": "s1"}})
        async with ServiceClient(api_key=KEY, base_url=HOST) as client:
            yield stubbed, client


async def _download_stubbed(files: dict[int, tuple[str, int, bytes]], dest: Path) -> None:
    async with stubbed_client() as (stubbed, client):
        entries = []
        for number, (name, rank, content) in files.items():
            url = f"{HOST}/store/{number}"
            stubbed.get(url, body=content, repeat=True)
            entries.append(entry(url, name, len(content), rank))
        stubbed.get(f"{HOST}{FILES}?page_size=1000&page_token=0", payload=page(entries), repeat=True)
        await client.download_checkpoint("c1", dest_dir=dest)


@pytest.mark.parametrize("link", ["dir", "dir/file", "other"], ids=["directory", "file", "file at the top"])
async def test_symbolic_links_are_not_followed_out_of_the_directory(
    client: ServiceClient, store: FileStore, tmp_path: Path, link: str
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


async def test_a_destination_that_is_a_file_is_refused(client: ServiceClient, store: FileStore, tmp_path: Path) -> None:
    store.holds({"a": b"1"})
    (tmp_path / "dest").write_bytes(b"precious")
    with pytest.raises(InputError, match="must be a directory"):
        await client.download_checkpoint("c1", dest_dir=tmp_path / "dest")


# --- listings ---


async def test_pages_that_go_round_are_not_followed(
    client: ServiceClient, service: ScriptedService, tmp_path: Path
) -> None:
    service.always("GET", FILES, Say(body=page([], 0)))
    with pytest.raises(ProtocolError, match="names 0 as the next"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)


async def test_a_listing_that_is_not_whole_is_refused(
    client: ServiceClient, service: ScriptedService, tmp_path: Path
) -> None:
    service.always("GET", FILES, Say(body=page([]) | {"total_count": 3}))
    with pytest.raises(ProtocolError, match="its pages list 0 files of 3"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)


async def test_files_can_be_iterated_over(service: ScriptedService, store: FileStore, colour: Colour) -> None:
    names = [f"f{number}" for number in range(7)]
    store.holds(dict.fromkeys(names, b""))
    async with colour.connected(api_key=KEY, base_url=service.url) as client:
        assert [file.relative_file_name async for file in client.checkpoint_files("c1", page_size=3)] == names
    assert [seen.query for seen in service.seen_at("GET", FILES)] == [
        f"page_size=3&page_token={token}" for token in (0, 3, 6)
    ]


@given(st.integers(0, 40), st.integers(1, 50), st.lists(st.integers(1, 12), max_size=50))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_pages_of_any_size_make_one_listing(count: int, page_size: int, served: list[int]) -> None:
    """A service may give fewer files than were requested, and other numbers each time."""

    async def listed() -> list[str]:
        sizes = iter(served)
        entries = [entry(f"{HOST}/store/{number}", f"f{number}", 1) for number in range(count)]
        async with stubbed_client() as (stubbed, client):
            token: int | None = 0
            while token is not None:
                end = token + min(page_size, next(sizes, page_size))
                following = end if end < count else None
                url = f"{HOST}{FILES}?page_size={page_size}&page_token={token}"
                stubbed.get(url, payload=page(entries[token:end], following) | {"total_count": count})
                token = following
            return [file.relative_file_name async for file in client.checkpoint_files("c1", page_size=page_size)]

    assert asyncio.run(listed()) == [f"f{number}" for number in range(count)]


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
    client: ServiceClient, service: ScriptedService, tmp_path: Path, source: dict[str, str], said: str
) -> None:
    refusal = {"code": "BAD_REQUEST", "message": "not presignable", "details": {"reason": "NOT_PRESIGNABLE"}}
    service.always("GET", FILES, Say(400, refusal))
    service.always("GET", "/v1/loops/checkpoints/c1/source", Say(body={"source": source}))
    with pytest.raises(UnsupportedError, match=said):
        await client.download_checkpoint("c1", dest_dir=tmp_path)


# --- a second time ---


async def test_two_checkpoints_in_one_directory_are_not_mixed_up(
    client: ServiceClient, store: FileStore, tmp_path: Path
) -> None:
    # The adapters of two steps have the same names and sizes.
    store.holds({"adapter_model.safetensors": b"weights of step 1"}, checkpoint="c1")
    later = {"last_modified": "2026-06-24T18:20:40Z"}
    store.holds({"adapter_model.safetensors": b"weights of step 2"}, checkpoint="c2", **later)
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    await client.download_checkpoint("c2", dest_dir=tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"weights of step 2"


async def test_what_is_there_is_left_alone(client: ServiceClient, store: FileStore, tmp_path: Path) -> None:
    files = {"a": b"1234", "dir/b": b"56"}
    store.holds(files)
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    (tmp_path / "dir/b").unlink()
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == files
    assert (store.asked(0), store.asked(1)) == (1, 2)


async def test_what_was_changed_is_fetched_again(client: ServiceClient, store: FileStore, tmp_path: Path) -> None:
    store.holds({"a": b"1234"})
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    (tmp_path / "a").write_bytes(b"MINE")
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert found_in(tmp_path) == {"a": b"1234"}


async def test_a_checkpoint_that_does_not_exist(
    client: ServiceClient, service: ScriptedService, tmp_path: Path
) -> None:
    service.always("GET", FILES, Say(404, {"message": "no such checkpoint"}))
    with pytest.raises(NotFoundError, match=r"files of checkpoint c1.*no such checkpoint"):
        await client.download_checkpoint("c1", dest_dir=tmp_path)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from tests.service.api import MODEL, Api, datum


async def files(api: Api, checkpoint_id: str, **query: Any) -> dict[str, Any]:
    return await api.get(f"/v1/loops/checkpoints/{checkpoint_id}/files", params=query)


async def a_checkpoint(api: Api) -> tuple[dict[str, Any], dict[str, Any]]:
    run = await api.run()
    await api.operate(run, "save_state", {"name": "one"})
    return run, (await api.checkpoints(run["id"]))[0]


def directory_of(api: Api, checkpoint: dict[str, Any]) -> Path:
    return api.local.data_dir / "checkpoints" / checkpoint["run_id"] / checkpoint["id"]


async def test_files_come_in_pages_and_download_without_a_key(api: Api) -> None:
    _, checkpoint = await a_checkpoint(api)
    directory = directory_of(api, checkpoint)
    (directory / "deep" / "er").mkdir(parents=True)
    (directory / "deep" / "er" / "ü b.bin").write_bytes(b"x" * 5)
    whole = await files(api, checkpoint["id"])
    names = [file["relative_file_name"] for file in whole["presigned_urls"]]
    assert names == ["adapter_config.json", "adapter_model.safetensors", "deep/er/ü b.bin", "trainer_state.json"]
    assert (whole["total_count"], whole["next_page_token"]) == (4, None)
    for file in whole["presigned_urls"]:
        response = await api.ask("GET", file["url"], key=None)
        assert response.body == (directory / file["relative_file_name"]).read_bytes()
        assert int(response.headers["Content-Length"]) == file["size_bytes"]
    first = await files(api, checkpoint["id"], page_size=3)
    assert (len(first["presigned_urls"]), first["next_page_token"], first["total_count"]) == (3, 3, 4)
    rest = await files(api, checkpoint["id"], page_size=3, page_token=3)
    assert [file["relative_file_name"] for file in rest["presigned_urls"]] == names[3:]
    assert rest["next_page_token"] is None
    assert (await files(api, checkpoint["id"], page_token=99))["presigned_urls"] == []


@pytest.mark.parametrize(
    ("field", "value"), [("page_size", "0"), ("page_size", "x"), ("page_token", "-1"), ("page_token", "1.5")]
)
async def test_bad_page_is_named(api: Api, field: str, value: str) -> None:
    _, checkpoint = await a_checkpoint(api)
    error = await api.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files", params={field: value}, status=400)
    assert error["details"] == {"field": field}


async def test_a_part_of_a_file_can_be_asked_for(api: Api) -> None:
    _, checkpoint = await a_checkpoint(api)
    file = (await files(api, checkpoint["id"]))["presigned_urls"][1]
    whole = (await api.ask("GET", file["url"], key=None)).body
    part = await api.ask("GET", file["url"], key=None, headers={"Range": "bytes=10-19"}, status=206)
    assert part.body == whole[10:20]


async def test_a_url_is_good_for_one_file_and_for_a_while(serve: Any) -> None:
    api = await serve(file_url_seconds=60)
    _, checkpoint = await a_checkpoint(api)
    urls = [URL(file["url"]) for file in (await files(api, checkpoint["id"]))["presigned_urls"]]
    await api.ask("GET", str(urls[0]), key=None)
    wrong = [
        urls[0].with_path(urls[1].path, keep_query=True),
        urls[0].update_query(expires=str(int(urls[0].query["expires"]) + 1)),
        urls[0].update_query(signature="0" * 64),
        urls[0].update_query(signature="é"),
        urls[0].with_query(None),
    ]
    for url in wrong:
        error = await api.get(str(url), key=None, status=403)
        assert "signature" in error["message"]
    # A key is no substitute for a signature.
    await api.ask("GET", str(urls[0].with_query(None)), status=403)


async def test_an_expired_url_says_so(serve: Any) -> None:
    api = await serve(file_url_seconds=0)
    _, checkpoint = await a_checkpoint(api)
    url = (await files(api, checkpoint["id"]))["presigned_urls"][0]["url"]
    assert "expired" in (await api.get(url, key=None, status=403))["message"]


async def test_a_name_that_is_saved_again_is_replaced(api: Api) -> None:
    run, old = await a_checkpoint(api)
    await api.train(run)
    await api.operate(run, "save_state", {"name": "one"})
    (new,) = await api.checkpoints(run["id"])
    assert new["id"] != old["id"]
    assert not directory_of(api, old).exists()
    assert directory_of(api, new).is_dir()
    await api.get(f"/v1/loops/checkpoints/{old['id']}/files", status=404)


async def test_what_is_served_outlives_its_replacement(api: Api) -> None:
    run = await api.run()
    await api.train(run)
    await api.publish(run, "s")
    live = (await api.checkpoints(run["id"]))[0]
    await api.train(run)
    await api.publish(run, "s", bump=False)
    assert directory_of(api, live).is_dir()
    assert (await api.sample(run["sampler"]["base_url"]))[1] == "1"
    await api.publish(run, "s")
    assert not directory_of(api, live).exists()


async def test_checkpoints_expire(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    run = await api.run()
    await api.operate(run, "save_state", {"name": "short", "ttl_seconds": 3600})
    await api.operate(run, "save_state", {"name": "long"})
    short, _ = await api.checkpoints(run["id"])
    assert directory_of(api, short).is_dir()
    from loops_local._storage import records

    later = records.now().replace(year=records.now().year + 1)
    monkeypatch.setattr(records, "now", lambda: later)
    assert [checkpoint["checkpoint_id"] for checkpoint in await api.checkpoints(run["id"])] == ["long"]
    await api.get(f"/v1/loops/checkpoints/{short['id']}/files", status=404)
    assert not directory_of(api, short).exists()


async def test_loading_continues_from_the_checkpoint(api: Api) -> None:
    run = await api.run(lora_rank=8)
    await api.train(run, 3)
    path = (await api.operate(run, "save_state", {"name": "three"}))["path"]
    assert path == f"bt://loops:{run['id']}/weights/three"
    await api.train(run, 1)
    assert await api.operate(run, "load_state_with_optimizer", {"path": path}) == {"step": 3}
    other = await api.run(lora_rank=4)
    assert await api.operate(other, "load_state_with_optimizer", {"path": path}) == {"step": 3}
    await api.publish(other)
    assert (await api.checkpoints(other["id"]))[0]["lora_adapter_config"] == {"r": 8}


async def test_loading_a_directory_inside_the_data_directory(api: Api) -> None:
    run, checkpoint = await a_checkpoint(api)
    directory = directory_of(api, checkpoint)
    for path in (str(directory), directory.as_uri()):
        assert await api.operate(run, "load_state", {"path": path}) == {"step": 0}


@pytest.mark.parametrize(
    "path",
    [
        "/etc",
        "file:///etc",
        "../..",
        "checkpoints/../../..",
        "nowhere",
        "s3://bucket/x",
        "bt://loops:nobody/weights/x",
        "bt://loops:x/weights/..",
    ],
)
async def test_loading_from_anywhere_else_is_refused(api: Api, path: str) -> None:
    run = await api.run()
    await api.train(run)
    assert await api.refused(run, "load_state", {"path": path})
    assert await api.get(f"{run['base_url']}/policy_version") == {"policy_version": 1}, "the trainer is as it was"


async def test_a_link_that_leads_out_of_the_data_directory_is_refused(api: Api, tmp_path: Path) -> None:
    run, checkpoint = await a_checkpoint(api)
    (api.local.data_dir / "link").symlink_to(tmp_path)
    assert "data directory" in await api.refused(run, "load_state", {"path": "link"})
    secret = tmp_path / "secret"
    secret.write_text("s")
    (directory_of(api, checkpoint) / "link").symlink_to(secret)
    names = {file["relative_file_name"] for file in (await files(api, checkpoint["id"]))["presigned_urls"]}
    assert "link" not in names


async def test_loading_a_checkpoint_of_another_model_or_kind_is_refused(api: Api) -> None:
    run, other = await api.run(), await api.run(base_model="other")
    path = (await api.operate(other, "save_state", {"name": "x"}))["path"]
    assert "other" in await api.refused(run, "load_state", {"path": path})
    served = (await api.publish(run))["path"]
    assert "'weights'" in await api.refused(run, "load_state", {"path": served})


async def test_a_failed_save_leaves_nothing_to_see(serve: Any) -> None:
    from loops_local.engine.echo import EchoEngine, EchoTrainer

    class Full(EchoTrainer):
        def save(self, directory: Path) -> None:
            super().save(directory)
            raise OSError("disk full")

    class FullEngine(EchoEngine):
        def trainer(self, rank: int, seed: int | None = None) -> EchoTrainer:
            return Full(rank)

    api = await serve(engine=FullEngine)
    run = await api.run()
    assert await api.refused(run, "save_state", {"name": "x"}) == "OSError: disk full"
    assert await api.checkpoints(run["id"]) == []
    assert list((api.local.data_dir / "checkpoints").glob("*/*")) == []
    await api.operate(run, "forward", {"data": [datum(1, 2)]})


async def test_weights_of_a_run_are_of_its_model(api: Api) -> None:
    run, checkpoint = await a_checkpoint(api)
    assert checkpoint["base_model"] == run["base_model"] == MODEL


async def test_what_a_client_was_pinned_to_outlives_its_replacement(serve: Any, tmp_path: Path) -> None:
    api = await serve(data_dir=tmp_path)
    run = await api.run()
    await api.publish(run, "s", bump=False)
    (old,) = await api.checkpoints(run["id"])
    path = f"bt://loops:{run['id']}/sampler_weights/s"
    assert await api.post("/v1/loops/checkpoints/validate", {"checkpoint_path": path}) == {"id": old["id"]}
    await api.publish(run, "s", bump=False)
    (new,) = await api.checkpoints(run["id"])
    assert new["id"] != old["id"]
    await api.get(f"/v1/loops/checkpoints/{old['id']}/files", status=404)
    await api.local.__aexit__(None, None, None)

    api = await serve(data_dir=tmp_path)
    assert directory_of(api, old).is_dir()
    await api.post(f"/v1/loops/runs/{run['id']}/deactivate", {})
    assert not directory_of(api, old).exists()
    assert directory_of(api, new).is_dir()


async def test_a_checkpoint_that_is_gone_is_not_taken_for_its_successor(api: Api) -> None:
    run = await api.run()
    await api.publish(run, "s", bump=False)
    (old,) = await api.checkpoints(run["id"])
    await api.publish(run, "s", bump=False)
    path = f"bt://loops:{run['id']}/sampler_weights/s"
    headers = {"X-Checkpoint-Path": path, "X-Checkpoint-Id": old["id"]}
    refused = await api.post(f"{run['sampler']['base_url']}/sample", {"prompt": [1]}, headers=headers, status=400)
    assert "was replaced by another of its name" in str(refused)

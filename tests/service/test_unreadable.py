"""Whatever is sent, at every route: the answer is an error of the caller, never one of the service."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.service.api import Api

BODIES = {
    "latin-1 text": b'{"name": "\xff"}',
    "a key that is not UTF-8": b'{"\xff\xfe": 1}',
    "deep arrays": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a deep unknown field": b'{"unknown":' + b"[" * 100_000,
    "5000 digits": b'{"lora_rank": ' + b"9" * 5000 + b"}",
    "no float": b'{"lora_rank": 1e999}',
    "NaN": b'{"lora_rank": NaN}',
    "the same key twice": b'{"session_id": "a", "session_id": 5}',
    "half a surrogate pair": b'{"name": "\\ud83d"}',
    "NUL": b'{"name": "\\u0000", "path": "\\u0000", "base_model": "\\u0000", "checkpoint_path": "\\u0000"}',
    "cut": b'{"name":',
    "null": b"null",
    "a byte order mark": b"\xef\xbb\xbf{}",
}


async def operations(api: Api) -> list[tuple[str, str]]:
    """Every method and path of the service's own document, with ids that may exist in place of the parameters."""
    run = await api.run()
    ids = {"run_id": run["id"], "sampler_id": run["sampler"]["id"], "deployment_id": run["deployment_id"]}
    paths = (await api.get("/openapi.json"))["paths"]
    return [
        (method.upper(), re.sub(r"\{(\w+)\}", lambda name: ids.get(name[1], "sync"), path))
        for path, methods in paths.items()
        for method in methods
    ]


async def statuses(api: Api, method: str, path: str, **options: Any) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {api.local.api_key}", **options.pop("headers", {})}
    async with api.http.request(method, api.local.base_url + path, headers=headers, **options) as response:
        return response.status, await response.read()


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_unreadable_bodies(api: Api, body: bytes) -> None:
    for method, path in await operations(api):
        if method not in ("POST", "PATCH"):
            continue
        status, answer = await statuses(api, method, path, data=body)
        assert status < 500, (method, path, answer)
        if status >= 400:
            assert json.loads(answer)["message"]


@pytest.mark.parametrize("name", ["latin-1 text", "deep objects", "a deep unknown field"])
async def test_text_that_is_not_utf8_or_too_deep_is_422(api: Api, name: str) -> None:
    session_id = await api.session()
    body = BODIES[name].replace(b"{", f'{{"session_id": "{session_id}", "base_model": "m", '.encode(), 1)
    for path in ("/v1/loops/runs", "/v1/loops/trainers", "/local/trainer/save_state"):
        status, answer = await statuses(api, "POST", path, data=body)
        assert (status, json.loads(answer)["code"]) == (422, "UNREADABLE_BODY")


async def test_a_compressed_body_is_415(api: Api) -> None:
    for encoding in ("gzip", "deflate", "br"):
        options = {"data": b"not that", "headers": {"Content-Encoding": encoding}}
        assert (await statuses(api, "POST", "/v1/loops/runs", **options))[0] == 415


@pytest.mark.parametrize("value", ["%00", "%ff", "%ed%a0%80", "9" * 5000, "-1", "9" * 14, "%C2%B2"])
async def test_odd_parameters(api: Api, value: str) -> None:
    names = ("page_size", "page_token", "limit", "max_seq_len", "start_epoch_millis", "end_epoch_millis", "run_id")
    for method, path in await operations(api):
        for name in names if method == "GET" else ():
            status, answer = await statuses(api, method, f"{path}?{name}={value}")
            assert status < 500, (method, path, name, answer)


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        ("save_state", {"name": "a", "ttl_seconds": 10**18}),
        ("save_weights_for_sampler", {"name": "a", "ttl_seconds": 10**30}),
    ],
)
async def test_a_lifetime_without_end_is_refused(api: Api, operation: str, body: dict[str, Any]) -> None:
    run = await api.run()
    error = await api.post(f"{run['base_url']}/{operation}", body, status=422)
    assert error["details"] == {"field": "ttl_seconds"}


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "file:///%00"])
async def test_a_path_that_no_system_has_is_refused(api: Api, path: str) -> None:
    assert "path" in await api.refused(await api.run(), "load_state", {"path": path})


async def test_a_model_whose_name_would_forge_log_lines_is_refused(api: Api) -> None:
    body = {"session_id": await api.session(), "base_model": "m\nforged"}
    assert (await api.post("/v1/loops/runs", body, status=400))["details"] == {"field": "base_model"}

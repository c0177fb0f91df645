"""The service's own document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from loops_local._http.openapi import document
from tests.service.api import Api


async def test_it_needs_no_key_and_has_every_route(api: Api) -> None:
    document = await api.get("/openapi.json", key=None)
    assert document["openapi"] == "3.1.0"
    for method, path in (
        ("get", "/openapi.json"),
        ("post", "/v1/loops/runs"),
        ("post", "/v1/teams/{team_id}/loops/runs"),
        ("post", "/trainers/{run_id}/forward_backward"),
        ("post", "/local/trainer/optim_step"),
        ("get", "/samplers/{sampler_id}/queue/operations/{operation_id}"),
        ("get", "/files/{checkpoint_id}/{name}"),
    ):
        assert method in document["paths"][path]


async def test_every_reference_leads_somewhere(api: Api) -> None:
    document = await api.get("/openapi.json")
    for reference in references(document):
        found: Any = document
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
        assert found


async def test_every_operation_is_whole(api: Api) -> None:
    paths = (await api.get("/openapi.json"))["paths"]
    operations = [(path, method, one) for path, methods in paths.items() for method, one in methods.items()]
    assert len({one["operationId"] for _, _, one in operations}) == len(operations) > 70
    for path, _, one in operations:
        in_path = {parameter["name"] for parameter in one["parameters"] if parameter["in"] == "path"}
        assert in_path == {part[1:-1] for part in path.split("/") if part.startswith("{")}
        assert {"default"} < set(one["responses"])
    run = paths["/v1/loops/runs"]["post"]
    body = run["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/CreateRunRequest"}


async def test_the_schemas_are_those_of_the_types(api: Api) -> None:
    schemas = (await api.get("/openapi.json"))["components"]["schemas"]
    assert schemas["CreateRunRequest"]["required"] == ["session_id", "base_model"]
    assert schemas["RunResponse"]["properties"] == {"run": {"$ref": "#/components/schemas/Run"}}


def test_a_route_without_a_description_is_an_error() -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response()

    with pytest.raises(AttributeError):
        document([web.get("/x", handler)])


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)

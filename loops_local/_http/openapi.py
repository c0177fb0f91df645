"""The OpenAPI 3.1 document of the service, made from its routes and from the types of their bodies.

Each handler says with `described` what its route takes and answers. The schemas are msgspec's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import msgspec
from aiohttp import web
from msgspec import Struct

from . import paths
from .responses import encoded_response

__all__ = ["FILE", "Description", "Error", "Outcome", "described", "document", "document_route", "object_with"]

H = TypeVar("H", bound=Callable[..., Any])

FILE: Final = bytes
"""The answer of a route that sends a file or a text."""

_DESCRIPTION: Final = "__route_description__"
_PARAMETER: Final = re.compile(r"\{(\w+)(?::([^}]*))?\}")
_SCHEMA_REF: Final = "#/components/schemas/{name}"
_WITHOUT_KEY: Final = (f"{paths.FILES}/", f"{paths.ARCHIVES}/", f"{paths.LOCAL}/", paths.OPENAPI, paths.DASHBOARD)


class Error(Struct, kw_only=True):
    """The body of every error; some APIs also have the message as `error`, and a `type`."""

    code: str
    message: str
    details: dict[str, Any]
    error: str | None = None
    type: str | None = None


class Outcome(Struct, kw_only=True):
    """The body of a poll of an operation that has ended: its `result`, or its `error` and the name of the cause."""

    status: Literal["done", "error"]
    result: Any = None
    error: str | None = None
    error_class: str | None = None


class Description(Struct, frozen=True, kw_only=True):
    """What a route takes and answers; `is_optional` is for a body that may be missing."""

    summary: str
    answer: Any
    body: Any = None
    is_optional: bool = False
    status: int = 200
    query: Mapping[str, Any] = {}
    headers: Sequence[str] = ()


def described(
    summary: str,
    answer: Any,
    *,
    body: Any = None,
    is_optional: bool = False,
    status: int = 200,
    query: Mapping[str, Any] | None = None,
    headers: Sequence[str] = (),
) -> Callable[[H], H]:
    """Describe the route of a handler; the arguments are those of `Description`."""
    description = Description(
        summary=summary,
        answer=answer,
        body=body,
        is_optional=is_optional,
        status=status,
        query=query or {},
        headers=headers,
    )

    def attach(handler: H) -> H:
        setattr(handler, _DESCRIPTION, description)
        return handler

    return attach


def object_with(name: str, **fields: Any) -> Any:
    """Return the type of a JSON object with these fields, for answers that have no type of their own."""
    return msgspec.defstruct(name, list(fields.items()), kw_only=True)


def document_route(routes: Iterable[web.RouteDef]) -> web.RouteDef:
    """Return the route that serves the document of `routes` and of itself."""
    encoded: list[bytes] = []

    @described("This document", dict[str, Any])
    async def get_document(_request: web.Request) -> web.Response:
        if not encoded:
            encoded.append(msgspec.json.encode(document([*routes, route])))
        return encoded_response(encoded[0])

    route = web.get(paths.OPENAPI, get_document)
    return route


def document(routes: Iterable[web.RouteDef]) -> dict[str, Any]:
    """Return the document of all `routes`, each of which must have a description."""
    described_routes = [(route, _description(route)) for route in routes]
    types = [kind for _, description in described_routes for kind in _types_of(description)] + [Error]
    schemas, components = msgspec.json.schema_components(types, ref_template=_SCHEMA_REF)
    schema_of = dict(zip(map(repr, types), schemas, strict=True))
    operations: dict[str, dict[str, Any]] = {}
    for route, description in described_routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        operation = _operation(route, description, schema_of)
        operations.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Loops",
            "version": "1",
            "description": "The embedded service: control plane, trainers and samplers.",
        },
        "paths": operations,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _description(route: web.RouteDef) -> Description:
    description: Description = getattr(route.handler, _DESCRIPTION)
    return description


def _types_of(description: Description) -> list[Any]:
    bodies = [kind for kind in (description.body, description.answer) if kind is not None]
    return [*bodies, *description.query.values()]


def _operation(route: web.RouteDef, description: Description, schema_of: Mapping[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", route.method.lower() + _PARAMETER.sub(r"\1", route.path)),
        "summary": description.summary,
        "parameters": [
            *(_parameter("path", name, _path_schema(pattern)) for name, pattern in _PARAMETER.findall(route.path)),
            *(_parameter("query", name, schema_of[repr(kind)]) for name, kind in description.query.items()),
            *(_parameter("header", name, {"type": "string"}) for name in description.headers),
        ],
        "responses": {
            str(description.status): {"description": "Success"} | _content(description.answer, schema_of),
            "default": {"description": "An error"} | _content(Error, schema_of),
        },
    }
    if description.body is not None:
        required = {"required": not description.is_optional}
        operation["requestBody"] = required | _content(description.body, schema_of)
    if route.path.startswith(_WITHOUT_KEY) and route.path != paths.DASHBOARD_DATA:
        operation["security"] = []
    return operation


def _parameter(place: Literal["path", "query", "header"], name: str, schema: Any) -> dict[str, Any]:
    return {"in": place, "name": name, "required": place == "path", "schema": schema}


def _path_schema(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^(?:{pattern})$"} if pattern else {"type": "string", "minLength": 1}


def _content(kind: Any, schema_of: Mapping[str, Any]) -> dict[str, Any]:
    if kind is FILE:
        return {"content": {"*/*": {}}}
    return {"content": {"application/json": {"schema": schema_of[repr(kind)]}}}

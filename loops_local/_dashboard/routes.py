"""The handlers of the dashboard. Who may call them is decided in `_http.authorization`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from aiohttp import web

from .._errors import not_found
from .._http.openapi import FILE, described
from .._http.paths import DASHBOARD, DASHBOARD_DATA
from .._http.responses import json_response
from .._resources.activity import SLICE_SECONDS
from .data import DashboardData, Gatherer

__all__ = ["DashboardRoutes"]

_DIRECTORY: Final = Path(__file__).parent
_PAGE: Final = "page.html"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES: Final = frozenset(path.name for path in _DIRECTORY.iterdir() if path.suffix in _TYPES)

_PAGE_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_DATA_HEADERS: Final = {**_PAGE_HEADERS, "Cache-Control": "no-store"}


class DashboardRoutes:
    """Serves the page and its data."""

    def __init__(self, gatherer: Gatherer) -> None:
        self._gatherer = gatherer

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [
            web.get(DASHBOARD, self.page),
            web.get(DASHBOARD_DATA, self.data),
            web.get(f"{DASHBOARD}/{{name}}", self.file),
        ]

    async def watch(self) -> None:
        """Measure the figures that are shown over time, until it is cancelled."""
        while True:
            await asyncio.sleep(SLICE_SECONDS)
            self._gatherer.measure()

    @described("The dashboard", FILE)
    async def page(self, _request: web.Request) -> web.StreamResponse:
        return _file(_PAGE)

    @described("A file of the dashboard's page", FILE)
    async def file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name not in _FILES:
            raise not_found("file", name)
        return _file(name)

    @described("The data of the dashboard; with its token or the API key", DashboardData, query={"run": str})
    async def data(self, request: web.Request) -> web.Response:
        address = f"{request.scheme}://{request.host}"
        data = await self._gatherer.data(address, request.query.get("run"))
        return json_response(data, headers=_DATA_HEADERS)


def _file(name: str) -> web.FileResponse:
    kind = f"{_TYPES[Path(name).suffix]}; charset=utf-8"
    return web.FileResponse(_DIRECTORY / name, headers={**_PAGE_HEADERS, "Content-Type": kind})

"""A service that says what a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

import loops_async
import loops_sync

KEY = "key-that-nobody-may-see"

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Asked(NamedTuple):
    """A request as it arrived; `path` is still escaped and has the query."""

    method: str
    path: str
    body: Any
    headers: Mapping[str, str]


class Stub:
    """Answers each ``"METHOD /path"`` as told, once for each time it was told, the last one for ever."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[Asked] = []
        self._answers: dict[str, list[Answer]] = {}

    def on(self, route: str, body: Any = None, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answer `route` with `body` as JSON."""

        async def answer(_: web.Request) -> web.Response:
            text = msgspec.json.encode({} if body is None else body)
            return web.Response(body=text, status=status, headers=headers, content_type="application/json")

        self.call(route, answer)

    def lose(self, route: str) -> None:
        """Break the connection instead of answering."""

        async def answer(request: web.Request) -> web.Response:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        self.call(route, answer)

    def call(self, route: str, answer: Answer) -> None:
        """Answer `route` with what `answer` returns."""
        self._answers.setdefault(route, []).append(answer)

    def forget(self, route: str) -> None:
        """Go on with what `route` was told to answer next."""
        self._answers[route].pop(0)

    def count(self, route: str) -> int:
        """Return how often `route` was asked."""
        return sum(f"{asked.method} {asked.path.split('?')[0]}" == route for asked in self.asked)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert isinstance(request, web.BaseRequest)
        raw = await request.read()
        body = msgspec.json.decode(raw) if raw else None
        self.asked.append(Asked(request.method, request.raw_path, body, request.headers))
        answers = self._answers.get(f"{request.method} {request.raw_path.split('?')[0]}")
        if not answers:
            return web.json_response({"code": "NOT_FOUND", "message": "no such route"}, status=404)
        answer = answers[0] if len(answers) == 1 else answers.pop(0)
        return await answer(request)  # type: ignore[arg-type]  # handlers use what both kinds of request have


@asynccontextmanager
async def serving() -> AsyncIterator[Stub]:
    """Serve a stub that lets anybody open the session ``s1``."""
    stub = Stub()
    stub.on("POST /v1/loops/sessions", {"session": {"id": "s1"}})
    runner = web.ServerRunner(web.Server(stub.handle, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        stub.url = f"http://{host}:{port}"
        yield stub
    finally:
        await runner.cleanup()


class Colour:
    """Calls `loops_async`."""

    async def service(self, url: str, call: Callable[[Any], Any], *, api_key: str = KEY, **options: Any) -> Any:
        """Open a client, and return what `call` makes of it."""
        async with loops_async.ServiceClient(base_url=url, api_key=api_key, **options) as service:
            return await call(service)

    async def control_plane(self, url: str, call: Callable[[Any], Any], **options: Any) -> Any:
        """Open a client, and return what `call` makes of its control plane."""
        return await self.service(url, lambda service: call(service.control_plane), **options)


class Blocking(Colour):
    """Calls `loops_sync`."""

    async def service(self, url: str, call: Callable[[Any], Any], *, api_key: str = KEY, **options: Any) -> Any:
        def work() -> Any:
            with loops_sync.ServiceClient(base_url=url, api_key=api_key, **options) as service:
                return call(service)

        return await asyncio.to_thread(work)

"""The HTTP server of a gateway: whose call it is, and how answers, errors and streams go out."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .dialects import DIALECTS, Answer, Dialect
from .dialects.base import Fields, error_body
from .errors import RefusedCall, bad_request
from .exchange import Exchange
from .recorder import Recorder
from .requests import AgentRequest

if TYPE_CHECKING:
    from aiohttp import web

__all__ = ["LOOPBACK", "Door", "Server"]

log = logging.getLogger("loops_async")

RETRY_COUNT: Final = "x-stainless-retry-count"
CODES: Final = {404: "not_found", 405: "method_not_allowed"}
REQUEST_ID: Final = "x-request-id"
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
"""The names by which programs on this machine call it; a web page that was made to reach it has another."""
COMMENT_SECONDS: Final = 15.0
"""How often a stream that waits shows that it lives."""
SHUTDOWN_SECONDS: Final = 2.0
"""How long answers that are on their way may take when the server closes."""


class Door:
    """Which rollout a key opens. Only hashes of keys are kept."""

    def __init__(self) -> None:
        self._rollouts: dict[bytes, tuple[str, Recorder]] = {}

    def add(self, key: str, rollout_id: str, recorder: Recorder) -> None:
        """Let calls with a key in."""
        self._rollouts[_hashed(key)] = rollout_id, recorder

    def remove(self, key: str) -> None:
        """Let no further call with a key in."""
        self._rollouts.pop(_hashed(key), None)

    def recorder(self, key: str, rollout_id: str | None) -> Recorder:
        """Return the recorder that a key belongs to; `rollout_id` is that of the path, if it has one.

        Raises:
            RefusedCall: the key is unknown, or that of another rollout, or of a closed one.
        """
        found = self._rollouts.get(_hashed(key))
        if found is None or rollout_id not in (None, found[0]):
            raise RefusedCall(
                401, "invalid_api_key", "the API key is not that of this rollout, or the rollout is closed"
            )
        return found[1]


class Server:
    """Serves the rollouts behind a door, on loopback."""

    def __init__(
        self, door: Door, *, ignore: Collection[str], stream_wait: float, max_body: int, base_model: Callable[[], str]
    ) -> None:
        self._door = door
        self._ignore = frozenset(ignore)
        self._stream_wait = stream_wait
        self._max_body = max_body
        self._base_model = base_model

    async def start(self, host: str, port: int) -> tuple[int, Callable[[], Awaitable[None]]]:
        """Listen; return the port, and what closes the server."""
        from aiohttp import web  # its server takes a while to import, and most programs need only the client

        @web.middleware
        async def checked(request: web.Request, handler: Callable[[Any], Awaitable[Any]]) -> Any:
            return await self._checked(request, handler)

        app = web.Application(client_max_size=self._max_body, middlewares=[checked])
        for prefix in ("/v1", "/r/{rollout}/v1"):
            for dialect in DIALECTS:
                app.router.add_post(f"{prefix}/{dialect.path}", _bound(self._call, dialect))
            app.router.add_post(f"{prefix}/messages/count_tokens", self._count)
            app.router.add_get(f"{prefix}/models", self._models)
            app.router.add_get(f"{prefix}/models/{{name:.+}}", self._model)
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_SECONDS, handle_signals=False
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            await site.start()
        except BaseException:
            await runner.cleanup()
            raise
        actual: int = runner.addresses[0][1]
        return actual, runner.cleanup

    # --- requests ---

    async def _checked(self, request: web.Request, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        """Answer errors in the form of the API that was called, and refuse what a web page could send."""
        from aiohttp import web

        try:
            # Whatever the port: a tunnel may have another one.
            if _host(request) not in LOOPBACK or "Origin" in request.headers:
                raise RefusedCall(403, "forbidden", "only programs on this machine may call, and no web page")
            return await handler(request)
        except RefusedCall as refused:
            error = refused
        except web.HTTPRequestEntityTooLarge:
            error = RefusedCall(413, "request_too_large", f"the body may have {self._max_body} bytes")
        except web.HTTPException as problem:
            code = CODES.get(problem.status, "invalid_value")
            error = RefusedCall(problem.status, code, f"{request.method} {request.path}: {problem.reason}")
        except ConnectionError:
            raise  # the agent is gone
        except Exception as problem:
            error = _refusal(request, problem)
        dialect = _dialect_of(request.path)
        body = error_body(error) if dialect is None else dialect.error(error)
        return _json(body, status=error.status, headers=error.headers)

    async def _call(self, dialect: Dialect, request: web.Request) -> Any:
        recorder = self._recorder(request)
        raw = await request.read()
        asked = self._read(dialect, raw)
        dialect.check(asked)
        key = sha256(request.path.encode() + b"\0" + raw).digest()
        exchange = recorder.exchange(asked, key=key, is_retry=_is_retry(request))
        with exchange.joined():
            if asked.stream:
                return await self._stream(dialect, request, recorder, exchange, asked)
            await exchange.wait()
            answer = await _answer(recorder, asked, exchange)
        return _json(dialect.answer(answer), headers={REQUEST_ID: answer.id})

    async def _count(self, request: web.Request) -> Any:
        recorder = self._recorder(request)
        asked = self._read(_dialect_of(request.path), await request.read())
        return _json({"input_tokens": await recorder.count(asked)})

    async def _models(self, request: web.Request) -> Any:
        self._recorder(request)
        return _json({"object": "list", "data": [_model(self._base_model())]})

    async def _model(self, request: web.Request) -> Any:
        self._recorder(request)
        return _json(_model(request.match_info["name"]))

    def _recorder(self, request: web.Request) -> Recorder:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = request.headers.get("x-api-key") or (token if scheme.lower() == "bearer" else "")
        return self._door.recorder(given.strip(), request.match_info.get("rollout"))

    def _read(self, dialect: Dialect | None, raw: bytes) -> AgentRequest:
        assert dialect is not None  # noqa: S101 - the routes are those of the dialects
        try:
            body = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
            raise bad_request(None, f"the body is not JSON that can be read: {problem}") from None
        return dialect.read(Fields(body, self._ignore))

    async def _stream(
        self, dialect: Dialect, request: web.Request, recorder: Recorder, exchange: Exchange, asked: AgentRequest
    ) -> Any:
        """Send an answer as a stream; only if it takes long, the headers go out before it."""
        from aiohttp import web

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        try:
            seconds = self._stream_wait
            while not await exchange.wait(seconds):
                if not response.prepared:
                    await response.prepare(request)
                await response.write(b": waiting for the sampler\n\n")
                seconds = COMMENT_SECONDS
            answer = await _answer(recorder, asked, exchange)
            if not response.prepared:
                response.headers[REQUEST_ID] = answer.id
                await response.prepare(request)
            for block in dialect.events(answer):
                await response.write(block)
        except ConnectionResetError:  # the agent is gone; the call is in the record
            return response
        except Exception as problem:
            if not response.prepared:
                raise
            await response.write(dialect.error_event(_refusal(request, problem)))
        await response.write_eof()
        return response


async def _answer(recorder: Recorder, asked: AgentRequest, exchange: Exchange) -> Answer:
    calls = exchange.result()
    wanted = calls if asked.wants_logprobs else []
    pieces = [await recorder.kit.tokens.decode_each(call.tokens) for call in wanted]
    return Answer(request=asked, calls=calls, pieces=pieces)


def _refusal(request: web.Request, problem: Exception) -> RefusedCall:
    """Return what an agent is told, also where a call has failed as it must not."""
    if isinstance(problem, RefusedCall):
        return problem
    log.error("the gateway failed to answer %s %s", request.method, request.path, exc_info=problem)
    return RefusedCall(500, "gateway_failed", f"the gateway failed: {problem!r}")


def _bound(handler: Callable[[Dialect, Any], Awaitable[Any]], dialect: Dialect) -> Callable[[Any], Awaitable[Any]]:
    async def handle(request: web.Request) -> Any:
        return await handler(dialect, request)

    return handle


def _dialect_of(path: str) -> Dialect | None:
    """Return the dialect of a path, also of one below that of a dialect."""
    tail = path.rpartition("/v1/")[2]
    return next((each for each in DIALECTS if tail == each.path or tail.startswith(f"{each.path}/")), None)


def _host(request: web.Request) -> str | None:
    """Return the name by which the server was called; None where that is none."""
    try:
        return request.url.host
    except ValueError:
        return None


def _is_retry(request: web.Request) -> bool:
    return request.headers.get(RETRY_COUNT, "0").strip() not in ("", "0")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "loops"}


def _json(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    from aiohttp import web

    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json", headers=headers or {}
    )


def _hashed(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()

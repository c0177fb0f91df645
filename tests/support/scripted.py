"""A service on a real socket that behaves well, except where a test says what it answers instead."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from aiohttp import web
from msgspec import Struct

from tests.support.patience import PATIENCE_SECONDS

KEY = "secret-key-123456"
MODEL = "org/model"
WHEN = "2026-06-24T18:02:11Z"


class Seen(Struct, kw_only=True):
    """A request as it arrived. `path` is still escaped; `query` is the text after the question mark."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Say(Struct):
    """An answer: `body` is sent as it is when it is bytes or text, as JSON otherwise."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = {}

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        plain = isinstance(self.body, bytes | str)
        body = self.body.encode() if isinstance(self.body, str) else self.body if plain else json.dumps(self.body)
        kind = "text/html" if plain else "application/json"
        return web.Response(
            status=self.status,
            body=body if isinstance(body, bytes) else body.encode(),
            headers={"Content-Type": kind, **self.headers},
        )


Reply: TypeAlias = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


async def hang_up(request: web.BaseRequest) -> web.StreamResponse:
    """Take the request and close the connection instead of answering."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def hang_up_in_the_body(request: web.BaseRequest) -> web.StreamResponse:
    """Begin to answer and close the connection half-way."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"half":')
    assert request.transport is not None
    request.transport.close()
    return response


def name_of(reply: Reply) -> str:
    """Return the name of a test with this reply, the same in each process."""
    return str(getattr(reply, "__name__", repr(reply)))


class Hold:
    """An answer that waits until the test lets it go; `arrived` is set when it has been asked for."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.arrived = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.arrived.set()
        await self.go.wait()
        return await self.reply(request)


RESULTS: dict[str, Any] = {
    "init_trainer_server": {"step": 0, "lora_rank": 8},
    "forward": {"loss": 1.5, "loss_fn_output_type": "t", "loss_fn_outputs": [], "metrics": {}},
    "forward_backward": {"loss": 1.5, "loss_fn_output_type": "t", "loss_fn_outputs": [], "metrics": {}},
    "optim_step": {"metrics": {"step": 1.0}},
    "save_state": {"mode": "lora", "path": "bt://loops:r1/weights/x"},
    "save_weights_for_sampler": {"version": 1, "path": "bt://loops:r1/sampler_weights/x"},
    "load_state": {"step": 0},
    "load_state_with_optimizer": {"step": 3},
}

COMPLETIONS = {
    "choices": [
        {
            "index": 0,
            "text": " Paris",
            "finish_reason": "stop",
            "logprobs": {"tokens": ["token_id:12095"], "token_logprobs": [-0.021]},
            "token_ids": [12095],
        }
    ]
}


class ScriptedService:
    """Control plane, one trainer (``/trainer``), one sampler (``/sampler``) and files (``/files``) on one port."""

    def __init__(self) -> None:
        self.url = ""
        self.seen: list[Seen] = []
        self._scripts: dict[tuple[str, str], deque[Reply]] = defaultdict(deque)
        self._fallbacks: dict[tuple[str, str], Reply] = {}
        self._operations: dict[str, str] = {}
        self._arrival = asyncio.Condition()

    def answer(self, method: str, path: str, *replies: Reply) -> None:
        """Give these answers, one after the other, before behaving well again."""
        self._scripts[method, path].extend(replies)

    def always(self, method: str, path: str, reply: Reply) -> None:
        """Give this answer whenever no other is written down."""
        self._fallbacks[method, path] = reply

    def seen_at(self, method: str, path: str) -> list[Seen]:
        """Return the requests to one place, in order."""
        return [seen for seen in self.seen if (seen.method, seen.path) == (method, path)]

    def submitted(self) -> list[Seen]:
        """Return every operation that was submitted to the trainer, in order."""
        return [seen for seen in self.seen if seen.method == "POST" and seen.path.startswith("/trainer/")]

    async def until_seen(self, method: str, path: str, times: int = 1) -> None:
        """Return when so many requests have come to a place."""
        async with asyncio.timeout(PATIENCE_SECONDS), self._arrival:
            await self._arrival.wait_for(lambda: len(self.seen_at(method, path)) >= times)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        parts = urlsplit(request.raw_path)
        seen = Seen(
            method=request.method,
            path=parts.path,
            query=parts.query,
            headers=request.headers,
            body=await request.content.read(),  # `request.read` refuses more than a megabyte
        )
        async with self._arrival:
            self.seen.append(seen)
            self._arrival.notify_all()
        place = request.method, parts.path
        if self._scripts[place]:
            return await self._scripts[place].popleft()(request)
        reply = self._fallbacks.get(place) or self._well_behaved(seen)
        return await reply(request)

    def _well_behaved(self, seen: Seen) -> Reply:
        match seen.path.strip("/").split("/"):
            case ["v1", "loops", "sessions"]:
                return Say(body={"session": {"id": "s1"}})
            case ["v1", "loops", "runs"]:
                return Say(body={"run": self.run()})
            case ["v1", "loops", "samplers"]:
                return Say(body={"sampler": self.sampler()})
            case ["v1", "models", _, "deployments", _]:
                return Say(body={"status": "ACTIVE"})
            case ["v1", "loops", "checkpoints", "validate"]:
                return Say(body={})
            case ["trainer", "health"]:
                return Say(body={})
            case ["trainer", "policy_version"] | ["sampler", "trainers_policy_version"]:
                return Say(body={"policy_version": 1})
            case ["trainer", "operations", operation_id] if operation_id in self._operations:
                return Say(body={"status": "done", "result": RESULTS[self._operations[operation_id]]})
            case ["trainer", operation] if operation in RESULTS:
                operation_id = seen.headers["Idempotency-Key"]
                self._operations[operation_id] = operation
                return Say(202, {"operation_id": operation_id, "schema_version": 1})
            case ["sampler", "sample"]:
                return Say(body=COMPLETIONS, headers={"x-trainers-policy-version": "1"})
            case ["sampler", "v1", "models"]:
                return Say(body={"data": [{"id": MODEL, "parent": None}]})
            case _:
                return Say(404, {"error": f"nothing at {seen.path}"})

    def run(self, **changes: Any) -> dict[str, Any]:
        """Return a run in the seed-era shape."""
        return {
            "id": "r1",
            "session_id": "s1",
            "base_model": MODEL,
            "base_url": f"{self.url}/trainer",
            "created_at": WHEN,
            "sampler": self.sampler(),
            **changes,
        }

    def sampler(self, **changes: Any) -> dict[str, Any]:
        """Return a sampler in the seed-era shape."""
        return {
            "id": "q1",
            "base_url": f"{self.url}/sampler",
            "base_model": MODEL,
            "created_at": WHEN,
            "model_id": "m1",
            "deployment_id": "d1",
            "status": {"name": "DEPLOYING"},
            **changes,
        }


@asynccontextmanager
async def serving() -> AsyncIterator[ScriptedService]:
    """Serve on a free port of this machine."""
    scripted = ScriptedService()
    runner = web.ServerRunner(web.Server(scripted.handle, access_log=None), shutdown_timeout=0.01)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        [address] = runner.addresses
        scripted.url = f"http://127.0.0.1:{address[1]}"
        yield scripted
    finally:
        await runner.cleanup()


def done(result: Any) -> Say:
    """Return the answer to a poll whose operation is done."""
    return Say(body={"status": "done", "result": result})

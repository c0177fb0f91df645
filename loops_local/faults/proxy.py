"""A proxy in front of a service that makes planned faults happen, and counts them."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Final, Self

import aiohttp
import msgspec
from aiohttp import web
from msgspec import Struct
from yarl import URL

from loops_async._tasks import TaskOwner

from .._threads import entered_in_thread
from .exchange import HttpExchange, reset
from .plan import Fault

__all__ = ["COUNTS_PATH", "FaultCounts", "FaultProxy", "RuleCounts", "proxy_in_thread"]

COUNTS_PATH: Final = "/-/faults"
"""Where the proxy itself answers with its counts."""

_LONGEST_HEADER: Final = 64 * 1024
_CONNECT_SECONDS: Final = 10.0


class RuleCounts(Struct, kw_only=True):
    """What became of one fault of the plan: the requests of its route, and how often it happened."""

    fault: str
    route: str
    requests: int = 0
    happened: int = 0


class FaultCounts(Struct, kw_only=True):
    """What a proxy did: with the same seed and plan, the n-th request of a route meets the same fault."""

    seed: int
    seconds: float
    requests: int
    faults: dict[str, int]
    rules: list[RuleCounts]


class FaultProxy:
    """An HTTP proxy in front of one service: makes the faults of a plan happen, and passes on everything else.

    URLs within JSON answers that begin with `to` are replaced by the proxy's, so that trainers, samplers and files of
    the same address are reached through it, too. A service at several addresses needs a proxy before each.

    Args:
        to: the URL of the service, as its answers spell it.
        plan: the faults; of those whose conditions a request fulfils, the first happens.
        seed: of the decisions; None draws one.
        host: the address to listen on.
        port: the port; 0 takes a free one.

    Attributes:
        seed: the seed that is used.

    Raises, on entry:
        OSError: the port is taken.

    Example:
        >>> import asyncio, loops_local
        >>> from loops_local.faults import Drop
        >>> async def main():
        ...     async with (
        ...         loops_local.LocalService(engine="echo") as local,
        ...         loops_local.FaultProxy(to=local.base_url, plan=[Drop(route="POST */sample", every=10)]) as proxy,
        ...     ):
        ...         return proxy.counts.requests  # clients use proxy.base_url
        >>> asyncio.run(main())
        0
    """

    def __init__(
        self,
        *,
        to: str,
        plan: Sequence[Fault],
        seed: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        url = URL(to)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"to must be an absolute http or https URL; got {to!r}")
        if url.user or url.password or url.query_string or url.fragment:
            raise ValueError(f"to must not contain a user, a query or a fragment; host {url.host!r}")
        self.seed: int = random.randrange(2**32) if seed is None else seed  # noqa: S311 - keeps no secret
        self._to = to.rstrip("/")
        self._plan = list(plan)
        self._rules = [RuleCounts(fault=_name(fault), route=fault.route) for fault in self._plan]
        self._requests = 0
        self._host = host
        self._port = port
        self._started = time.monotonic()
        self._site: web.SockSite | None = None
        self._tasks = TaskOwner()
        self._stack = AsyncExitStack()

    @property
    def base_url(self) -> str:
        """The URL that clients use in the place of the service's."""
        return str(URL.build(scheme="http", host=self._host, port=self._port))

    @property
    def counts(self) -> FaultCounts:
        """What it did until now."""
        faults: Counter[str] = Counter()
        for rule in self._rules:
            faults[rule.fault] += rule.happened
        return FaultCounts(
            seed=self.seed,
            seconds=round(time.monotonic() - self._started, 3),
            requests=self._requests,
            faults=dict(faults),
            rules=self._rules,
        )

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _open(self) -> None:
        self._session = await self._stack.enter_async_context(
            aiohttp.ClientSession(
                # A connection for each request: one that was kept and has ended would be a fault that was not planned.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
                max_line_size=_LONGEST_HEADER,
                max_field_size=_LONGEST_HEADER,
            )
        )
        # Bound and never listening: keeps the port while connections are refused.
        place = self._stack.enter_context(_bound(self._host, self._port))
        self._port = place.getsockname()[1]
        self._server = web.Server(
            self._handle,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            max_line_size=_LONGEST_HEADER,
            max_field_size=_LONGEST_HEADER,
        )
        self._runner = web.ServerRunner(self._server, shutdown_timeout=0.1)
        await self._runner.setup()
        self._stack.push_async_callback(self._runner.cleanup)
        self._stack.push_async_callback(self._tasks.close)
        await self._listen()
        self._started = time.monotonic()

    async def _listen(self) -> None:
        self._site = web.SockSite(self._runner, _bound(self._host, self._port), backlog=4096)
        await self._site.start()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == COUNTS_PATH:
            return web.Response(body=msgspec.json.encode(self.counts), content_type="application/json")
        fault = self._fault_for(request)
        exchange = HttpExchange(
            request,
            await request.content.read(),
            session=self._session,
            to=self._to,
            own_url=self.base_url,
            refuse=self._refuse,
        )
        try:
            return await (exchange.pass_on() if fault is None else fault.happen(exchange))
        except aiohttp.ClientError as error:
            message = f"the fault proxy got no answer from {self._to}: {error}"
            return web.Response(
                status=502, body=msgspec.json.encode({"error": message}), content_type="application/json"
            )

    def _fault_for(self, request: web.BaseRequest) -> Fault | None:
        """Count the request; return the first fault that is due."""
        self._requests += 1
        seconds = time.monotonic() - self._started
        due = None
        for index, (fault, rule) in enumerate(zip(self._plan, self._rules, strict=True)):
            if not fault.matches(request.method, request.path):
                continue
            rule.requests += 1
            draw = f"{self.seed}/{index}/{rule.requests}"
            if due is None and fault.is_due(rule.requests, seconds=seconds, happened=rule.happened, draw=draw):
                rule.happened += 1
                due = fault
        return due

    def _refuse(self, seconds: float) -> None:
        if self._site is not None:
            site, self._site = self._site, None
            self._tasks.start(self._outage(site, seconds), name="refuse connections")

    async def _outage(self, site: web.SockSite, seconds: float) -> None:
        await site.stop()
        for connection in self._server.connections:
            reset(connection.transport)
        await asyncio.sleep(seconds)
        await self._listen()


@contextmanager
def proxy_in_thread(
    *, to: str, plan: Sequence[Fault], seed: int | None = None, host: str = "127.0.0.1", port: int = 0
) -> Iterator[FaultProxy]:
    """Run a `FaultProxy`, which has the same arguments, in its own thread: for blocking scripts and tests."""
    make = partial(FaultProxy, to=to, plan=plan, seed=seed, host=host, port=port)
    with entered_in_thread(make, name="loops-local faults") as proxy:
        yield proxy


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound and does not listen; several may be bound to one port."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def _name(fault: Fault) -> str:
    return str(type(fault).__struct_config__.tag or type(fault).__name__)

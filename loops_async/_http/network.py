"""How a connection is made: through which proxy, to which address, with which certificates."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from .._work.registry import CURRENT
from ..errors import ConfigError
from .settings import Proxy, is_loopback

log = logging.getLogger("loops_async.http")

CONNECT_SECONDS: Final = 10.0
LOOKUPS_AT_ONCE: Final = 4
PROBES: Final = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": 5}
"""TCP keep-alive: idle seconds before the first probe, seconds between probes, and the limit of unanswered probes."""

_PORTS: Final = {"http": 80, "https": 443}


def tls_context() -> ssl.SSLContext:
    """Return the context that verifies servers, with the certificates that the environment names now.

    aiohttp creates its own when it is imported, before a program can set ``SSL_CERT_FILE``.
    """
    return _tls_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"), ssl.SSLContext)


@lru_cache(maxsize=4)
def _tls_context(*_: Any) -> ssl.SSLContext:
    """Create a context, which takes 20 to 30 ms: too long to hold the event loop for each client.

    The class is part of the cache's key, since libraries that use the system's certificate store replace it.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


@lru_cache(maxsize=64)
def time_limits(idle_seconds: float | None) -> aiohttp.ClientTimeout:
    """Return the time limits of a connection; `TimeLimit` bounds the whole request."""
    return aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=idle_seconds)


def keepalive_socket(address: tuple[Any, ...]) -> socket.socket:
    """Open a socket that detects a lost peer by keep-alive probes: a sample may take long, so silence is normal."""
    opened = socket.socket(*address[:3])
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # not every system has every option
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return opened


class Connector(aiohttp.TCPConnector):
    """A pool of connections; it tells the registry of work what waits for one."""

    async def connect(self, *args: Any, **others: Any) -> aiohttp.connector.Connection:
        entry = CURRENT.get()
        entry.waiting_for = "connection"
        connection = await super().connect(*args, **others)
        entry.waiting_for = entry.goal
        return connection

    @property
    def counts(self) -> str:
        """How many connections there are, as text; may be read in any thread."""
        return f"{len(self._acquired)} in use, {sum(map(len, list(self._conns.values())))} idle"


class Resolver(AbstractResolver):
    """Looks host names up on threads of its own.

    On the threads of the event loop, a look-up would queue behind the program's own work, and never end if that work
    waits for a sample.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOKUPS_AT_ONCE, thread_name_prefix="loops_async: look up names")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        # With AI_ADDRCONFIG, a machine without a network finds no address even for itself.
        flags = 0 if is_loopback(host) else socket.AI_ADDRCONFIG
        look_up = partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, flags=flags)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        return [
            ResolveResult(
                hostname=host,
                host=_numeric(address),
                port=int(address[1]),
                family=family,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for family, _, protocol, _, address in found
            if family != socket.AF_INET6 or len(address) == 4  # shorter in a Python without IPv6
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _numeric(address: tuple[Any, ...]) -> str:
    scope = address[3] if len(address) == 4 else 0  # of a link-local address
    return f"{address[0]}%{scope}" if scope else str(address[0])


class Proxies:
    """Which proxy a request goes through.

    The `given` proxy is used for every host; without one, ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``ALL_PROXY`` are, as
    they are now. This machine and the hosts that ``NO_PROXY`` lists are connected to directly.
    """

    def __init__(self, given: Proxy | None) -> None:
        named = getproxies_environment()
        self._exceptions = named.get("no", "")
        self._by_scheme = {
            scheme: given or _usable(named.get(scheme) or named.get("all")) for scheme in ("http", "https")
        }

    def for_url(self, url: str) -> str | None:
        """Return the URL of the proxy for a request, with its password; None for a direct connection."""
        parts = urlsplit(url)
        proxy = self._by_scheme.get(parts.scheme)
        host = parts.hostname or ""
        if proxy is None or is_loopback(host) or self._is_excepted(host, parts.port or _PORTS[parts.scheme]):
            return None
        return proxy.reveal()

    def _is_excepted(self, host: str, port: int) -> bool:
        return any(_covers(entry.strip().lower(), host, port) for entry in self._exceptions.split(","))


def _covers(entry: str, host: str, port: int) -> bool:
    """Whether an entry of ``NO_PROXY`` covers a host: by name, domain, address or network; * covers all."""
    if "/" in entry:
        return _is_within(host, entry)
    name = entry.removesuffix(f":{port}").removeprefix("*").removeprefix(".").strip("[]")
    return entry == "*" or (name != "" and (host == name or host.endswith(f".{name}")))


def _usable(url: str | None) -> Proxy | None:
    """Return a proxy of the environment; None, with a warning, if it cannot be used."""
    if not url or not url.strip():
        return None
    try:
        return Proxy(url if "://" in url else f"http://{url}")  # as other programs read it
    except ConfigError:
        log.warning("a proxy of the environment is not used: only http and https proxies are supported")
        return None


def _is_within(host: str, network: str) -> bool:
    """Whether a host is an address in a network, e.g. 10.0.0.0/8."""
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False

"""``loops doctor``: what stands between this machine and the service, and what to do about it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import ssl
import time
from collections.abc import Awaitable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final, Literal, TypeAlias
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

import typer
from msgspec import Struct

from .._http.messages import Answer, Request
from .._http.network import Proxies, Resolver, tls_context
from .._http.settings import (
    DEFAULT_BASE_URL,
    MAX_CONNECTIONS,
    NO_KEY,
    Settings,
    connections_within,
    files_for,
    open_file_limit,
    resolve_settings,
)
from .._http.transport import Transport
from .._version import __version__
from ..errors import ConfigError, ConnectError, LoopsError
from ..types import ServerCapabilities
from . import NAMES
from ._connection import connection, key_of_environment, paragraph, run
from ._exit_codes import FAILED, REFUSED, exit_code
from ._options import AsJson
from ._show import LONGEST_LINE, columns_of_terminal, out, show_json, wrapped

State: TypeAlias = Literal["ok", "warning", "failed", "unknown"]

SECONDS: Final = 10.0
"""How long each check may take."""

CLOCK_TOLERANCE: Final = timedelta(seconds=60)
"""By how much the clocks may differ; the service tells its time in whole seconds, and the answer takes a while."""

LIBRARIES: Final = ("aiohttp", "anyio", "msgspec", "backoff", "typer", "rich")


class Finding(Struct, frozen=True, kw_only=True):
    """What one check found; `code` is the exit code that it asks for."""

    check: str
    state: State
    found: str
    advice: str | None = None
    code: int = 0


def doctor(context: typer.Context, as_json: AsJson = False) -> None:
    """Check the key, the connection and this machine. Ends with the code of the first check that fails."""
    findings = run(context, _examine(context))
    if as_json:
        show_json(findings)
    else:
        for finding in findings:
            _show(finding)
    raise typer.Exit(next((finding.code for finding in findings if finding.code), 0))


def _show(finding: Finding) -> None:
    width = min(columns_of_terminal() or LONGEST_LINE, LONGEST_LINE)
    head = f"{finding.check:9} {finding.state:8} "
    text = " ".join(filter(None, (finding.found, finding.advice)))
    out.print(wrapped(text, width, first=head, later="    "))


async def _examine(context: typer.Context) -> list[Finding]:
    """Run all checks concurrently; those of the network need settings that are valid."""
    try:
        settings = _settings(context)
    except ConfigError as error:
        wrong = Finding(check="settings", state="failed", found=paragraph(context, error), code=REFUSED)
        return [wrong, _versions(), _limits(MAX_CONNECTIONS)]
    return await _Examination(context, settings).findings()


def _settings(context: typer.Context) -> Settings:
    given = connection(context)
    # Without a key either, so that the rest is examined.
    url = given.base_url if given.base_url or os.environ.get("LOOPS_BASE_URL") else DEFAULT_BASE_URL
    return resolve_settings(base_url=url, team=given.team, auth_scheme=given.auth_scheme)


class _Examination:
    """The checks of one service; what several of them need is asked for once."""

    def __init__(self, context: typer.Context, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._url = urlsplit(settings.base_url)
        self._host = self._url.hostname or ""
        self._request = Request(
            method="GET", url=f"{settings.base_url}/v1/loops/capabilities", what="get capabilities", timeout=SECONDS
        )
        self._proxy = Proxies(settings.proxy).for_url(settings.base_url)

    async def findings(self) -> list[Finding]:
        transport = Transport(self._settings)
        try:
            async with asyncio.TaskGroup() as tasks:
                answer = tasks.create_task(self._answer(transport))
                direct = tasks.create_task(self._direct())
                checks = [
                    self._key(transport, answer),
                    self._address(answer, direct),
                    self._tls(answer, direct),
                    self._proxies(answer),
                    self._clock(answer),
                ]
                key, address, tls, proxy, clock = [tasks.create_task(check) for check in checks]
        finally:
            await transport.close()
        network = [key.result(), address.result(), tls.result(), proxy.result()]
        # Unless a number is asked for, it is what the limit of open files allows.
        wanted = self._settings.max_connections if os.environ.get("BT_LOOPS_MAX_CONNECTIONS") else MAX_CONNECTIONS
        return [*network, _versions(), _limits(wanted), clock.result()]

    async def _answer(self, transport: Transport) -> Answer | LoopsError:
        try:
            return await transport.send(self._request)
        except LoopsError as error:
            return error

    async def _direct(self) -> _Connected | None:
        """Connect without a proxy, for details that an answer does not tell."""
        if self._proxy is not None:
            return None
        resolver = Resolver()
        try:
            async with asyncio.timeout(SECONDS):
                port = self._url.port or (443 if self._url.scheme == "https" else 80)
                [first, *_] = await resolver.resolve(self._host, port)
                started = time.monotonic()
                context = tls_context() if self._url.scheme == "https" else None
                _, writer = await asyncio.open_connection(
                    first["host"], port, ssl=context, server_hostname=self._host if context else None
                )
                seconds = time.monotonic() - started
                secured: ssl.SSLObject | None = writer.get_extra_info("ssl_object")
                writer.transport.abort()
                return _Connected(first["host"], seconds, _described(secured) if secured else None)
        except (OSError, ValueError):  # the answer's error says it better
            return None
        finally:
            await resolver.close()

    async def _key(self, transport: Transport, answer: Awaitable[Answer | LoopsError]) -> Finding:
        key = key_of_environment()
        if key is None:
            message = paragraph(self._context, ConfigError(NO_KEY))
            return Finding(check="key", state="failed", found=message, code=REFUSED)
        shown = f"{masked(key)} of BASETEN_API_KEY"
        received = await answer
        if isinstance(received, LoopsError):
            return Finding(check="key", state="unknown", found=f"{shown}; not checked, since no answer came")
        try:
            if not received.is_success:
                raise transport.errors.of_answer(self._request, received)
            transport.decode(self._request, received, ServerCapabilities)
        except LoopsError as error:
            message = f"{shown}: {paragraph(self._context, error)}"
            return Finding(check="key", state="failed", found=message, code=exit_code(error))
        return Finding(check="key", state="ok", found=f"{shown}; the service accepts it")

    async def _address(self, answer: Awaitable[Answer | LoopsError], direct: Awaitable[_Connected | None]) -> Finding:
        received, connected = await answer, await direct
        if isinstance(received, LoopsError) and not _is_about_certificate(received):
            message = paragraph(self._context, received)
            return Finding(check="address", state="failed", found=message, code=exit_code(received))
        how = f", at {connected.address}, connected in {connected.seconds * 1000:.0f} ms" if connected else ""
        return Finding(check="address", state="ok", found=f"{self._settings.base_url}{how}")

    async def _tls(self, answer: Awaitable[Answer | LoopsError], direct: Awaitable[_Connected | None]) -> Finding:
        if self._url.scheme == "http":
            return Finding(check="TLS", state="ok", found="not used: the address is http")
        received, connected = await answer, await direct
        trusted = f"certificates of {_certificates()}"
        if connected is not None and connected.tls is not None:
            return Finding(check="TLS", state="ok", found=f"{connected.tls}; {trusted}")
        if isinstance(received, LoopsError) and _is_about_certificate(received):
            return Finding(
                check="TLS",
                state="failed",
                found=f"{paragraph(self._context, received)} These were {trusted}.",
                advice=f"If it is about a date: this machine's clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
                code=exit_code(received),
            )
        if isinstance(received, LoopsError):
            return Finding(check="TLS", state="unknown", found=f"no connection; {trusted}")
        return Finding(check="TLS", state="ok", found=f"verified; {trusted}")

    async def _proxies(self, answer: Awaitable[Answer | LoopsError]) -> Finding:
        named = getproxies_environment()
        variable = next((name for name in (self._url.scheme, "all") if named.get(name)), None)
        if variable is None:
            return Finding(check="proxy", state="ok", found="none in the environment")
        shown = f"{variable.upper()}_PROXY"
        if self._proxy is None:
            why = "NO_PROXY lists the host, it is this machine, or the proxy is neither http nor https"
            return Finding(check="proxy", state="ok", found=f"{shown} is not used for {self._host}: {why}")
        place = urlsplit(self._proxy).netloc.rpartition("@")[2]
        works = not isinstance(await answer, LoopsError)
        return Finding(
            check="proxy",
            state="ok" if works else "warning",
            found=f"requests to {self._host} go through {place}, as {shown} says.",
            advice=f"To connect without it, add {self._host} to NO_PROXY.",
        )

    async def _clock(self, answer: Awaitable[Answer | LoopsError]) -> Finding:
        received = await answer
        now = datetime.now(UTC)
        there = None if isinstance(received, LoopsError) else _date(received)
        if there is None:
            return Finding(
                check="clock", state="unknown", found=f"{now:%Y-%m-%d %H:%M:%S} UTC here; no time to compare"
            )
        difference = timedelta(seconds=round((now - there).total_seconds()))
        if abs(difference) <= CLOCK_TOLERANCE:
            return Finding(check="clock", state="ok", found=f"{now:%Y-%m-%d %H:%M:%S} UTC, as the service says")
        return Finding(
            check="clock",
            state="failed",
            found=f"{now:%Y-%m-%d %H:%M:%S} UTC here, {abs(difference)} {'ahead of' if now > there else 'behind'} the "
            "service.",
            advice="Set this machine's clock, e.g. with `sudo timedatectl set-ntp true`: a wrong one breaks TLS, ages "
            "and waits.",
            code=FAILED,
        )


class _Connected(Struct, frozen=True):
    address: str
    seconds: float
    tls: str | None


def masked(key: str) -> str:
    """Return an API key as it may be shown: the end of a long one."""
    return f"…{key[-4:]}" if len(key) >= 16 else "…"


def _versions() -> Finding:
    found = ", ".join(_installed())
    ours = f"loops-async {__version__}, Python {platform.python_version()}, {platform.system()}, {found}"
    others = [
        each.dist.name if each.dist else each.value
        for each in importlib.metadata.entry_points(group="console_scripts", name=NAMES[0])
        if not each.value.startswith("loops_async.")
    ]
    if not others:
        return Finding(check="versions", state="ok", found=ours)
    return Finding(
        check="versions",
        state="warning",
        found=f"{ours}. The package {others[0]} installs a command `{NAMES[0]}`, too.",
        advice=f"Use `{NAMES[1]}`, which is always this one.",
    )


def _installed() -> Iterator[str]:
    for name in LIBRARIES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} of unknown version"


def _limits(wanted: int) -> Finding:
    files = open_file_limit()
    enough_for = connections_within(files)
    if enough_for >= wanted:
        return Finding(check="limits", state="ok", found=f"{wanted} samples in flight")
    return Finding(
        check="limits",
        state="warning",
        found=f"this process may open {files} files and connections: enough for {enough_for} samples in flight, not "
        f"for {wanted}.",
        advice=f"Run `ulimit -n {files_for(wanted)}` before the program, or set BT_LOOPS_MAX_CONNECTIONS to fewer.",
    )


def _is_about_certificate(error: LoopsError) -> bool:
    return isinstance(error, ConnectError) and not error.retryable and "certificate" in str(error)


def _described(secured: ssl.SSLObject) -> str:
    certificate = secured.getpeercert() or {}
    return f"{secured.version()}, the server's certificate is valid until {certificate.get('notAfter', 'unknown')}"


def _certificates() -> str:
    return os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR") or "the system"


def _date(answer: Answer) -> datetime | None:
    try:
        found = parsedate_to_datetime(answer.headers.get("Date", ""))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)

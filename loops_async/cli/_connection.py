"""How a command reaches the service, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn, TypeVar

import typer
from msgspec import Struct

from .._http.settings import resolve_settings
from .._session.runtime import Runtime
from ..client import ServiceClient
from ..control_plane import ControlPlane, resolve_team
from ..errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    InputError,
    LoopsError,
    NotFoundError,
    NotReadyError,
    PermissionDeniedError,
    ProvisioningError,
    TransportError,
    UnsupportedError,
)
from ._show import errors

T = TypeVar("T")

FAILED: Final = 1
INTERRUPTED: Final = 130

EXIT_CODES: Final[tuple[tuple[int, tuple[type[LoopsError], ...]], ...]] = (
    (2, (InputError, ConfigError, BadRequestError, UnsupportedError)),
    (3, (AuthenticationError, PermissionDeniedError)),
    (4, (NotFoundError,)),
    (5, (NotReadyError, ProvisioningError)),
    (6, (TransportError,)),
)


class Connection(Struct, frozen=True):
    """The options that stand before the command; the rest comes from the environment."""

    base_url: str | None = None
    team: str | None = None
    auth_scheme: str = "Bearer"

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a client; the key is asked for when there is none and somebody can answer."""
        key = os.environ.get("BASETEN_API_KEY") or None
        if key is None and _somebody_answers():
            key = typer.prompt("API key (BASETEN_API_KEY)", hide_input=True, err=True)
        return {"api_key": key, "base_url": self.base_url, "team": self.team, "auth_scheme": self.auth_scheme}


def _somebody_answers() -> bool:
    return sys.stdin.isatty()


def connection(context: typer.Context) -> Connection:
    """Return the options that stand before the command."""
    found: Connection = context.obj
    return found


@asynccontextmanager
async def runtime(context: typer.Context) -> AsyncGenerator[Runtime]:
    """Reach the service without opening a session, which only what is created needs."""
    opened = Runtime(resolve_settings(**connection(context).arguments))
    try:
        yield opened
    finally:
        await opened.close()


@asynccontextmanager
async def control_plane(context: typer.Context) -> AsyncGenerator[ControlPlane]:
    """Reach the control plane."""
    async with runtime(context) as opened:
        yield opened.control_plane


def service(context: typer.Context) -> ServiceClient:
    """Return a client that opens a session when it is entered."""
    return ServiceClient(**connection(context).arguments)


async def team_id(context: typer.Context, plane: ControlPlane) -> str | None:
    """Return the id of the team that was named before the command."""
    team = connection(context).team
    return None if team is None else await resolve_team(plane, team)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Do a command's work. Whatever fails becomes one readable paragraph and an exit code."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except LoopsError as error:
        fail(_paragraph(error), exit_code(error))
    except (OSError, ImportError) as error:
        fail(_paragraph(error), FAILED)
    except Exception as error:
        if os.environ.get("LOOPS_TRACEBACK"):
            raise
        fail(
            f"{type(error).__name__}: {_paragraph(error)} This should not happen: please report it, with what "
            "LOOPS_TRACEBACK=1 shows.",
            FAILED,
        )


def on_control_plane(context: typer.Context, work: Callable[[ControlPlane], Awaitable[T]]) -> T:
    """Do the work of a command that needs the control plane alone."""

    async def connected() -> T:
        async with control_plane(context) as plane:
            return await work(plane)

    return run(connected())


async def all_of(work: Iterable[Awaitable[T]]) -> tuple[list[T], list[Exception]]:
    """Do several things at once; return the results of those that succeed, and the errors of the others."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)], failures


def end(failures: Sequence[Exception]) -> None:
    """End the command with an error if anything failed; the code is that of the first failure."""
    if failures:
        for failure in failures[1:]:
            complain(_paragraph(failure))
        fail(_paragraph(failures[0]), exit_code(failures[0]))


def exit_code(error: Exception) -> int:
    """Return what a script learns of an error."""
    return next((code for code, kinds in EXIT_CODES if isinstance(error, kinds)), FAILED)


def fail(message: str, code: int) -> NoReturn:
    """End the command with a message."""
    complain(message)
    raise typer.Exit(code)


def complain(message: str) -> None:
    """Print a paragraph to standard error."""
    errors.print(f"loops: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def _paragraph(error: Exception) -> str:
    texts = [" ".join(text.split()) for text in (str(error), *getattr(error, "__notes__", []))]
    sentences = (text if text.endswith((".", "!", "?")) else f"{text}." for text in texts if text)
    return " ".join(sentences) or type(error).__name__


def prepare() -> None:
    """Set up what concerns the whole process."""
    logging.getLogger("loops_async").addHandler(_Notices())
    # A job that is called off cleans up like one that is interrupted, and leaves no run that costs money. It takes the
    # way of Ctrl-C, which an event loop hears between two steps and not in the middle of one.
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)


class _Notices(logging.Handler):
    """Shows what the library has to say while it works, such as that it tries again."""

    def emit(self, record: logging.LogRecord) -> None:
        text = f"loops: {record.getMessage()}"
        errors.print(text, style="dim", markup=False, highlight=False, no_wrap=True, overflow="ellipsis", width=100)

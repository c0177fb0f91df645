"""How a command connects to the service, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import cached_property
from typing import Any, NoReturn, TypeVar

import typer
from msgspec import Struct

from .._http.settings import Settings, resolve_settings
from .._session.runtime import Runtime
from ..client import ServiceClient
from ..control_plane import ControlPlane, resolve_team
from ..errors import LoopsError
from ._exit_codes import FAILED, INTERRUPTED, REFUSED, exit_code
from ._show import complain, leave_closed_pipe, note, prepare_streams
from ._words import in_words_of_options

__all__ = [
    "FAILED",
    "Connection",
    "all_of",
    "complain",
    "confirm",
    "connection",
    "end",
    "fail",
    "key_of_environment",
    "on_control_plane",
    "on_service",
    "paragraph",
    "prepare",
    "run",
    "service",
    "team_id",
]

T = TypeVar("T")


# `dict=True` gives `cached_property` a place to store its value.
class Connection(Struct, frozen=True, dict=True):
    """The options before the command; everything else comes from the environment."""

    base_url: str | None = None
    team: str | None = None
    auth_scheme: str = "Bearer"

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a client. Prompts for a missing API key, once, if standard input is a terminal."""
        key = key_of_environment()
        if key is None and _is_interactive():
            key = typer.prompt("API key (BASETEN_API_KEY)", hide_input=True, err=True)
        return {"api_key": key, "base_url": self.base_url, "team": self.team, "auth_scheme": self.auth_scheme}

    @property
    def settings(self) -> Settings:
        """The settings that a client derives from these arguments and the environment."""
        return resolve_settings(**self.arguments)


def key_of_environment() -> str | None:
    """Return the API key of the environment."""
    return os.environ.get("BASETEN_API_KEY") or None


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def confirm(question: str) -> None:
    """Ask before what cannot be undone; without a terminal to ask in, only ``--yes`` allows it."""
    if not _is_interactive():
        fail(f"{question} There is no terminal to ask in: give --yes, too.", REFUSED)
    if not typer.confirm(question, err=True):
        fail("nothing was changed", FAILED)


def connection(context: typer.Context) -> Connection:
    """Return the options before the command."""
    found: Connection = context.obj
    return found


def service(context: typer.Context) -> ServiceClient:
    """Return a client that opens a session when it is entered; what commands create is meant to run on."""
    return ServiceClient(**connection(context).arguments, on_exit="leave")


async def team_id(context: typer.Context, plane: ControlPlane) -> str | None:
    """Return the id of the team to act for, None for the key's own."""
    team = connection(context).settings.team
    return None if team is None else await resolve_team(plane, team)


def run(context: typer.Context, work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; an error becomes one paragraph on standard error and an exit code."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        leave_closed_pipe()
    except LoopsError as error:
        fail(paragraph(context, error), exit_code(error))
    except UnicodeEncodeError:  # Python keeps bytes that it cannot decode, in text that cannot be sent
        fail(f"an argument or a variable has bytes that are no {sys.getfilesystemencoding()} text.", REFUSED)
    except (OSError, ImportError) as error:
        fail(paragraph(context, error), FAILED)
    except Exception as error:
        if os.environ.get("LOOPS_TRACEBACK"):
            raise
        fail(
            f"{type(error).__name__}: {paragraph(context, error)} This should not happen: please report it, with the "
            "output of the same command under LOOPS_TRACEBACK=1.",
            FAILED,
        )


def on_service(context: typer.Context, work: Callable[[Runtime], Awaitable[T]]) -> T:
    """Run a command that needs no session: all but those that create runs or samplers."""

    async def connected() -> T:
        runtime = Runtime(connection(context).settings)
        try:
            return await work(runtime)
        finally:
            await runtime.close()

    return run(context, connected())


def on_control_plane(context: typer.Context, work: Callable[[ControlPlane], Awaitable[T]]) -> T:
    """Run a command that needs only the control plane."""
    return on_service(context, lambda runtime: work(runtime.control_plane))


async def all_of(work: Iterable[Awaitable[T]]) -> tuple[list[T], list[Exception]]:
    """Run several things concurrently; return the results of those that succeed, and the errors of the others."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)], failures


def end(context: typer.Context, failures: Sequence[Exception]) -> None:
    """Print all failures; if there are any, end the command with the exit code of the first."""
    if failures:
        for failure in failures[1:]:
            complain(paragraph(context, failure))
        fail(paragraph(context, failures[0]), exit_code(failures[0]))


def fail(message: str, code: int) -> NoReturn:
    """Print an error and end the command with an exit code."""
    complain(message)
    raise typer.Exit(code)


def paragraph(context: typer.Context, error: Exception) -> str:
    """Return the message of an error with its notes, in the words of the command line."""
    texts = [" ".join(text.split()) for text in (str(error), *getattr(error, "__notes__", []))]
    sentences = (text if text.endswith((".", "!", "?")) else f"{text}." for text in texts if text)
    return in_words_of_options(context, error, " ".join(sentences)) or type(error).__name__


def prepare() -> None:
    """Set up the standard streams, logging and signal handlers of the process."""
    prepare_streams()
    log = logging.getLogger("loops_async")
    if not log.handlers:  # LOOPS_LOG shows the same lines
        log.addHandler(_Notices())
    # A job that is terminated must clean up like an interrupted one, so that no run is left that costs money. The
    # event loop handles SIGINT between two steps, not in the middle of one.
    signal.signal(signal.SIGTERM, _interrupt)
    # A shell has what a script starts in the background ignore SIGINT, and SIGTERM must end it all the same.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)


class _Notices(logging.Handler):
    """Prints the log of the library, e.g. its retries, to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        note(" ".join(f"loops: {record.getMessage()}".split()))

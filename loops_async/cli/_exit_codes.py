"""How commands end: the only table of exit codes, from which the help page and `docs/cli.md` are made."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from ..errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    InputError,
    JournalError,
    LoopsError,
    NotFoundError,
    NotReadyError,
    PermissionDeniedError,
    ProvisioningError,
    TransportError,
    UnsupportedError,
)


class Ending(Struct, frozen=True):
    """One way to end: its code, what that means in two or three words and in a sentence, and the errors behind it."""

    code: int
    short: str
    meaning: str
    errors: tuple[type[LoopsError], ...] = ()


FAILED: Final = 1
REFUSED: Final = 2
UNANSWERED: Final = 7
INTERRUPTED: Final = 130
CLOSED_PIPE: Final = 141

ENDINGS: Final = (
    Ending(0, "success", "success"),
    Ending(FAILED, "failed", "the service or this machine failed, e.g. a full disk or a missing package"),
    Ending(
        REFUSED,
        "invalid request",
        "a wrong option or value, a missing file, no API key; or the service refused the request",
        (InputError, ConfigError, BadRequestError, UnsupportedError, JournalError),
    ),
    Ending(
        3,
        "key rejected",
        "the API key was rejected, or has no permission for the request",
        (AuthenticationError, PermissionDeniedError),
    ),
    Ending(4, "not found", "there is no object of this id", (NotFoundError,)),
    Ending(
        5,
        "not ready",
        "provisioning failed, or a run or sampler was not ready in time",
        (NotReadyError, ProvisioningError),
    ),
    Ending(6, "service not reached", "the service was not reached, or it is not a Loops service", (TransportError,)),
    Ending(UNANSWERED, "some unanswered", "finished, but some prompts can never be answered and are `error` lines"),
    Ending(INTERRUPTED, "interrupted", "interrupted by Ctrl-C or a signal; what was being created is deactivated"),
    Ending(CLOSED_PIPE, "output closed", "the reader of the output went away, as `head` does"),
)


def exit_code(error: Exception) -> int:
    """Return the exit code for an error."""
    return next((ending.code for ending in ENDINGS if isinstance(error, ending.errors)), FAILED)


def in_one_sentence() -> str:
    """Return the codes for the help page."""
    return f"Exit codes: {', '.join(f'{ending.code} {ending.short}' for ending in ENDINGS)}."

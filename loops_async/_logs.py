"""Where the log goes: nowhere by itself, to standard error if the user asks for that."""

from __future__ import annotations

import logging
import os
import sys
from typing import Final, Literal, TextIO

from .errors import InputError

__all__ = ["LOGGERS", "log_as_the_environment_says", "log_to_stderr"]

LOGGERS: Final = ("loops_async", "loops_local")
VARIABLE: Final = "LOOPS_LOG"
FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "off": logging.CRITICAL + 1,
}
_RULE: Final = f"must be {', '.join(list(_LEVELS)[:-1])} or {list(_LEVELS)[-1]}"


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what is `sys.stderr` at that moment, unless the root logger has a handler: it gets the same lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter(FORMAT))

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # an attribute there, which tests and notebooks replace
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


_handler: Final = _ToStderr()


def log_to_stderr(level: Literal["debug", "info", "warning", "off"] = "info") -> None:
    """Show the log of the library, and of the embedded service, on standard error.

    A program that sets up `logging` itself does not need this: where the root logger has a handler, that one gets the
    lines, and this only sets the level. Calling it again changes the level. ``LOOPS_LOG`` in the environment does the
    same without a change of the program.

    Args:
        level: ``"debug"`` shows each attempt of a request, ``"info"`` each stage of provisioning, ``"warning"`` only
            what may need attention; ``"off"`` shows nothing.

    Raises:
        InputError: there is no such level.
    """
    if level not in _LEVELS:
        raise InputError("level", f"{_RULE}; got {level!r}")
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(_LEVELS[level])
        logger.addHandler(_handler)  # twice is once


def is_shown() -> bool:
    """Whether `log_to_stderr` or ``LOOPS_LOG`` has switched the log on."""
    logger = logging.getLogger(LOGGERS[0])
    return _handler in logger.handlers and logger.level <= logging.WARNING


def log_as_the_environment_says() -> None:
    """Do what ``LOOPS_LOG`` says; another word is answered with a line that lists the words."""
    level = os.environ.get(VARIABLE, "").strip().lower()
    if level in _LEVELS:
        log_to_stderr(level)  # type: ignore[arg-type]  # it is one of them
    elif level:
        logging.getLogger(LOGGERS[0]).warning("%s %s; got %r", VARIABLE, _RULE, level)

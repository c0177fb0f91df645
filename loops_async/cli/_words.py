"""Errors of the library in the words of the command line: it speaks of arguments, a command of its options."""

from __future__ import annotations

import re
from typing import Any, Final

import typer

from ..errors import ConfigError, InputError
from ._help import metavar

PHRASES: Final = (
    ("pass api_key=…, or set BASETEN_API_KEY", "set BASETEN_API_KEY"),
    ("(BASETEN_API_KEY or api_key=)", "(BASETEN_API_KEY)"),
    ("pass the base_url and api_key that it prints", "set the variables that it prints"),
    ("pass allow_http=True or set LOOPS_ALLOW_HTTP=1", "set LOOPS_ALLOW_HTTP=1"),
    ("HTTPS_PROXY and HTTP_PROXY or proxy=", "HTTPS_PROXY and HTTP_PROXY"),
    ("before making the client", "before the command"),
    ("keep both: append=True", "keep both: --append"),
    (".stale: drop_stale=True", ".stale: --drop-stale"),
    ("a larger ready_timeout", "a larger --ready-timeout"),
    ("(keep_on_failure)", "(--keep)"),
    ("control_plane.list_runs, or `loops runs list`", "`loops runs list`"),
    ("control_plane.list_samplers, or `loops samplers list`", "`loops samplers list`"),
    ("Check base_url", "Check --base-url or LOOPS_BASE_URL"),
    ("the id and the base_url", "the id, and --base-url or LOOPS_BASE_URL"),
)
"""What the library says to programmers, and what a command says instead."""


def in_words_of_options(context: typer.Context, error: Exception, message: str) -> str:
    """Return the message of an error, with options in place of arguments.

    An argument is replaced by the option of the same Python name, and only in errors about arguments: other messages
    quote what was sent and received.
    """
    for argument, words in PHRASES:
        message = message.replace(argument, words)
    if isinstance(error, InputError | ConfigError):
        for name, option in _names(context).items():
            # A single word is an argument only where the message begins with it.
            place = rf"(?<![\w.<-]){name}(?![\w.>=-])" if "_" in name else f"^{name}(?=: )"
            message = re.sub(place, option, message)
    return message


def _names(context: Any) -> dict[str, str]:
    """Return the options of a command and of those above it by their Python names; arguments are named in capitals."""
    found: dict[str, str] = {}
    while context is not None:
        for each in context.command.params:
            is_option = each.param_type_name == "option"
            found.setdefault(each.name, max(each.opts, key=len) if is_option else metavar(each))
        context = context.parent
    return found

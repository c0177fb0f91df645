"""What a client is told by its arguments and by the environment, and what is ignored."""

from __future__ import annotations

import logging
import os
from typing import Any, Final

import loops_async as loops

__all__ = ["ignore", "service_settings", "show_log"]

VENDOR_KEY: Final = "tml-"
"""How the keys of the vendor of `tinker` begin, which must not be sent to another service."""

log: logging.Logger = logging.getLogger("loops_tinker")

_ignored: set[str] = set()


def service_settings(api_key: str | None, base_url: str | None) -> dict[str, Any]:
    """Return the arguments of a service client.

    An argument takes precedence over ``BASETEN_API_KEY`` and ``LOOPS_BASE_URL``, and these over ``TINKER_API_KEY`` and
    ``TINKER_BASE_URL``.

    Raises:
        ConfigError: there is no key and no URL, or the key is one of Tinker.
    """
    key = api_key or os.environ.get("BASETEN_API_KEY") or os.environ.get("TINKER_API_KEY") or None
    url = base_url or os.environ.get("LOOPS_BASE_URL") or os.environ.get("TINKER_BASE_URL") or None
    if key is not None and key.startswith(VENDOR_KEY):
        raise loops.ConfigError(
            "the API key is one of Tinker, and was not sent: set BASETEN_API_KEY to a key of Baseten, which is used "
            "instead of TINKER_API_KEY"
        )
    settings: dict[str, Any] = {"api_key": key, "base_url": url, "on_exit": "leave"}
    loops.ServiceClient(**settings)  # makes no request, and checks
    return settings


def key_for_pickled_clients() -> None:
    """Let a pickled sampling client find its key where a script for `tinker` has it."""
    key = os.environ.get("TINKER_API_KEY", "")
    if key and not key.startswith(VENDOR_KEY):
        os.environ.setdefault("BASETEN_API_KEY", key)


def ignore(**options: Any) -> None:
    """Say, once in a process for each name, which options were given that Loops does not have."""
    given = {name for name, value in options.items() if value not in (None, False)} - _ignored
    if given:
        _ignored.update(given)
        log.warning("ignored, since Loops has nothing like it: %s", ", ".join(sorted(given)))


def show_log() -> None:
    """Show the log if ``TINKER_LOG`` says so, and ``LOOPS_LOG`` does not."""
    level = os.environ.get("TINKER_LOG", "").lower()
    if level in ("debug", "info") and not os.environ.get("LOOPS_LOG"):
        loops.log_to_stderr("debug" if level == "debug" else "info")
